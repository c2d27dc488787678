"""Files that are only memory: made, sealed, judged and mapped.

Facts (man 2 memfd_create, fcntl; mm/memfd.c, mm/shmem.c; pinned by tests/facts/test_facts_memfd.py):
- Seals can be added and never taken away. SHRINK and GROW fix the size for good, so no mapping of it can fault
  (SIGBUS) because the file became shorter. WRITE makes the bytes final for everybody; it is EBUSY while a
  writable mapping exists anywhere or a page is in use by a device. FUTURE_WRITE leaves the mappings that exist
  writable and forbids new ones, write(2), and punching holes.
- A file that was sealed with holes in it costs whoever reads a hole a page of his own memory.
- Files of hugetlbfs can be sealed too; reading one faults (SIGBUS) when the system has no huge page left.
- Any other descriptor (a file on disk, a pipe, a directory, memfd_secret) answers EINVAL to F_GET_SEALS.
- With pages of 4 KiB each one costs 0.5 us to allocate, to map, to unmap and to free, and as much again to clear: more
  than copying it. Of huge pages a memfd is made where the system's switch shmem_enabled says so
  (Documentation/admin-guide/mm/transhuge.rst): "always" and "within_size" for what write(2) puts there too, which then
  need not be cleared first; "advise" for memory that is mapped and was advised. "never", the default, is about the
  kernel's own doing: who asks for huge pages outright, by MADV_COLLAPSE, is given them unless it says "deny".
- A huge page is mapped as one only where its address and its place in the file agree. The kernel puts a mapping
  right under the one above it, unless its size is of whole huge pages: then it aligns it (Linux 6.7).
- A private mapping of a memfd shows the file, and a copy of each page from when it is first written to; a seal WRITE
  forbids none.
- Python's mmap duplicates the descriptor it is given, and keeps it as long as the mapping.

So: what came from elsewhere is mapped only when it has its seals, its exact size, all of its pages, and pages
of the ordinary size. A mapping here keeps no descriptor: shared pages are put over a private mapping that
Python owns.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from relay.errors import KernelError, ShareError, name_of
from relay.kernel import core
from relay.kernel.arena import HUGE_PAGE, whole_pages

PAGE: Final = mmap.PAGESIZE

SEAL: Final = fcntl.F_SEAL_SEAL
SIZE: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
WRITE: Final = fcntl.F_SEAL_WRITE
FUTURE_WRITE: Final = 0x10  # fcntl has it from Python 3.13 on
FINAL: Final = SIZE | WRITE | SEAL

_NAMES: Final = {
    fcntl.F_SEAL_SHRINK: "SHRINK",
    fcntl.F_SEAL_GROW: "GROW",
    WRITE: "WRITE",
    FUTURE_WRITE: "FUTURE_WRITE",
}
_NOEXEC_SEAL: Final = 0x8  # MFD_NOEXEC_SEAL, Linux 6.3: some systems refuse memfds without it
PIECE: Final = 1 << 30  # most bytes of one write
POPULATE_READ, POPULATE_WRITE = 22, 23  # madvise: enter all pages of a mapping now
_SWITCHES: Final = Path("/sys/kernel/mm/transparent_hugepage")
_SMALL: Final = 256 * 1024  # bytes that are copied before a call into C, without the GIL, would begin to
_TRIES: Final = 3  # a gap just large enough for the mapping has no room for more

Mapped = TypeVar("Mapped", bound=mmap.mmap)


def make(name: str) -> int:
    """A new, empty memfd, which the caller closes. `name` shows in /proc. KernelError when there is none."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            return os.memfd_create(name, flags | _NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return os.memfd_create(name, flags)
    except OSError as error:
        raise KernelError(
            f"memfd_create: {error.strerror} ({name_of(error.errno or 0)})",
            hint="raise the limit of open files (ulimit -n), or close what is not needed any more",
        ) from error


@functools.cache
def huge_pages() -> str:
    """When a memfd gets huge pages, in the words of the system's switch: never, advise, always, within_size, ..."""
    chosen = [_chosen(_SWITCHES / name) for name in ("hugepages-2048kB/shmem_enabled", "shmem_enabled")]
    return next((word for word in chosen if word != "inherit"), "never")


def _chosen(switch: Path) -> str:
    """The word in brackets; of a switch that is not there, that the one above it counts."""
    try:
        return switch.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "inherit"


def on_request() -> bool:
    """Whether a memfd has huge pages only where they are asked for: `enlarge` before it is written to."""
    return huge_pages() in ("never", "advise")


def enlarge(memory: mmap.mmap, fd: int, offset: int = 0) -> bool:
    """Whether there are huge pages from now on under `memory`, a writable mapping of `fd` that is empty so far.

    What is smaller than one, or has no such address, has none. Small pages do as well.
    """
    if len(memory) < HUGE_PAGE or not on_request():
        return False
    if huge_pages() == "advise":
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return False
        return True
    with core.ffi.from_buffer("char[]", memory) as at:
        return int(core.lib.relay_enlarge(at, len(memory), fd, offset)) == 0


def aligned(make: Callable[[], Mapped]) -> Mapped:
    """The mapping that `make` makes, at an address where huge pages can be mapped as such, if there is one to be had.

    While it comes to lie under the mapping above it, room for the odd end is taken first, and it is made once more.
    """
    memory = make()
    with contextlib.ExitStack() as undo:
        for _ in range(_TRIES):
            size, begin = whole_pages(len(memory)), address(memory)
            odd = begin % HUGE_PAGE
            if size < HUGE_PAGE or not odd:
                break
            memory.close()
            above = core.ffi.cast("char *", begin + size - odd)
            if not core.lib.relay_occupy(above, odd):  # or another thread was faster
                undo.callback(core.lib.relay_vacate, above, odd)
            memory = make()
    return memory


