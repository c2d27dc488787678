"""What stands at both ends of what is measured: looped sources, feeders, receivers.

A feeder or the receivers' loop is C on a thread of its own and holds no lock of Python's. Both use what real
producers and consumers use, at the least cost there is, so that relay and not they are the bottleneck.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from relay.bench.cell import KIB, MIB, Kind, Place
from relay.endpoints.address import Address
from relay.endpoints.base import Source
from relay.endpoints.file import FileSource
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine
from relay.errors import KernelError
from relay.kernel import core
from relay.kernel.arena import Arena
from relay.kernel.feed import Drain, Feed
from relay.kernel.pipe import LARGEST_CAPACITY, enlarge

LOOP = 64 * MIB  # bytes of the file and of the memory that are read over and over: more than caches hold
FED = 16 * MIB  # bytes of the file that pipes are fed from: what was written just now may lie in a cache
MERGED = 4 * KIB  # smaller writes to a pipe share pages; as references each would take a slot
PATIENCE = 10.0  # seconds for a connection on this machine


class Looped:
    """For sources of a known size: what was read to its end is read again, until `stop`."""

    c: core.Struct

    def begin_loop(self) -> None:
        """From the first byte; its end is not the stream's."""
        self._size = int(self.c.left)
        self.c.waits = 1

    def refill(self) -> bool:
        """Once more, unless it was stopped."""
        if self.c.waits:
            self.c.offset, self.c.left = 0, self._size
        self.c.readable = 1
        return True

    def stop(self) -> None:
        """The stream ends where it stands. On the engine's thread."""
        self.c.waits = self.c.left = 0


class LoopedFile(Looped, FileSource):
    """A regular file, read over and over."""


class LoopedMemory(Looped, Source):
    """Memory of relay's own, lent or copied over and over; owns nothing, `arena` is its maker's."""

    def __init__(self, engine: Engine, arena: Arena) -> None:
        super().__init__(engine, "memory")
        self.scheme = "memory"
        self.c.kind = core.INSTANT
        self.c.memory = arena.pointer()
        self.c.offset, self.c.left = 0, arena.size
        self.c.readable = 1


class Load(threading.Thread):
    """A thread for a loop in C on `cpus` (None: any); `failed` is the errno it ended with."""

    def __init__(self, name: str, loop: Callable[[], int], cpus: frozenset[int] | None) -> None:
        super().__init__(name=f"bench-{name}", daemon=True)
        self._loop = loop
        self._cpus = cpus
        self.failed = 0

    def run(self) -> None:
        """The loop, once."""
        if self._cpus is not None:
            os.sched_setaffinity(0, self._cpus)
        self.failed = self._loop()


class Feeder:
    """Feeds the other end of a source; owns `fd`, which it closes when it is stopped: the end of the stream."""

    def __init__(self, fd: int, feed: Feed, cpus: frozenset[int] | None) -> None:
        self.feed = feed
        self._fd = fd
        self._thread = Load("feeder", self._run, cpus)

    def start(self) -> None:
        """From now on bytes come."""
        self._thread.start()

    def _run(self) -> int:
        failed = self.feed.run()
        os.close(self._fd)
        return failed

    def close(self) -> None:
        """Stops it and waits; the source must be read to its end, or closed."""
        self.feed.stop()
        if self._thread.ident is None:
            os.close(self._fd)
        else:
            self._thread.join(PATIENCE)


def feeder(fd: int, place: Place, file: int, cpus: frozenset[int] | None) -> Feeder:
    """A feeder for `fd`: pipes get references to the pages of `file` where pieces are pages, sockets are written to."""
    by_reference = place.source == "pipe" and place.size >= MERGED
    feed = Feed(fd, place.size, file=file, file_size=FED) if by_reference else Feed(fd, place.size)
    return Feeder(fd, feed, cpus)


class Receivers:
    """`count` ends for sinks of one kind, and the loop that reads from them. Owns every descriptor and file.

    `sinks` are their settings. `connect` accepts what relay connects, then `start` reads; `counts` are the bytes that
    each got.
    """

    def __init__(self, kind: Kind, count: int, directory: Path, cpus: frozenset[int] | None) -> None:
        self._kind = kind
        self._cpus = cpus
        self._undo = contextlib.ExitStack()
        self._listeners: list[socket.socket] = []
        self._fds: list[int] = []
        self._paths = [directory / f"sink-{number}" for number in range(count)]
        self._drain: Drain | None = None
        self._thread: Load | None = None
        try:
            self.sinks = [self._make(path) for path in self._paths]
        except BaseException:
            self.close()
            raise

    def _make(self, path: Path) -> SinkSettings:
        if self._kind == "null":
            return SinkSettings.model_validate("null:")
        if self._kind == "file":
            self._undo.callback(path.unlink, missing_ok=True)
            return SinkSettings.model_validate({"file": str(path)})
        if self._kind == "pipe":
            os.mkfifo(path)
            self._undo.callback(path.unlink, missing_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._own(fd)
            enlarge(fd, LARGEST_CAPACITY)
            return SinkSettings.model_validate({"fifo": str(path)})
        listener, address = listening(self._kind, path)
        self._undo.callback(path.unlink, missing_ok=True)
        self._undo.callback(listener.close)
        self._listeners.append(listener)
        return SinkSettings.model_validate({"connect": str(address)})

    def _own(self, fd: int) -> None:
        self._fds.append(fd)

    def connect(self) -> None:
        """Accepts a connection for each sink that connects. Raises KernelError when none comes."""
        for listener in self._listeners:
            try:
                accepted, _peer = listener.accept()
            except TimeoutError as error:
                raise KernelError("accepting what relay connects: nothing came", hint="try again") from error
            accepted.setblocking(False)
            self._own(accepted.detach())

    def start(self) -> None:
        """Reads from now on, where there is anything to read from."""
        if not self._fds:
            return
        assert self._kind in ("pipe", "tcp", "unix")
        self._drain = Drain(self._fds, self._kind)
        self._undo.callback(self._drain.close)
        self._thread = Load("receivers", self._drain.run, self._cpus)
        self._thread.start()

    def counts(self) -> list[int] | None:
        """Bytes that each got; waits for the ends of the streams. None where only relay knows (null)."""
        if self._kind == "file":
            return [path.stat().st_size for path in self._paths]
        if self._thread is None or self._drain is None:
            return None
        self._thread.join(PATIENCE)
        return self._drain.got

    def close(self) -> None:
        """Ends the loop, closes and removes everything. Safe to call again."""
        if self._thread is not None and self._drain is not None:
            self._drain.stop()
            self._thread.join(PATIENCE)
            self._thread = None
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._undo.close()


def listening(kind: Kind, path: Path) -> tuple[socket.socket, Address]:
    """A listening socket on this machine and its address; accept gives up after PATIENCE."""
    if kind == "tcp":
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        address = Address("tcp", host="127.0.0.1", port=int(listener.getsockname()[1]))
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        address = Address("unix", path=str(path))
    listener.listen(1)
    listener.settimeout(PATIENCE)
    return listener, address
