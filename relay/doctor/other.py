"""Another process, with memory of its own, that takes bytes in and says later what it has there.

Facts (man 2 vmsplice): on the read end of a pipe vmsplice goes the other way, out of the pipe into memory; it copies.
A child made by fork shares nothing that it wrote to since: its memory is mapped after the fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import socket
import struct
from types import TracebackType
from typing import Final

from relay.doctor.ends import AFTER, BEFORE, piece
from relay.errors import KernelError
from relay.kernel import core

READ: Final = b"r"
VMSPLICE: Final = b"v"
MAP: Final = b"m"
LOOK: Final = b"l"
WHERE: Final = b"w"
CHANGE: Final = b"c"
PATIENCE: Final = 10.0  # seconds for an answer


class Landing:
    """Memory where bytes land; or, after `take(MAP)`, a map of what was handed over. Owns its maps."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, piece(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map[:] = bytes(piece())
        self._mapped: mmap.mmap | None = None

    def take(self, way: bytes, fd: int) -> None:
        """Takes one piece from `fd` by that way. Raises OSError."""
        if way == MAP:
            self.release()
            self._mapped = mmap.mmap(fd, piece(), flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            return
        at = 0
        pointer = core.ffi.from_buffer("char[]", self._map)
        try:
            while at < piece():
                if way == VMSPLICE:
                    got = int(core.lib.relay_lend(fd, pointer + at, piece() - at))
                else:
                    got = _read(fd, memoryview(self._map)[at:])
                if got == -errno.EAGAIN:
                    _wait(fd)
                elif got <= 0:
                    raise OSError(-got or errno.EIO, os.strerror(-got or errno.EIO))
                else:
                    at += got
        finally:
            core.ffi.release(pointer)

    def touch(self) -> int:
        """Reads a byte of each page."""
        memory = self._mapped or self._map
        return sum(memory[:: mmap.PAGESIZE])

    def look(self) -> bytes:
        """What is there now."""
        return bytes((self._mapped or self._map)[: piece()])

    def write(self, byte: bytes) -> int:
        """The memory becomes that byte; its address."""
        self._map[:] = byte * piece()
        with core.ffi.from_buffer("char[]", self._map) as pointer:
            return int(core.ffi.cast("uintptr_t", pointer))

    def release(self) -> None:
        """Unmaps what was handed over."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    def close(self) -> None:
        """Unmaps everything."""
        self.release()
        self._map.close()


def _read(fd: int, into: memoryview) -> int:
    try:
        return os.readv(fd, [into])
    except OSError as error:
        return -(error.errno or errno.EIO)
    finally:
        into.release()


def _wait(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class Other:
    """A child with a Landing; `with` reaps it. The process must have no other threads when it is made."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(PATIENCE)
        self._pid = os.fork()
        if self._pid == 0:
            self._ours.close()
            _serve(theirs)  # never returns
        theirs.close()

    def __enter__(self) -> Other:
        return self

    def take(self, way: bytes, fd: int) -> None:
        """The child takes one piece from `fd`, or maps it, and has done so on return. Raises OSError as there."""
        socket.send_fds(self._ours, [way], [fd])
        (code,) = struct.unpack("i", self._answer(4))
        if code:
            raise OSError(code, os.strerror(code))

    def look(self) -> bytes:
        """What the child finds in its memory now."""
        self._ours.sendall(LOOK)
        return self._answer(piece())

    def address(self) -> int:
        """Where in the child's memory a piece of the old bytes is."""
        self._ours.sendall(WHERE)
        (address,) = struct.unpack("Q", self._answer(8))
        return int(address)

    def change(self) -> None:
        """From now on there are other bytes."""
        self._ours.sendall(CHANGE)
        self._answer(1)

    def read(self, address: int, into: core.Struct, size: int) -> None:
        """A piece straight out of the child's memory. Raises OSError."""
        near, far = _IoVec(int(core.ffi.cast("uintptr_t", into)), size), _IoVec(address, size)
        got = _libc.process_vm_readv(self._pid, ctypes.byref(near), 1, ctypes.byref(far), 1, 0)
        if got != size:
            code = ctypes.get_errno() if got < 0 else errno.EIO
            raise OSError(code, os.strerror(code))

    def _answer(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            piece = self._ours.recv(size - len(got))
            if not piece:
                raise KernelError("the other process ended early")
            got += piece
        return got

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()  # which is the end of what it is asked
        os.waitpid(self._pid, 0)


def _serve(asked: socket.socket) -> None:
    """The child's whole life."""
    code = 1
    try:
        landing = Landing()
        while True:
            word, fds, _flags, _address = socket.recv_fds(asked, 1, 1)
            if not word:
                break
            if word == LOOK:
                asked.sendall(landing.look())
                continue
            if word == WHERE:
                asked.sendall(struct.pack("Q", landing.write(BEFORE)))
                continue
            if word == CHANGE:
                landing.write(AFTER)
                asked.sendall(word)
                continue
            failed = 0
            try:
                landing.take(word, fds[0])
            except OSError as error:
                failed = error.errno or errno.EIO
            finally:
                with contextlib.suppress(OSError):
                    os.close(fds[0])
            asked.sendall(struct.pack("i", failed))
        code = 0
    finally:
        os._exit(code)
