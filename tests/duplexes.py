"""A duplex route in this process between sockets that a test holds both ends of, or the same without relay."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import PATIENCE, accept, eventually, receive_exactly, tcp_listener, unix_listener

from relay.config.data import from_data
from relay.endpoints.address import Address
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.kernel.exchange import Exchange
from relay.serving.staged_route import route_of
from relay.spill.spills import Spills

BOTH: dict[str, Any] = {"stages": [{"tee": {"to": "null:"}}], "replies": [{"tee": {"to": "null:"}}]}
EITHER = pytest.mark.parametrize("stages", [{}, BOTH], ids=["plain", "staged"])


class Duplex:
    """A duplex route on engines with threads of their own; `records` are those of its sessions that are over.

    `exchange` replaces what the sessions of an engine share, for tests that need little of it.
    """

    def __init__(self, source: Any, sink: Any, *, engines: int = 1, **route: Any) -> None:
        settings = {"source": source, "sink": sink, "duplex": True, **route}
        config = from_data({"routes": {"r": settings}}, "test")
        self.engines = [Engine(f"duplex-under-test-{i}") for i in range(engines)]
        self.records: list[SessionRecord] = []
        self._over = threading.Event()
        self._spills = Spills()
        self.route = route_of(
            "r",
            config.routes["r"],
            self.engines[0],
            itertools.cycle(self.engines),
            lambda _route: self._over.set(),
            on_record=self.records.append,
            spills=self._spills,
        )

    def share(self, **sizes: int) -> None:
        """Before it is opened: less memory, fewer pipes than usual."""
        for engine in self.engines:
            made = engine._exchange = Exchange(**sizes)
            made.c.token = engine.register(lambda _what, _error, _mask, one=made: one.add_pipe())
            engine.c.exchange = made.c

    def __enter__(self) -> Duplex:
        try:
            self.route.open()
        except BaseException:
            for engine in self.engines:
                engine.close()
            self._spills.close()
            raise
        for engine in self.engines:
            engine.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._over.is_set():
            self.engines[0].post(lambda: self.route.abort("the test is over"))
            assert self._over.wait(PATIENCE)
        # a ferry's thread may still be at work for a sink that failed; its pipes are closed on the engine
        eventually(
            lambda: not [one.name for one in threading.enumerate() if one.name.endswith("-ferry")],
            "the ferries' threads end",
        )
        self.route.close()
        self._spills.close()
        for engine in self.engines:
            engine.stop()

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.route.bound[0]

    def drain(self) -> None:
        """No new connections."""
        self.engines[0].post(self.route.drain)

    def over(self) -> None:
        """Waits until the route is done."""
        assert self._over.wait(PATIENCE), "the route was not done"

    def record(self) -> SessionRecord:
        """Waits until one session is over; its record."""
        eventually(lambda: self.records, "a session is over")
        return self.records[0]

    def free(self, engine: int = 0) -> tuple[int, int, int]:
        """Small and large buffers and pipes that no session of that engine holds."""
        return self.engines[engine].call(lambda: self.engines[engine].exchange().free)


def connected(address: str) -> socket.socket:
    """A connection to where a route listens."""
    to = Address.parse(address)
    if to.scheme == "tcp":
        return socket.create_connection((to.host, to.port), timeout=PATIENCE)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect("\0" + to.path[1:] if to.abstract else to.path)
    return sock


def crowd(address: str, count: int) -> list[socket.socket]:
    """So many connections, without those that are reset while they are made."""
    made = []
    for _ in range(count):
        with contextlib.suppress(ConnectionResetError):
            made.append(connected(address))
    return made


def assert_room_again(address: str, listening: socket.socket) -> None:
    """Sooner or later a new connection reaches `listening`, of which those of sessions that are gone are taken."""
    listening.setblocking(False)

    def served() -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                listening.accept()[0].close()
        try:
            with connected(address) as again:
                again.settimeout(2)
                again.sendall(b"?")
                with accept(listening, 2) as late:
                    return receive_exactly(late, 1, 2) == b"?"
        except (OSError, AssertionError):
            return False

    eventually(served, "there is room again")


@contextlib.contextmanager
def listener(scheme: str, directory: Path, name: str) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket and its address."""
    made = tcp_listener() if scheme == "tcp" else unix_listener(directory / name)
    with made as (sock, address):
        yield sock, address


@contextlib.contextmanager
def direct(scheme: str, directory: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client and a server with nothing between them."""
    with listener(scheme, directory, "direct") as (listening, address):
        client = connected(address)
        with client, accept(listening) as server:
            server.settimeout(PATIENCE)
            yield client, server


@contextlib.contextmanager
def relayed(
    source: str, sink: str, directory: Path, **route: Any
) -> Iterator[tuple[socket.socket, socket.socket, Duplex]]:
    """A client and a server with a duplex route between them."""
    where = "tcp://127.0.0.1:0" if source == "tcp" else f"unix://{directory}/source"
    with (
        listener(sink, directory, "sink") as (listening, address),
        Duplex({"listen": where}, {"connect": address}, **route) as duplex,
        connected(duplex.address) as client,
        accept(listening) as server,
    ):
        server.settimeout(PATIENCE)
        yield client, server, duplex


def reset(sock: socket.socket) -> None:
    """Closes with a reset, where the kind of socket knows one."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def outcome(sock: socket.socket) -> tuple[bytes, str]:
    """All that comes, and how it ends: `end`, or the name of the error."""
    parts = []
    while True:
        try:
            piece = sock.recv(1 << 20)
        except OSError as error:
            return b"".join(parts), type(error).__name__
        if not piece:
            return b"".join(parts), "end"
        parts.append(piece)


def turned_away(address: str) -> bool:
    """Whether a connection to there is reset, be it while it is made."""
    try:
        with connected(address) as sock:
            return outcome(sock) == (b"", "ConnectionResetError")
    except ConnectionResetError:
        return True


def in_background(action: Any, *arguments: Any) -> threading.Thread:
    """Runs it on a thread that the caller joins."""
    thread = threading.Thread(target=action, args=arguments, daemon=True)
    thread.start()
    return thread


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only how many
