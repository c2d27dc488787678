"""Inherited descriptors: stdin, stdout (`-`) and `fd://N`.

Facts (man 2 open, 5 proc, 7 pipe):
- O_NONBLOCK belongs to the open file description, which is shared with whoever gave us the descriptor: setting
  it would break them. Opening /proc/self/fd/N makes a description of our own for pipes, terminals and files;
  for sockets it is ENXIO, so those are used with MSG_DONTWAIT, call by call.
- splice refuses terminals, and files opened with O_APPEND, with EINVAL.
- shutdown(2) and SO_LINGER act on the socket, not on the descriptor: everybody who shares it is shut down, or
  resets the connection when closing it later.

What this means here: the descriptor we were given is never changed and never closed; what we open ourselves is. The
end of a stream is the close of relay's own descriptor and nothing else: who reads sees an end when the last one closes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat

from relay.endpoints.base import Sink
from relay.endpoints.ferried import FerriedSink
from relay.endpoints.file import FileSource
from relay.endpoints.socket import READ_WRITE, SocketSink, socket_of
from relay.engine import Engine
from relay.kernel import core
from relay.kernel.pipe import LARGEST_CAPACITY, enlarge

NAMES = {0: "stdin", 1: "stdout", 2: "stderr"}


def name_of(fd: int) -> str:
    """stdin, stdout, or fd://N."""
    return NAMES.get(fd, f"fd://{fd}")


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)


def _reopen(fd: int, flags: int) -> int:
    """A description of our own for the same pipe or device, nonblocking; -1 where the system refuses."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return -1


class InheritedSource(FileSource):
    """Reads a descriptor that relay was started with, from where it stands.

    A file is read from `offset` bytes further on; anything else has no offset but the bytes themselves, so
    whoever wants to leave some out discards them in the chain. `length` counts what is left in: of a pipe
    exactly `offset + length` bytes are read, and what follows stays in it.
    """

    def __init__(self, engine: Engine, fd: int, *, offset: int = 0, length: int | None = None) -> None:
        super().__init__(engine, name_of(fd), offset=offset, length=length)
        self.name = name_of(fd)
        self.peer = name_of(fd)
        self._given = fd

    def open(self) -> None:
        """Finds out what the descriptor is and takes a description of its own where it can."""
        try:
            status = os.fstat(self._given)
        except OSError as error:
            self.on_fail(
                self.error("using", error.errno or 0, advice="it is not open: redirect something to it")
            )
            return
        mode = status.st_mode
        self.scheme = "file" if stat.S_ISREG(mode) else "stdio"
        self.size = None
        self.c.left = -1 if self._length is None else self._offset + self._length
        if fcntl.fcntl(self._given, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
            self.on_fail(self.error("reading", errno.EBADF, reason="it is open for writing only"))
        elif stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            self._offset += os.lseek(self._given, 0, os.SEEK_CUR) if stat.S_ISREG(mode) else 0
            self.take(os.dup(self._given))
        elif _is_null(status) and self._length:
            self.on_fail(self.error("reading", 0, reason=f"it has 0 bytes, not {self._length}"))
        elif _is_null(status):
            self.c.kind, self.c.left, self.c.readable = core.INSTANT, 0, 1
            self.on_open()
        elif stat.S_ISSOCK(mode):
            self.c.is_socket = 1
            self.copies = "an inherited socket is not made nonblocking"
            if self.attach(os.dup(self._given), select.EPOLLIN | select.EPOLLRDHUP):
                self.on_open()
        else:
            self._open_pipe_or_device(stat.S_ISFIFO(mode))

    def _open_pipe_or_device(self, is_pipe: bool) -> None:
        own = _reopen(self._given, os.O_RDONLY)
        if own < 0:
            own = os.dup(self._given)  # splice from a pipe obeys SPLICE_F_NONBLOCK without the flag
            if not is_pipe:
                self.on_fail(self.error("reopening", errno.EACCES, advice="redirect a pipe or a file to it"))
                os.close(own)
                return
        if is_pipe:
            enlarge(own, LARGEST_CAPACITY)
        else:
            self.copies = "a terminal or device is not spliced"
        if self.attach(own, select.EPOLLIN):
            self.on_open()


class InheritedSocketSink(SocketSink):
    """A connected socket that relay was started with: written with MSG_DONTWAIT through a descriptor of relay's own."""

    def __init__(self, engine: Engine, fd: int) -> None:
        super().__init__(engine, name_of(fd))
        self._given = fd
        self.copies = "an inherited socket is not made nonblocking"

    def open(self) -> None:
        """Registers a duplicate of the descriptor."""
        self.counts_fin = socket_of(self._given, lambda sock: sock.family) != socket.AF_UNIX
        if self.attach(os.dup(self._given), READ_WRITE):
            self.opened()

    def finish(self) -> None:
        """Closes the duplicate: others may go on with the socket, and whoever started relay may read only later."""
        if self.state == "open":
            self.finished()

    def close(self) -> None:
        """Closes the duplicate alone, without a reset, however the stream ended."""
        Sink.close(self)


