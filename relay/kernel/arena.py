"""Memory that relay owns and can lend to a pipe.

Facts (man 2 vmsplice; measured, see docs/kernel-facts.md):
- vmsplice(2) puts references to pages into a pipe. They stay in use after the pipe is empty, until the last
  reader has read them: in a socket's queue, after the acknowledgement, in another process's pipe. Writing to
  a lent page changes what those readers will see, and nothing tells when they are done.
- munmap, or MADV_DONTNEED on private anonymous memory, leaves the lent pages to their readers and gives the
  owner none or fresh ones.
- Untouched anonymous memory lends the zero page: write first, then lend.

So: written once, lent, never written again. `lend` is the only use of vmsplice in the program besides the
C pump's, which lends what an Arena gave it.
"""

from __future__ import annotations

import mmap
import os

from relay.errors import RelayBug
from relay.kernel import core
from relay.kernel.pipe import Pipe

PAGE = mmap.PAGESIZE


class Arena:
    """Private anonymous pages holding `content`, filled once at birth and never written again.

    `size` is in bytes. The arena owns the mapping; `close` unmaps it, and pages lent before live on with
    whoever holds them.
    """

    __slots__ = ("_map", "_pointer", "lent", "size")

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.lent = 0
        self._map: mmap.mmap | None = mmap.mmap(
            -1, max(self.size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._map[: self.size] = content
        self._pointer = core.ffi.from_buffer("char[]", self._map)

    def pointer(self) -> core.Struct:
        """The address of the first byte, for C to lend from; valid until close."""
        if self._map is None:
            raise RelayBug("an arena was used after it was closed")
        return self._pointer

    def lend(self, pipe: Pipe) -> int:
        """Lends what was not lent yet to `pipe`, as much as it has slots for; returns the bytes.

        Raises BlockingIOError when the pipe is full, OSError when a sandbox forbids vmsplice.
        """
        if self.lent == self.size:
            return 0
        answer = int(core.lib.relay_lend(pipe.write_fd, self.pointer() + self.lent, self.size - self.lent))
        if answer < 0:
            raise OSError(-answer, f"vmsplice: {os.strerror(-answer)}")
        self.lent += answer
        return answer

    def close(self) -> None:
        """Unmaps the memory; lent pages stay with their readers. Safe to call again."""
        if self._map is not None:
            core.ffi.release(self._pointer)
            self._map.close()
            self._map = None


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
