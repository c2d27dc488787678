"""Memory that relay owns and can lend to a pipe.

Facts (man 2 vmsplice, mremap; measured, see docs/kernel-facts.md):
- vmsplice(2) puts references to pages into a pipe. They stay in use after the pipe is empty, until the last
  reader has read them: in a socket's queue, after the acknowledgement, in another process's pipe. Writing to
  a lent page changes what those readers will see, and nothing tells when they are done.
- A page that a pipe refers to and nobody maps any more belongs to its readers for good.
- mremap(2) can take pages away from under their addresses at one instant (memory.c). Whoever still has such
  an address, through a view, a raw pointer, another thread or a call under way, reads zeros there and
  writes to fresh pages.
- After a fork parent and child share pages until one of them writes, who then gets a page of his own, since
  the reference in the pipe counts as another user.
- A mapping with exported buffers refuses to be resized (CPython, Modules/mmapmodule.c).
- Untouched anonymous memory lends the zero page, which nobody can write to either.

So: written, cut, lent, never written again. The first `lend` after something was written makes the *cut*: it
takes the written pages to a read-only mapping that nobody outside has ever seen, and lends from there. The
arena's own addresses have fresh, empty pages from then on. That views are gone is checked first, because a
view that is still there is a mistake; the reader's bytes do not depend on it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from relay.errors import KernelError, RelayBug
from relay.kernel import core
from relay.kernel.pipe import Pipe

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE = mmap.PAGESIZE
HUGE_PAGE: Final = 2 << 20
PIECES: Final = 1024  # of one vmsplice (IOV_MAX)

# What sandboxes and kernels without vmsplice answer: copying may take over.
REFUSED: Final = (errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def whole_pages(size: int, page: int = PAGE) -> int:
    """`size` rounded up to whole pages, at least one."""
    return max(1, -(-size // page)) * page


def in_use(memory: mmap.mmap) -> bool:
    """Whether a buffer of `memory` is exported: a memoryview, an array, a call under way in another thread."""
    try:
        memory.resize(-1)  # never a size: what is asked is which objection comes first
    except BufferError:
        return True
    except (ValueError, TypeError):
        return False
    raise RelayBug("a mapping was resized to -1 bytes")


def _private(size: int, *, final: bool = False) -> mmap.mmap:
    protection = mmap.PROT_READ | (0 if final else mmap.PROT_WRITE)
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection)
    except OSError as error:
        raise KernelError(
            f"mmap of {size} bytes: {error.strerror}", hint="a smaller arena needs less, or raise ulimit -v"
        ) from error


class Arena:
    """Private memory whose pages are lent to pipes; what was lent cannot be changed by anybody.

    `Arena(size)` has room for `size` bytes: `empty` gives arrays in it, `view` memoryviews, `write` copies a
    buffer into it. `lend` then lends what was made, in the order it was made, and the room is fresh again:
    an arena is used over and over. `Arena(content)` copies `content` in at birth and is *frozen*: it holds
    just that, and may lend it any number of times (`rewind`).

    `huge` asks for huge pages, which make lending large pieces faster, and rounds to 2 MiB. `lent` counts
    bytes lent since the beginning or `rewind`; `size` is in bytes. One thread at a time may call `empty`,
    `view`, `write`, `lend`; a lock sees to it. `close` gives everything back, pages lent before live on
    with whoever holds them; a `with` block closes.
    """

    __slots__ = (
        "_final",
        "_frozen",
        "_lock",
        "_map",
        "_page",
        "_pieces",
        "_pointer",
        "_used",
        "lent",
        "size",
    )

    def __init__(self, content: Buffer | int, *, huge: bool = False) -> None:
        view = None if isinstance(content, int) else memoryview(content).cast("B")
        self.size: int = content if isinstance(content, int) else len(view or b"")
        if self.size < 0:
            raise ValueError(f"an arena of {self.size} bytes: the size cannot be negative")
        self.lent = 0
        self._page = HUGE_PAGE if huge else PAGE
        self._used = 0  # from the start of _map, whole pages
        self._pieces: deque[tuple[int, int]] = deque()  # offset and length of what is made and not lent
        self._frozen = False
        self._final: mmap.mmap | None = None  # after the cut: what is lent from
        self._pointer: core.Struct = None  # the address of _final
        self._lock = threading.RLock()
        self._map: mmap.mmap | None = _private(whole_pages(self.size, self._page))
        if huge:
            self._advise(self._map)
        if view is not None:
            self._map[: self.size] = view
            if self.size:
                self._pieces.append((0, self.size))
            self._used = whole_pages(self.size, self._page)
            self._cut()
            self._frozen = True
            self._map.close()
            self._map = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- filling it

    @property
    def room(self) -> int:
        """Bytes that can still be made before the next cut; every piece takes whole pages."""
        return 0 if self._frozen else max(0, self.size - self._used)

    @property
    def waiting(self) -> int:
        """Bytes that were made or begun to be lent, and are not lent yet."""
        return sum(length for _offset, length in self._pieces)

    def view(self, size: int) -> memoryview:
        """A writable view of `size` zeroed bytes, lent as one piece; page-aligned.

        Raises BufferError where an earlier cut is still being lent, or there is not so much room.
        """
        with self._lock:
            memory = self._open()
            if size < 0:
                raise ValueError(f"a view of {size} bytes: the size cannot be negative")
            if self._final is not None:
                raise BufferError(
                    f"{self.waiting} bytes of the arena are still to be lent: lend them before making more"
                )
            if size > self.room:
                raise BufferError(
                    f"{size} bytes do not fit into the {self.room} that are left of an arena of {self.size}: "
                    "lend what is there, or make a larger arena"
                )
            start = self._used
            self._used += whole_pages(size) if size else 0
            if size:
                self._pieces.append((start, size))
            return memoryview(memory)[start : start + size]

    def empty(self, shape: int | tuple[int, ...], dtype: Any = "uint8") -> Any:
        """A C-ordered NumPy array of `shape` and `dtype` in the arena's memory, zeroed; lent as one piece.

        Needs NumPy, which is loaded here and nowhere else; `view` does without. Drop the array and whatever
        was made from it before `lend`. Raises BufferError as `view` does, TypeError for Python objects.
        """
        import numpy

        kind = numpy.dtype(dtype)
        if kind.hasobject:
            raise TypeError(f"{kind} holds Python objects: addresses mean nothing to whoever reads them")
        sides = (shape,) if isinstance(shape, int) else tuple(shape)
        size = kind.itemsize
        for side in sides:
            size *= side
        if not size:
            return numpy.empty(sides, kind)
        return numpy.frombuffer(self.view(size), kind).reshape(sides)

    def write(self, content: Buffer) -> int:
        """Copies `content`, any C-contiguous buffer, in as one piece; returns its bytes."""
        with memoryview(content) as source, source.cast("B") as flat, self.view(len(flat)) as room:
            room[:] = flat
            return len(flat)

    # -- lending it

    def lend(self, pipe: Pipe | int, *, copy: bool = True) -> int:
        """Lends what waits to `pipe` (or the descriptor of its write end), as far as it has slots for.

        Returns the bytes; 0 when nothing waits. Call it again for the rest, until `waiting` is 0. Never
        waits: raises BlockingIOError when the pipe takes nothing now. Raises BufferError while views of what
        was made exist: nothing is lent then, and the arena is as before. Where the kernel or a sandbox
        refuses to lend, the same bytes are written to the pipe instead, unless `copy` is False: then OSError.
        """
        fd = pipe if isinstance(pipe, int) else pipe.write_fd
        moved = 0
        with self._lock:
            if self._final is None:
                self._open()
                if not self._pieces:
                    return 0
                self._cut()
            while self._pieces:
                answer = self._lend_some(fd, copy=copy)
                if answer < 0:
                    if moved and -answer == errno.EAGAIN:
                        break
                    raise OSError(-answer, f"vmsplice: {os.strerror(-answer)}")
                moved += answer
                self._take(answer)
            self.lent += moved
            if not self._pieces and not self._frozen:
                self._drop_final()
        return moved

    def rewind(self) -> None:
        """Makes a frozen arena lend its content once more from the beginning."""
        if not self._frozen:
            raise RelayBug("only a frozen arena can lend its content twice")
        with self._lock:
            self._pieces.clear()
            if self.size:
                self._pieces.append((0, self.size))
            self.lent = 0

    def pointer(self) -> core.Struct:
        """The address of a frozen arena's first byte, for C to lend from; valid until close."""
        if not self._frozen or self._final is None:
            raise RelayBug("an arena was used after it was closed, or is not frozen")
        return self._pointer

    def close(self) -> None:
        """Unmaps the memory; lent pages stay with their readers. Safe to call again.

        Raises BufferError while views exist; the arena lends no more all the same.
        """
        with self._lock:
            self._pieces.clear()
            self._drop_final()
            memory, self._map = self._map, None
            if memory is not None:
                memory.close()

    # -- inside

    def _open(self) -> mmap.mmap:
        if self._frozen:
            raise BufferError("the arena is frozen: it was filled at birth and only lends")
        if self._map is None:
            raise ValueError("the arena is closed")
        return self._map

    def _cut(self) -> None:
        """What was made is final from here on, and the arena's own pages are fresh."""
        memory = self._open()
        if in_use(memory):
            raise BufferError(
                f"views of an arena's memory exist, so its {self.waiting} bytes are not lent: "
                "drop the arrays and memoryviews made from it first (del, or memoryview.release)"
            )
        final = _private(whole_pages(self._used, self._page), final=True)
        with core.ffi.from_buffer("char[]", memory) as source:
            pointer = core.ffi.from_buffer("char[]", final)
            answer = int(core.lib.relay_cut(source, pointer, len(final), 0))
            if answer < 0:  # a kernel before 5.7, a sandbox that does not know the flag: one copy more
                core.ffi.release(pointer)
                final.close()
                final = _private(len(memory))
                final[: self._used] = memoryview(memory)[: self._used]
                pointer = core.ffi.from_buffer("char[]", final)
        if answer < 0:
            size = len(memory)
            memory.close()
            self._map = memory = _private(size)
        if self._page == HUGE_PAGE:
            self._advise(memory)
        self._final, self._pointer, self._used = final, pointer, 0

    def _lend_some(self, fd: int, *, copy: bool) -> int:
        """Bytes lent or written by one call, or -errno."""
        flat: list[int] = []
        for piece in self._pieces:
            flat += piece
            if len(flat) == 2 * PIECES:
                break
        answer = int(core.lib.relay_lend_pieces(fd, self._pointer, flat, len(flat) // 2))
        if not copy or -answer not in REFUSED or self._final is None:
            return answer
        offset, length = self._pieces[0]
        try:
            with memoryview(self._final) as whole, whole[offset : offset + length] as piece_view:
                return write_now(fd, piece_view)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _take(self, count: int) -> None:
        """`count` bytes are lent: the pieces before them are done."""
        while count:
            offset, length = self._pieces.popleft()
            if length > count:
                self._pieces.appendleft((offset + count, length - count))
                return
            count -= length

    def _drop_final(self) -> None:
        if self._final is not None:
            core.ffi.release(self._pointer)
            self._final.close()
            self._final = self._pointer = None

    @staticmethod
    def _advise(memory: mmap.mmap) -> None:
        with contextlib.suppress(OSError):  # a kernel without huge pages lends small ones
            memory.madvise(mmap.MADV_HUGEPAGE)


def write_now(fd: int, content: memoryview) -> int:
    """As os.write into a pipe, with BlockingIOError where it would wait, whatever the descriptor's flags say."""
    try:
        return os.pwritev(fd, [content], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE):
            raise
    return os.write(fd, content)


class MappedFile:
    """A file's pages mapped for lending; nobody in this process writes to them.

    Another process that writes to the file changes what readers of lent pages see, as with sendfile. `fd` is
    borrowed for the call only; `close` unmaps.
    """

    __slots__ = ("_map", "_pointer")

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        self._pointer = core.ffi.from_buffer("char[]", self._map)

    def pointer(self) -> core.Struct:
        """The address of the file's first byte; valid until close."""
        return self._pointer

    def close(self) -> None:
        """Unmaps the file; lent pages stay with their readers."""
        core.ffi.release(self._pointer)
        self._map.close()