class PipeSink(Sink):
    """A pipe, terminal or device that epoll can tell about, opened anew; owns that descriptor."""

    def __init__(self, engine: Engine, fd: int, own: int, *, is_pipe: bool) -> None:
        super().__init__(engine, name_of(fd))
        self._own = own
        if is_pipe:
            enlarge(own, LARGEST_CAPACITY)
        else:
            self.copies = "a terminal or device is not spliced"

    def open(self) -> None:
        """Registers the descriptor."""
        own, self._own = self._own, -1
        if self.attach(own, select.EPOLLOUT):
            self.opened()


class BlockingSink(FerriedSink):
    """A file, or anything that cannot be opened anew: a thread writes to the descriptor as it is."""

    def __init__(self, engine: Engine, fd: int, *, copies: str = "") -> None:
        super().__init__(engine, name_of(fd))
        self._given = fd
        self.copies = copies

    @property
    def moved(self) -> int:
        """Bytes that reached the descriptor."""
        return int(self._ferry.c.moved) if self._ferry is not None else 0

    def open(self) -> None:
        """Starts the thread."""
        self.embark(LARGEST_CAPACITY, self._write, self._written)
        self.opened()

    def go_straight(self, why: str) -> bool:
        """Whether the source may be read into memory that the thread writes from, and is from now on."""
        if self._ferry is not None and self._ferry.have_memory():
            self._straight = True
            self.copies = self.copies or why
        return self._straight

    def _write(self) -> None:
        assert self._ferry is not None
        self._ferry.carry(self._given, copy=bool(self.copies))

    def _written(self, _result: object, failed: BaseException | None) -> None:
        if failed is None and self.state == "finishing":
            self.finished()
        elif isinstance(failed, OSError):
            self.fail(self.error("writing to", failed.errno or 0))


def inherited_sink(engine: Engine, fd: int, *, copies: str = "") -> Sink:
    """The sink that fits what `fd` is; a closed descriptor gives one that fails when it is opened.

    `copies` says why even an end that could be spliced is not.
    """
    from relay.endpoints.null import NullSink

    try:
        status = os.fstat(fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError:
        return BlockingSink(engine, fd)
    if _is_null(status):
        sink: Sink = NullSink(engine)
        sink.address = name_of(fd)
        return sink
    if stat.S_ISSOCK(status.st_mode):
        return InheritedSocketSink(engine, fd)
    if stat.S_ISREG(status.st_mode):
        append = "O_APPEND refuses splice" if flags & os.O_APPEND else ""
        return BlockingSink(engine, fd, copies=append or copies)
    is_pipe = stat.S_ISFIFO(status.st_mode)
    own = _reopen(fd, os.O_WRONLY)
    if own < 0:
        return BlockingSink(engine, fd, copies=copies if is_pipe else "a terminal or device is not spliced")
    return PipeSink(engine, fd, own, is_pipe=is_pipe)
