"""What is said on the unix socket beside the memory itself.

Facts (man 7 unix, man 3 cmsg; net/unix/af_unix.c):
- Descriptors travel as ancillary data (SCM_RIGHTS). A receiver without room for them, or at its limit of open
  files, gets fewer and MSG_CTRUNC; the kernel closes the rest.
- On a stream socket one small sendmsg arrives whole, and a read never goes past a message that carries
  descriptors into the next.

So: every message to a receiver is a header of one size. One that comes in pieces was not sent by relay and is
refused at once, so nobody is kept waiting for the rest of it. Whatever descriptors came with a message that
is refused are closed. Every number is checked here before anybody uses it.

    magic 4s | kind u8 | dimensions u8 | dtype's length u16 | size u64 | slot u32 | turn u32 | dtype 32s |
    shape 32 x u64                                                                     all little-endian

kind 1: `size` bytes to keep, with a memfd. 2: a ring of `slot` slots of `size` bytes each, with a memfd.
3: a block of `size` bytes in slot `slot`, the `turn`th of all. 4: the end of the blocks.
5: as 3, in a memfd of its own that is final; `slot` is NO_SLOT.
Back comes `slot u32 | turn u32` for each block.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from relay.errors import ShareError
from relay.sharing.content import LARGEST, LONGEST_DTYPE, MOST_DIMENSIONS, Content

MAGIC: Final = b"RLY1"
KEEP, RING, BLOCK, END, FINAL = 1, 2, 3, 4, 5
WITH_MEMORY: Final = (KEEP, RING, FINAL)  # a memfd comes along
NO_SLOT: Final = 0xFFFFFFFF
MOST_SLOTS: Final = 128

_FIXED: Final = struct.Struct(f"<4sBBHQII{LONGEST_DTYPE}s")
HEADER: Final = _FIXED.size + 8 * MOST_DIMENSIONS
RETURN: Final = struct.Struct("<II")

_ANCILLARY: Final = socket.CMSG_SPACE(16 * 4)
_SCM_PIDFD: Final = 4  # a descriptor too, for sockets that asked for it


@dataclass(frozen=True)
class Header:
    """One message to a receiver. A ring's content is of no meaning."""

    kind: int
    size: int
    content: Content
    slot: int = 0
    turn: int = 0

    def pack(self) -> bytes:
        """The message."""
        dimensions, dtype, shape = _packed(self.content)
        return (
            _FIXED.pack(MAGIC, self.kind, dimensions, len(dtype), self.size, self.slot, self.turn, dtype)
            + shape
        )


@lru_cache(64)
def _packed(content: Content) -> tuple[int, bytes, bytes]:
    shape = struct.pack(f"<{len(content.shape)}Q", *content.shape).ljust(8 * MOST_DIMENSIONS, b"\0")
    return len(content.shape), content.dtype.encode("ascii"), shape


ANY: Final = Content("|u1", ())


@lru_cache(64)  # most streams say the same every time
def _content(dtype: bytes, shape: bytes) -> Content:
    return Content(dtype.decode("ascii", "replace"), struct.unpack(f"<{len(shape) // 8}Q", shape))


def parse(raw: bytes) -> Header:
    """The header in `raw`; ShareError for anything that relay would not have sent."""
    if len(raw) != HEADER:
        raise ShareError(f"a message of {len(raw)} bytes instead of {HEADER}")
    magic, kind, dimensions, length, size, slot, turn, dtype = _FIXED.unpack_from(raw)
    if magic != MAGIC:
        raise ShareError(f"a message that begins with {magic!r} instead of {MAGIC!r}")
    if kind not in (KEEP, RING, BLOCK, END, FINAL):
        raise ShareError(f"a message of the unknown kind {kind}")
    if dimensions > MOST_DIMENSIONS or length > LONGEST_DTYPE or size > LARGEST:
        raise ShareError("a message with more dimensions, a longer dtype or more bytes than there can be")
    if kind in (RING, END):
        return Header(kind, size, ANY, slot, turn)
    shape = struct.unpack_from(f"<{dimensions}Q", raw, _FIXED.size)
    content = Content(dtype[:length].decode("ascii", "replace"), shape)
    if content.size != size:
        raise ShareError(
            f"{content.dtype} of shape {shape} takes {content.size} bytes, {size} were announced"
        )
    return Header(kind, size, content, slot, turn)


def send(sock: socket.socket, header: Header, fd: int = -1) -> None:
    """Sends `header`, with the descriptor `fd` if there is one. OSError as from the socket."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))] if fd >= 0 else []
    sent = sock.sendmsg([header.pack()], ancillary, socket.MSG_NOSIGNAL)
    if sent != HEADER:
        raise ShareError(
            f"the socket took {sent} of the {HEADER} bytes of a message", hint="make its send buffer larger"
        )


def receive(sock: socket.socket) -> tuple[Header, int] | None:
    """The next header and the descriptor that came with it (-1: none), which the caller closes.

    None at the end of the stream. ShareError when it is not to be trusted: close the connection then.
    OSError as from the socket: it waits as long as the socket's timeout says.
    """
    raw, ancillary, flags, _address = sock.recvmsg(HEADER, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    found = _descriptors(ancillary)
    try:
        if not raw and not found:
            return None
        if flags & socket.MSG_CTRUNC:
            raise ShareError(
                "descriptors were lost on the way",
                hint="only one may come at a time; if it did, raise the limit of open files (ulimit -n)",
            )
        if flags & socket.MSG_TRUNC:
            raise ShareError(f"a message longer than {HEADER} bytes")
        header = parse(raw)
        wanted = 1 if header.kind in WITH_MEMORY else 0
        if len(found) != wanted:
            raise ShareError(f"{len(found)} descriptors came with a message that has {wanted}")
        return header, found.pop() if found else -1
    finally:
        for fd in found:
            os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind in (socket.SCM_RIGHTS, _SCM_PIDFD):
            found += [number for (number,) in struct.iter_unpack("i", data[: len(data) // 4 * 4])]
    return found


def unix_only(sock: socket.socket) -> None:
    """ValueError unless descriptors can travel through `sock`."""
    if sock.family != socket.AF_UNIX or sock.type not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        raise ValueError(f"memory is handed over through a unix stream socket, not through {sock}")
