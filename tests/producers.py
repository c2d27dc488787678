"""Routes that take what a local program shares with them, and what it gives."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import payload

import relay
from relay.journal.record import SessionRecord

STREAM = payload(5, (6 << 20) + 1001)


class Taking:
    """A route from shared memory at `path` for one stream, run on a thread; `outcome` waits for it."""

    def __init__(self, path: Path, sink: Any, **more: Any) -> None:
        self._ready = threading.Event()
        self._cancel = relay.Cancel()
        self._outcome: relay.Outcome | None = None
        self._route = relay.Route(source={"shared": f"unix://{path}"}, sink=sink, **more)
        self._path = path
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._outcome = relay.run(
            self._route,
            once=True,
            on_ready=lambda _bound: self._ready.set(),
            cancel=self._cancel,
            check=False,
        )

    def __enter__(self) -> Taking:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_error: object) -> None:
        self._cancel.cancel()
        self._cancel.cancel()
        self._thread.join(20)

    def connect(self) -> socket.socket:
        """A producer's connection."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._path))
        return sock

    def outcome(self) -> relay.Outcome:
        """Waits until it is over."""
        self._thread.join(20)
        assert self._outcome is not None
        return self._outcome


@contextlib.contextmanager
def serving(config: dict[str, Any]) -> Iterator[list[SessionRecord]]:
    """A configuration at work on a thread until the end of the block; gives the records of streams that are over."""
    ready, cancel = threading.Event(), relay.Cancel()
    records: list[SessionRecord] = []
    server = threading.Thread(
        target=lambda: relay.run(
            config, on_ready=lambda _: ready.set(), on_record=records.append, cancel=cancel, check=False
        )
    )
    server.start()
    try:
        assert ready.wait(20)
        yield records
    except BaseException:
        cancel.cancel()  # the second one waits for nobody
        raise
    finally:
        cancel.cancel()
        server.join(20)
