"""A route whose connections take turns on one pipeline, and one such turn."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from typing import Any

from peers import PATIENCE, eventually, receive_all
from relays import Process, working_threads

from relay.config.data import from_data
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.serving.stream_route import StreamRoute


def standing(sink: str, stages: str = "[]", more: str = "") -> str:
    """A route whose connections take turns on one pipeline."""
    return f"""
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: one}}
    stages: {stages}
    sink: {sink}
    {more}
"""


def source_of(served: Process, number: int = 0) -> socket.socket:
    """A connection to relay's source."""
    return socket.create_connection(("127.0.0.1", served.port(number)))


def end(sock: socket.socket) -> None:
    """Ends the stream and waits until relay has closed: the turn is over."""
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        assert receive_all(sock) == b""
    sock.close()


def listening_at(port: int) -> socket.socket:
    """A listener at a port that was free a moment ago."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(8)
    return sock


@contextlib.contextmanager
def at_work(route: dict[str, Any], records: list[SessionRecord]) -> Iterator[StreamRoute]:
    """A route that serves in this process, on an engine with a thread of its own."""
    engine = Engine("reconnecting")
    over = threading.Event()
    running = StreamRoute(
        "r",
        from_data({"routes": {"r": route}}, "test").routes["r"],
        engine,
        itertools.repeat(engine),
        lambda _route: over.set(),
        on_record=records.append,
    )
    running.open()
    engine.start()
    try:
        yield running
    finally:
        engine.post(lambda: running.abort("the test is over"))
        assert over.wait(PATIENCE)
        # a log's thread may still be at work; what it leaves is closed on the engine
        eventually(lambda: not working_threads("-ferry"), "the ferries' threads end")
        running.close()
        engine.stop()
