"""A ring of slots in one memfd: the writing side's, and the reading side's.

Each slot is a mapping of its own, so that Python can tell for each whether anybody still looks at it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Final

from relay.errors import KernelError, ShareError
from relay.kernel import memfd
from relay.kernel.arena import HUGE_PAGE, in_use, whole_pages
from relay.sharing import wire

PAGE: Final = mmap.PAGESIZE
LARGE: Final = (
    8 * HUGE_PAGE
)  # a slot from here on is of whole huge pages: at most an eighth of it is never used


def slot_bytes(size: int) -> int:
    """Bytes that a slot takes for blocks of up to `size` bytes."""
    return whole_pages(size, HUGE_PAGE if size >= LARGE else PAGE)


def _mapped(fd: int, number: int, size: int, *, writable: bool) -> mmap.mmap:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        slot = memfd.aligned(
            lambda: mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection)
        )
    except OSError as error:
        raise KernelError(
            f"mmap of a slot of {size} bytes: {error.strerror}", hint="fewer or smaller slots need less"
        ) from error
    memfd.place(slot, fd, number * size, writable=writable)
    return slot


def _entered(slot: mmap.mmap, how: int) -> None:
    """All pages of `slot` are mapped, so that the first blocks are not slower."""
    with contextlib.suppress(OSError):  # before Linux 5.14 every page is entered when it is first looked at
        slot.madvise(how)


class Slots:
    """`count` slots of `size` bytes, whole pages, that only this process can write to. Owns a descriptor."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.maps: list[mmap.mmap] = []
        self.fd = memfd.make("relay-slots")
        try:
            memfd.resize(self.fd, count * size)
            self.maps = [_mapped(self.fd, number, size, writable=True) for number in range(count)]
            for number, slot in enumerate(self.maps):
                memfd.enlarge(slot, self.fd, number * size)
            memfd.reserve(self.fd, count * size)
            for slot in self.maps:
                _entered(slot, memfd.POPULATE_WRITE)
            memfd.seal(self.fd, memfd.SIZE | memfd.FUTURE_WRITE | memfd.SEAL)
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:  # -1 too where there was none to be had
            os.close(self.fd)

    def settle(self, number: int) -> None:
        """Nobody writes to the slot from here on: views that are left are cut off, and see zeros of their own."""
        if in_use(self.maps[number]):
            self.maps[number] = memfd.cut_off(self.maps[number])

    def close(self) -> None:
        """Closes the descriptor. The memory goes with the last view here and the last mapping elsewhere."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.maps.clear()


def received(fd: int, count: int, size: int, max_bytes: int) -> list[mmap.mmap]:
    """The slots of a ring that a peer made, mapped read-only; ShareError unless it is what it should be.

    The descriptor may be closed afterwards.
    """
    if not 0 < count <= wire.MOST_SLOTS or size <= 0 or size % PAGE or count * size > max_bytes:
        raise ShareError(
            f"a ring of {count} slots of {size} bytes was announced: "
            f"1 to {wire.MOST_SLOTS} slots of whole pages and {max_bytes} bytes in all are taken",
            hint="raise max_bytes if that is right",
        )
    memfd.judge(fd, count * size, memfd.FUTURE_WRITE)
    maps = [_mapped(fd, number, size, writable=False) for number in range(count)]
    for slot in maps:
        _entered(slot, memfd.POPULATE_READ)
    return maps