def address(memory: mmap.mmap | memoryview) -> int:
    """Where it begins."""
    with core.ffi.from_buffer("char[]", memory) as at:
        return int(core.ffi.cast("uintptr_t", at))


def copy(to: mmap.mmap, content: memoryview) -> None:
    """`content`, flat bytes, to the beginning of `to`. Others run meanwhile if it takes long."""
    if len(content) < _SMALL:
        with memoryview(to) as whole:
            whole[: len(content)] = content
        return
    with core.ffi.from_buffer("char[]", to) as into, core.ffi.from_buffer("char[]", content) as source:
        core.lib.relay_copy(into, source, len(content))


def fill(fd: int, content: memoryview) -> None:
    """Puts all of `content`, flat bytes, from the beginning. KernelError when memory runs out."""
    at = 0
    try:
        if len(content) >= HUGE_PAGE and on_request():
            os.ftruncate(fd, len(content))
            with aligned(lambda: private(len(content))) as memory:
                place(memory, fd, writable=True)
                if enlarge(memory, fd):
                    memory.madvise(
                        POPULATE_WRITE
                    )  # a page that is not to be had: an error here, SIGBUS in a copy
                    copy(memory, content)
                    return
        while at < len(content):
            at += os.pwrite(fd, content[at : at + PIECE], at)
    except OSError as error:
        raise out_of_memory(len(content), error) from error


def resize(fd: int, size: int) -> None:
    """Gives the file `size` bytes without pages. KernelError when the limit of files' sizes forbids it."""
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise out_of_memory(size, error) from error


def reserve(fd: int, size: int) -> None:
    """Gives the file `size` bytes with a page behind each. KernelError when memory runs out."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise out_of_memory(size, error) from error


def out_of_memory(size: int, error: OSError) -> KernelError:
    return KernelError(
        f"memfd of {size} bytes: {error.strerror} ({name_of(error.errno or 0)})",
        hint="share less at once, or allow more memory (the container's limit, ulimit -f)",
    )


def seal(fd: int, seals: int) -> None:
    """Adds `seals`. KernelError with EBUSY when somebody may still write to it."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        hint = ""
        if error.errno == errno.EBUSY:
            hint = "a writable mapping of it exists, in this process or in one that was forked from it"
        raise KernelError(
            f"sealing a memfd: {error.strerror} ({name_of(error.errno or 0)})", hint=hint
        ) from error


def judge(fd: int, size: int, needed: int) -> None:
    """ShareError unless `fd` is a memfd of exactly `size` bytes, all there, with the seals `needed` and SIZE.

    WRITE stands for FUTURE_WRITE as well. After this no mapping of it can fault, and reading it takes no memory.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ShareError(f"what came is no memfd: its mode is {stat.filemode(status.st_mode)}")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ShareError(f"what came is no memfd: F_GET_SEALS says {name_of(error.errno or 0)}") from error
    if seals & WRITE:
        seals |= FUTURE_WRITE
    missing = [name for bit, name in _NAMES.items() if (needed | SIZE) & bit & ~seals]
    if missing:
        raise ShareError(
            f"the memfd that came lacks the seals {', '.join(missing)}: it could change or shrink"
        )
    if status.st_size != size:
        raise ShareError(f"the memfd that came has {status.st_size} bytes and {size} were announced")
    if os.fstatvfs(fd).f_bsize != PAGE:
        raise ShareError("the memfd that came is made of huge pages, which can be missing when they are read")
    if status.st_blocks * 512 < size:
        raise ShareError(
            f"the memfd that came has holes: {status.st_blocks * 512} of its {size} bytes are there"
        )


def private(size: int) -> mmap.mmap:
    """A writable mapping of `size` bytes for `place` to put pages under."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def place(memory: mmap.mmap, fd: int, offset: int = 0, *, writable: bool = False, own: bool = False) -> None:
    """Puts the pages of `fd` from `offset` on under `memory`, a private anonymous mapping of Python's.

    The mapping goes on to belong to `memory`, and the descriptor may be closed. With -1 for `fd` the pages are
    fresh private ones: whoever still looks at `memory` is cut off. With `own` they are the file's until somebody writes
    to them through `memory`, and then copies that nobody else sees. KernelError when it cannot be.
    """
    kind = core.lib.RELAY_OWN_COPY if own else writable
    with core.ffi.from_buffer("char[]", memory) as at:
        core.check(
            int(core.lib.relay_map_over(at, whole_pages(len(memory)), fd, offset, kind)),
            f"mmap of {len(memory)} shared bytes",
        )


def cut_off(memory: mmap.mmap) -> mmap.mmap:
    """A new mapping of the shared pages under `memory`, still writable; whoever looks at `memory` is cut off.

    A seal FUTURE_WRITE forbids to map them anew, so the mapping moves. KernelError before Linux 5.13.
    """
    fresh = aligned(lambda: private(len(memory)))
    with core.ffi.from_buffer("char[]", memory) as old, core.ffi.from_buffer("char[]", fresh) as new:
        core.check(int(core.lib.relay_cut(old, new, whole_pages(len(memory)), 1)), "moving a shared mapping")
    place(memory, -1, writable=True)
    return fresh
