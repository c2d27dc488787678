"""Real kernel objects for tests: every one is closed when the test ends, and a test may close it earlier."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple


class PipeEnds(NamedTuple):
    """The read and the write end of a kernel pipe."""

    r: int
    w: int


class Descriptors:
    """Owns every descriptor it makes. Numbers that a test has closed through `close()` are forgotten."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._closers: list[Callable[[], None]] = []

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._numbers:
            with contextlib.suppress(OSError):
                os.close(number)
        for close in self._closers:
            close()

    def keep(self, number: int) -> int:
        """Takes over a descriptor made elsewhere and returns it."""
        self._numbers.append(number)
        return number

    def close(self, *numbers: int) -> None:
        """Closes descriptors made here before the test ends."""
        for number in numbers:
            self._numbers.remove(number)
            os.close(number)

    def pipe(self, capacity: int = 0, *, blocking: bool = False) -> PipeEnds:
        """A pipe, nonblocking unless said otherwise, with `capacity` bytes if given (it must be granted)."""
        ends = PipeEnds(*os.pipe2(os.O_CLOEXEC | (0 if blocking else os.O_NONBLOCK)))
        self._numbers += ends
        if capacity:
            granted = fcntl.fcntl(ends.w, fcntl.F_SETPIPE_SZ, capacity)
            assert granted == capacity, f"asked for a pipe of {capacity} bytes, got {granted}"
        return ends

    def fill(self, ends: PipeEnds) -> int:
        """Fills a nonblocking pipe until it takes nothing more, and returns the bytes written."""
        written = 0
        for step in (65536, 4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    written += os.write(ends.w, b"f" * step)
        return written

    def open(self, path: str | Path, flags: int, mode: int = 0o600) -> int:
        """As os.open."""
        return self.keep(os.open(path, flags | os.O_CLOEXEC, mode))

    def memfd(self, content: bytes = b"") -> int:
        """A memfd with `content`, its offset at 0."""
        number = self.keep(os.memfd_create("test"))
        os.pwrite(number, content, 0)
        return number

    def epoll(self) -> select.epoll:
        """An epoll, closed with the rest."""
        made = select.epoll()
        self._closers.append(made.close)
        return made

    def tcp_pair(
        self, *, blocking: bool = False, receive_buffer: int = 0
    ) -> tuple[socket.socket, socket.socket]:
        """Two connected tcp sockets on loopback; `receive_buffer` bytes asked for on the second one."""
        with socket.socket() as listener:
            if receive_buffer:
                # Before listen(): the window scale is settled in the handshake.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        return self._pair(near, far, blocking)

    def unix_pair(self, *, blocking: bool = False) -> tuple[socket.socket, socket.socket]:
        """Two connected unix stream sockets."""
        return self._pair(*socket.socketpair(), blocking)

    def _pair(
        self, near: socket.socket, far: socket.socket, blocking: bool
    ) -> tuple[socket.socket, socket.socket]:
        for sock in (near, far):
            sock.setblocking(blocking)
            self._closers.append(sock.close)
        return near, far
