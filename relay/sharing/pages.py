"""Memory that arrays are made in and that is final later, without a copy.

While it is written to, it is the pages of a memfd that nobody but this process has mapped. To become final it is
sealed, and a seal against writing wants every writable mapping gone. So the mapping is exchanged, at one instant for
all threads, for one at the same address that shows the same pages and copies a page when it is written to: arrays that
are still there stay their owner's to read and to write, and nobody else sees a thing of that.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Final

from relay.errors import KernelError
from relay.kernel import memfd
from relay.kernel.arena import in_use
from relay.sharing.held import Held


class Pages(Held, mmap.mmap):
    """Zeroed bytes that can become final: writable, of huge pages where the system gives them.

    Owns the mapping, and the descriptor of the memfd until `settle` or `close`. KernelError when memory or descriptors
    run out.
    """

    def __new__(cls, size: int) -> Pages:
        """`size` bytes, at least one."""
        fd = memfd.make("relay-shared")
        try:
            memfd.resize(fd, size)
            try:
                self = memfd.aligned(
                    lambda: super(Pages, cls).__new__(
                        cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                    )
                )
            except OSError as error:
                raise memfd.out_of_memory(size, error) from error
            memfd.place(self, fd, writable=True)
            memfd.enlarge(self, fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _PAGES[memfd.address(self)] = self
        return self

    @property
    def settled(self) -> bool:
        """Whether they are final, or closed."""
        return self._fd < 0

    def settle(self) -> int:
        """Makes them final; the memfd, sealed for good, which is the caller's from here on.

        What is written to this mapping afterwards goes to copies that only this process has. KernelError (EBUSY) where
        a process that was forked since could write to the pages, or a device does: they are as before then, unless
        views exist, which keep their copies, and the descriptor is closed. ValueError when they are settled.
        """
        fd = self._take()
        try:
            if os.fstat(fd).st_blocks * 512 < len(self):  # pages that nobody wrote to
                memfd.reserve(fd, len(self))
            memfd.place(self, fd, own=True)
            memfd.seal(fd, memfd.SIZE | memfd.WRITE | memfd.SEAL)
        except BaseException:
            if in_use(self):
                os.close(fd)  # copies that were written to meanwhile must not be lost
            else:
                memfd.place(self, fd, writable=True)
                self._fd = fd
            raise
        return fd

    def close(self) -> None:
        """Unmaps them and closes the descriptor. BufferError while views exist."""
        mmap.mmap.close(self)
        self._drop()


# where each begins: no two mappings begin at one address
_PAGES: Final[weakref.WeakValueDictionary[int, Pages]] = weakref.WeakValueDictionary()


def settled(flat: memoryview) -> int:
    """The memfd of the pages that `flat` is all of, final from here on and the caller's; -1 if it has to be copied.

    That is, if it is other memory, or a part of pages, or somebody else might write to them.
    """
    pages = _PAGES.get(memfd.address(flat))
    if pages is None or len(pages) != len(flat):
        return -1
    try:
        return pages.settle()
    except (KernelError, ValueError):
        return -1
