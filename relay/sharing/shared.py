"""Memory that is final, and that any number of processes map.

`share` seals the pages of an array that was made for it (relay.sharing.draft), and copies any other buffer into a memfd
once; `Shared.send` hands the same pages to another process, which maps them read-only. Nobody, its maker included, can
change a byte of it any more.
"""

from __future__ import annotations

import mmap
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from relay.errors import KernelError, ShareError
from relay.kernel import memfd
from relay.sharing import wire
from relay.sharing.content import Content, Described, describe
from relay.sharing.held import Held
from relay.sharing.pages import settled

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_BYTES: Final = 1 << 30  # what a receiver takes unless told otherwise


class Shared(Described, Held, mmap.mmap):
    """Final bytes in pages that other processes share: made by `share`, or by `Shared.receive`.

    It is a read-only buffer of bytes (`memoryview(shared)`, `bytes(shared)`, `shared[10:20]`, `len(shared)`);
    `array` gives it its `dtype` and `shape`. It owns the mapping and one descriptor until `close`, which
    raises BufferError while views exist; a `with` block closes. It is never empty.
    """

    content: Content

    def __new__(cls, fd: int, content: Content) -> Shared:
        """Maps the memfd `fd`, sealed for good, and takes it over; it is closed if this fails."""
        try:
            self = memfd.aligned(
                lambda: super(Shared, cls).__new__(
                    cls, -1, content.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
                )
            )
            memfd.place(self, fd)
        except OSError as error:
            os.close(fd)
            raise KernelError(
                f"mmap of {content.size} bytes: {error.strerror}",
                hint="raise the limit of memory (ulimit -v)",
            ) from error
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.content = content
        return self

    def array(self) -> Any:
        """A read-only NumPy array over the shared pages, without a copy. Needs NumPy; memoryview does not."""
        return self.content.array(self, final=True)

    def send(self, sock: socket.socket) -> None:
        """Hands it to whoever is at the other end of the unix socket `sock`; any number of times, to anybody.

        The pages live on at the other end, whatever happens here. Waits, or not, as the socket is set up;
        OSError as from any send. After ShareError or a timeout the connection is of no more use.
        """
        wire.unix_only(sock)
        wire.send(sock, wire.Header(wire.KEEP, len(self), self.content), self.fileno())

    @classmethod
    def receive(cls, sock: socket.socket, *, max_bytes: int = MAX_BYTES) -> Shared | None:
        """What was sent last through the unix socket `sock`, mapped read-only; None at the end of the stream.

        Trusts nothing: raises ShareError, with every descriptor closed, unless what came is a memfd of the
        announced size, of `max_bytes` at most, sealed for good, with all its pages there. A hostile sender
        can then neither change it nor make reading it fault, nor take memory for it from this process.
        Waits, or not, as the socket is set up. Close the connection after an error.
        """
        wire.unix_only(sock)
        message = wire.receive(sock)
        if message is None:
            return None
        header, fd = message
        try:
            if header.kind != wire.KEEP:
                raise ShareError("a stream of blocks came", hint="receive it with relay.ShareSource")
            if not 0 < header.size <= max_bytes:
                raise ShareError(
                    f"{header.size} bytes were announced, between 1 and {max_bytes} are taken",
                    hint="raise max_bytes if that is right",
                )
            memfd.judge(fd, header.size, memfd.WRITE)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return cls(fd, header.content)

    def close(self) -> None:
        """Unmaps it here and closes the descriptor; the others keep theirs. BufferError while views exist."""
        mmap.mmap.close(self)
        self._drop()


def share(buffer: Buffer) -> Shared:
    """The bytes of `buffer`, final, in memory that other processes can map.

    `buffer` is anything with bytes: bytes, a NumPy array, a memoryview; dtype and shape travel along. What becomes of
    it afterwards is its owner's affair and seen by nobody else. It is copied once, unless it is the whole of an array
    by `relay.empty`, whose own pages are taken: each of them is copied when its owner next writes to it. ValueError for
    an empty buffer, which cannot be mapped; TypeError for Python objects and structured dtypes; KernelError when memory
    or descriptors run out.
    """
    content, flat = describe(buffer)
    if not flat:
        raise ValueError("an empty buffer cannot be shared: there is no page to map")
    fd = settled(flat)
    if fd >= 0:
        return Shared(fd, content)
    fd = memfd.make("relay-shared")
    try:
        memfd.fill(fd, flat)
        memfd.seal(fd, memfd.FINAL)
    except BaseException:
        os.close(fd)
        raise
    return Shared(fd, content)
