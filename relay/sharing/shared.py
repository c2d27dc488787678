"""Memory that is final, and that any number of processes map.

`share` copies a buffer into a memfd once and seals it, a `Draft` is filled in place and then sealed;
`Shared.send` hands the same pages to another process, which maps them read-only. Nobody, its maker included, can
change a byte of it any more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from relay.errors import KernelError, ShareError
from relay.kernel import memfd
from relay.sharing import wire
from relay.sharing.content import Content, Described, content_of, describe

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_BYTES: Final = 1 << 30  # what a receiver takes unless told otherwise


class Shared(Described, mmap.mmap):
    """Final bytes in pages that other processes share: made by `share`, or by `Shared.receive`.

    It is a read-only buffer of bytes (`memoryview(shared)`, `bytes(shared)`, `shared[10:20]`, `len(shared)`);
    `array` gives it its `dtype` and `shape`. It owns the mapping and one descriptor until `close`, which
    raises BufferError while views exist; a `with` block closes. It is never empty.
    """

    _fd = -1
    content: Content

    def __new__(cls, fd: int, content: Content) -> Shared:
        """Maps the memfd `fd`, sealed for good, and takes it over; it is closed if this fails."""
        try:
            self = super().__new__(
                cls, -1, content.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
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

    def __del__(self) -> None:
        self._close_fd()

    def __exit__(self, *error: object) -> None:
        self.close()

    def array(self) -> Any:
        """A read-only NumPy array over the shared pages, without a copy. Needs NumPy; memoryview does not."""
        return self.content.array(self, final=True)

    def fileno(self) -> int:
        """The memfd, still owned by this object; ValueError after close."""
        if self._fd < 0:
            raise ValueError("the shared memory is closed")
        return self._fd

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
        super().close()
        self._close_fd()

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def share(buffer: Buffer) -> Shared:
    """Copies `buffer` once, into memory that is then final and that other processes can map.

    `buffer` is anything with bytes: bytes, a NumPy array, a memoryview; dtype and shape travel along. It is
    always copied, since its owner could go on writing to it: a `Draft` is made in place instead. ValueError
    for an empty buffer, which cannot be mapped; TypeError for Python objects and structured dtypes;
    KernelError when memory or descriptors run out.
    """
    content, flat = describe(buffer)
    if not flat:
        raise ValueError("an empty buffer cannot be shared: there is no page to map")
    fd = memfd.make("relay-shared")
    try:
        memfd.fill(fd, flat)
        memfd.seal(fd, memfd.SIZE | memfd.WRITE | memfd.SEAL)
    except BaseException:
        os.close(fd)
        raise
    return Shared(fd, content)


class Draft:
    """Zeroed memory for one array, to be filled in place and then shared without a copy.

    `array` (NumPy) and `view` (a memoryview of bytes) write to it; drop them, and `share` makes it final.
    `shape` and `dtype` are NumPy's. It owns a mapping and a descriptor until `share` or `close`.
    """

    def __init__(self, shape: int | tuple[int, ...], dtype: Any = "|u1") -> None:
        self.content = content_of(shape, dtype)
        if not self.content.size:
            raise ValueError("an empty array cannot be shared: there is no page to map")
        self._fd = memfd.make("relay-shared")
        try:
            os.ftruncate(self._fd, self.content.size)
            self._map = mmap.mmap(-1, self.content.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memfd.place(self._map, self._fd, writable=True)
            memfd.advise(self._map)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def array(self) -> Any:
        """A writable NumPy array over the memory. Needs NumPy; `view` does not."""
        import numpy

        return numpy.frombuffer(self.view(), self.content.dtype).reshape(self.content.shape)

    def view(self) -> memoryview:
        """The memory as writable bytes; ValueError once it is shared or closed."""
        return memoryview(self._map)

    def share(self) -> Shared:
        """Makes it final: from here on it is only read, by whoever is given it.

        BufferError while arrays or memoryviews of it exist; KernelError (EBUSY) where a process that was
        forked since still has the memory mapped and could write to it. The draft is as before after an error.
        """
        if self._fd < 0:
            raise ValueError("the draft is closed, or shared already")
        size = self.content.size
        try:
            self._map.close()
        except BufferError as error:
            raise BufferError(
                "arrays or memoryviews of the draft exist: drop them before it is shared"
            ) from error
        try:
            if os.fstat(self._fd).st_blocks * 512 < size:  # pages that nobody wrote to
                memfd.reserve(self._fd, size)
            memfd.seal(self._fd, memfd.SIZE | memfd.WRITE | memfd.SEAL)
        except BaseException:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memfd.place(self._map, self._fd, writable=True)
            raise
        fd, self._fd = self._fd, -1
        return Shared(fd, self.content)

    def close(self) -> None:
        """Gives the memory back unless it was shared. BufferError while views exist. Safe to call again."""
        self._map.close()
        self.__del__()
