"""The calls that Python does not have: tee, vmsplice, mlock, and what sockets and pipes tell.

Every call raises OSError with the kernel's errno. splice and sendfile are os.splice and os.sendfile.
"""

from __future__ import annotations

import array
import ctypes
import dataclasses
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PAGESIZE, mmap

NONBLOCK = os.SPLICE_F_NONBLOCK
MORE = os.SPLICE_F_MORE

SIOCOUTQ = termios.TIOCOUTQ  # the same number under two names: linux/sockios.h
SIOCOUTQNSD = 0x894B  # linux/sockios.h: bytes that have never been sent

Span = tuple[int, int]  # address and length in bytes

_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
_libc.tee.restype = ctypes.c_ssize_t
_libc.vmsplice.argtypes = (ctypes.c_int, ctypes.POINTER(_IoVec), ctypes.c_size_t, ctypes.c_uint)
_libc.vmsplice.restype = ctypes.c_ssize_t
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def tee(source: int, target: int, count: int, flags: int = NONBLOCK) -> int:
    """Duplicates up to `count` bytes from the head of pipe `source` into pipe `target`; returns how many."""
    return _checked(_libc.tee(source, target, count, flags), "tee")


def vmsplice(pipe: int, spans: Sequence[Span], flags: int = NONBLOCK) -> int:
    """Lends the memory at `spans` to `pipe`; returns how many bytes went in. The memory must stay mapped."""
    vector = (_IoVec * len(spans))(*(_IoVec(*span) for span in spans))
    return _checked(_libc.vmsplice(pipe, vector, len(spans), flags), "vmsplice")


def mlock(span: Span) -> None:
    """Locks the pages of `span` into RAM."""
    _checked(_libc.mlock(*span), "mlock")


class Memory(mmap):
    """Anonymous memory with an address: private unless `shared`. Sizes in pages."""

    def __new__(cls, pages: int, *, shared: bool = False) -> Memory:
        kind = MAP_SHARED if shared else MAP_PRIVATE
        return super().__new__(cls, -1, pages * PAGESIZE, flags=kind | MAP_ANONYMOUS)

    @property
    def address(self) -> int:
        """Where the memory starts."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self))

    def span(self, start: int = 0, length: int | None = None) -> Span:
        """`length` bytes (default: all that follow) from `start`, as vmsplice wants them."""
        return self.address + start, len(self) - start if length is None else length


def _asked(fd: int, request: int) -> int:
    answer = array.array("i", [0])
    fcntl.ioctl(fd, request, answer)
    return answer[0]


def readable(fd: int | socket.socket) -> int:
    """FIONREAD: bytes that wait in a pipe or in a socket's receive queue."""
    return _asked(fd if isinstance(fd, int) else fd.fileno(), termios.FIONREAD)


def unacknowledged(sock: socket.socket) -> int:
    """SIOCOUTQ: on tcp bytes (and the FIN as one) the peer's kernel has not acknowledged, on unix memory."""
    return _asked(sock.fileno(), SIOCOUTQ)


def unsent(sock: socket.socket) -> int:
    """SIOCOUTQNSD: bytes that the kernel still holds back from the wire."""
    return _asked(sock.fileno(), SIOCOUTQNSD)


def capacity(pipe: int) -> int:
    """F_GETPIPE_SZ in bytes; divided by the page size it is the number of slots."""
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


def slots(pipe: int) -> int:
    """How many segments the pipe holds, whatever their size."""
    return capacity(pipe) // PAGESIZE


@dataclasses.dataclass(frozen=True)
class TcpInfo:
    """The first fields of TCP_INFO."""

    state: int
    retransmits: int
    probes: int
    unacked: int


def tcp_info(sock: socket.socket) -> TcpInfo:
    """What the kernel knows of a tcp connection; `state` is TCP_ESTABLISHED = 1, TCP_CLOSE = 7 and so on."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    state, _, retransmits, probes = struct.unpack_from("4B", raw)
    (unacked,) = struct.unpack_from("I", raw, 24)
    return TcpInfo(state, retransmits, probes, unacked)
