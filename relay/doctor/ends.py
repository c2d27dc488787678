"""What bytes come from and what they arrive in, made so that one can tell whether the pages are the same.

An origin's pages are those of a memfd, a file or plain memory, which `change` writes to after the bytes have arrived
somewhere. Whoever then finds the new bytes there looks at the same pages; whoever finds the old ones has a copy.

Facts (mm/memfd.c, memfd_wait_for_pins): F_SEAL_WRITE counts the references to each page of a memfd. While somebody has
one, other than by a mapping or the file itself, it waits for some 150 ms and then says EBUSY. That is the only count of
references that the kernel gives to anybody (/proc/kpagecount has mappings, for root), and it tells the same story in
another way: of pages that were copied nobody has any.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import select
import socket
import tempfile
from pathlib import Path
from typing import Final, Literal

from relay.errors import KernelError
from relay.kernel import core, memfd
from relay.kernel.pipe import Pipe

Kind = Literal["memory", "file", "memfd", "pipe", "unix", "tcp", "process", "mapped"]

BEFORE: Final = b"a"
AFTER: Final = b"b"
PIECE: Final = 64 * 1024  # bytes moved at once: sockets and ordinary pipes take them
PIPES: Final = 4  # as many are open at once, at most


@functools.cache
def piece() -> int:
    """Bytes moved at once: PIECE, or less where this user's pipes are smaller."""
    with contextlib.ExitStack() as undo:
        return min(PIECE, *(undo.enter_context(Pipe()).capacity for _ in range(PIPES)))


class Pages:
    """Bytes that can be changed afterwards; owns what holds them.

    `fd` is a file's or a memfd's, -1 for memory; `map` is there for plain memory, and for a memfd that is `mapped`.
    """

    def __init__(self, kind: Kind, directory: Path) -> None:
        self.kind = kind
        self.fd = -1
        self.map: mmap.mmap | None = None
        if kind == "memory":
            self.map = mmap.mmap(-1, piece(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        elif kind == "file":
            self.fd, path = tempfile.mkstemp(dir=directory)
            os.unlink(path)  # noqa: PTH108 - a plain call, as mkstemp before it
        else:
            self.fd = os.memfd_create("relay-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, piece())
            self.map = mmap.mmap(self.fd, piece()) if kind == "mapped" else None
        self.write(BEFORE)

    def write(self, byte: bytes) -> None:
        """The whole of it becomes that byte."""
        if self.map is not None:
            self.map[:] = byte * piece()
        else:
            os.pwrite(self.fd, byte * piece(), 0)

    def change(self) -> None:
        """From now on it has other bytes."""
        self.write(AFTER)

    def held(self) -> bool | None:
        """Of a memfd: whether anybody but this object has references to its pages, or maps them. For the last time.

        None where that cannot be told.
        """
        if self.map is not None:
            self.map.close()
            self.map = None
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, memfd.WRITE)
        except OSError as error:
            return True if error.errno == errno.EBUSY else None
        return False

    @property
    def pointer(self) -> core.Struct:
        """The address of plain memory."""
        assert self.map is not None
        return core.ffi.from_buffer("char[]", self.map)

    def close(self) -> None:
        """Lets go of it."""
        if self.fd >= 0:
            os.close(self.fd)


class Channel:
    """A pipe or a pair of sockets: `write_fd`, and `read_fd` at the other end. Nonblocking; owns both."""

    def __init__(self, kind: Kind) -> None:
        self._undo = contextlib.ExitStack()
        if kind == "pipe":
            pipe = Pipe()
            self._undo.callback(pipe.close)
            self.read_fd, self.write_fd = pipe.read_fd, pipe.write_fd
            return
        if kind == "unix":
            near, far = socket.socketpair()
        else:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen(1)
                near = socket.create_connection(listener.getsockname(), 5.0)
                far, _peer = listener.accept()
        for sock in (near, far):
            self._undo.callback(sock.close)
            sock.setblocking(False)
        self.write_fd, self.read_fd = near.fileno(), far.fileno()

    def wait(self) -> None:
        """Until something can be read."""
        poll = select.poll()
        poll.register(self.read_fd, select.POLLIN)
        if not poll.poll(5000):
            raise KernelError("what was sent did not arrive")

    def look(self) -> bytes:
        """Reads as many bytes as were sent."""
        got = b""
        while len(got) < piece():
            self.wait()
            got += os.read(self.read_fd, piece() - len(got))
        return got

    def close(self) -> None:
        """Closes both ends."""
        self._undo.close()


class Stored:
    """A file or memfd that bytes are written into from its beginning; owns it."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        if kind == "file":
            self.write_fd, path = tempfile.mkstemp(dir=directory)
            os.unlink(path)  # noqa: PTH108 - as above
        else:
            self.write_fd = os.memfd_create("relay-doctor", os.MFD_CLOEXEC)

    def look(self) -> bytes:
        """What is in it; the next bytes go to its beginning again."""
        os.lseek(self.write_fd, 0, os.SEEK_SET)
        return os.pread(self.write_fd, piece(), 0)

    def close(self) -> None:
        """Lets go of it."""
        os.close(self.write_fd)


Arrival = Channel | Stored


def arrival(kind: Kind, directory: Path) -> Arrival:
    """Where bytes arrive."""
    return Stored(kind, directory) if kind in ("file", "memfd") else Channel(kind)
