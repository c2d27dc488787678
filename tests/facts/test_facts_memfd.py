"""Facts about memfds: what seals forbid and when they are refused, and what a mapping of one can do to its reader."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import mmap
import os
import signal
from pathlib import Path

import pytest
from descriptors import Descriptors
from forked import forked

from relay.kernel import core, memfd
from relay.kernel.arena import HUGE_PAGE

PAGE = mmap.PAGESIZE
FUTURE_WRITE = 0x10
ALL = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealable(fds: Descriptors, content: bytes) -> int:
    """A memfd with `content` that takes seals."""
    number = fds.keep(os.memfd_create("fact", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.pwrite(number, content, 0)
    return number


def seal(fd: int, seals: int) -> None:
    """Adds seals."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def test_sealed_for_good(fds: Descriptors) -> None:
    """With all seals there is no writing, no writable mapping, no change of size, by nobody."""
    fd = sealable(fds, b"x" * PAGE)
    seal(fd, ALL)
    again = fds.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    for number in (fd, again):
        with pytest.raises(PermissionError):
            os.pwrite(number, b"y", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(number, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(number, 2 * PAGE)
        with pytest.raises(PermissionError):
            mmap.mmap(number, PAGE)


def test_no_write_seal_while_somebody_may_write(fds: Descriptors) -> None:
    """F_SEAL_WRITE is EBUSY while a writable mapping exists, in a forked child as well; later it works."""
    fd = sealable(fds, b"x" * PAGE)
    memory = mmap.mmap(fd, PAGE)
    go = fds.pipe(blocking=True)
    with forked(lambda: len(os.read(go.r, 1))) as child:
        memory.close()
        with pytest.raises(OSError, match="busy") as refused:
            seal(fd, ALL)
        assert refused.value.errno == errno.EBUSY
        os.write(go.w, b"x")
        child.answer()
        child.status()
        seal(fd, ALL)


def test_future_write_leaves_the_maker_its_mapping(fds: Descriptors) -> None:
    """FUTURE_WRITE forbids write(2), new writable mappings and holes; the mapping before it goes on writing."""
    fd = sealable(fds, b"x" * PAGE)
    mine = mmap.mmap(fd, PAGE)
    seal(fd, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | FUTURE_WRITE)
    theirs = mmap.mmap(fd, PAGE, prot=mmap.PROT_READ)
    mine[:3] = b"new"
    assert theirs[:3] == b"new"
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"y", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE)
    with pytest.raises(PermissionError):
        mine.madvise(mmap.MADV_REMOVE)
    mine.close()
    theirs.close()


def test_without_the_seal_a_reader_dies(fds: Descriptors) -> None:
    """Reading a mapping whose file was cut is SIGBUS: no size that is merely announced can be trusted."""
    fd = sealable(fds, b"x" * 4 * PAGE)

    def child() -> None:
        faulthandler.disable()
        memory = mmap.mmap(fd, 4 * PAGE, prot=mmap.PROT_READ)
        os.ftruncate(fd, PAGE)
        _ = memory[3 * PAGE]

    with forked(child) as other:
        assert other.status() == -signal.SIGBUS


def test_holes_cost_their_reader(fds: Descriptors) -> None:
    """Reading a hole of a memfd through a mapping makes a page; the count of blocks tells of holes before."""
    fd = sealable(fds, b"")
    os.ftruncate(fd, 64 * PAGE)
    seal(fd, ALL)
    assert os.fstat(fd).st_blocks == 0
    memory = mmap.mmap(fd, 64 * PAGE, prot=mmap.PROT_READ)
    assert memory[:] == bytes(64 * PAGE)
    assert os.fstat(fd).st_blocks * 512 >= 64 * PAGE  # one huge page, where the machine is set so
    memory.close()


def test_a_private_mapping_of_what_is_sealed_copies(fds: Descriptors) -> None:
    """A private mapping may be written to where WRITE is sealed: its page is a copy then, the file stays as it is."""
    fd = sealable(fds, b"x" * 2 * PAGE)
    seal(fd, ALL)
    mine = mmap.mmap(fd, 2 * PAGE, flags=mmap.MAP_PRIVATE)
    mine[:3] = b"new"
    assert mine[:4] == b"newx"
    assert os.pread(fd, 4, 0) == b"xxxx"
    mine.close()


def test_no_write_seal_under_a_shared_mapping_until_it_is_replaced(fds: Descriptors) -> None:
    """A writable mapping keeps WRITE off; put a private one of the same file in its place, and it can be sealed."""
    fd = sealable(fds, b"x" * PAGE)
    memory = memfd.private(PAGE)
    memfd.place(memory, fd, writable=True)
    memory[:3] = b"new"
    with pytest.raises(OSError, match="busy"):
        seal(fd, ALL)
    memfd.place(memory, fd, own=True)
    seal(fd, ALL)
    memory[3:6] = b"own"
    assert memory[:7] == b"newownx"
    assert os.pread(fd, 7, 0) == b"newxxxx"
    memory.close()


def test_huge_pages_are_given_to_who_asks_for_them_outright(fds: Descriptors) -> None:
    """MADV_COLLAPSE makes huge pages of a memfd with a page in each 2 MiB, zeros elsewhere, unless they are denied."""
    size = 4 * HUGE_PAGE
    fd = sealable(fds, b"")
    os.ftruncate(fd, size)
    memory = memfd.aligned(lambda: memfd.private(size))
    assert memfd.address(memory) % HUGE_PAGE == 0
    memfd.place(memory, fd, writable=True)
    answer = core.lib.relay_enlarge(core.ffi.from_buffer(memory), size, fd, 0)
    if answer == -errno.EINVAL:
        pytest.skip("huge pages on request are missing: Linux before 6.1, or denied (shmem_enabled, prctl)")
    if answer in (-errno.ENOMEM, -errno.EAGAIN, -errno.EBUSY):
        pytest.skip("free memory in stretches of 2 MiB is missing on this machine now")
    assert answer == 0
    assert os.fstat(fd).st_blocks * 512 == size
    assert memory[:] == bytes(size)
    memory.close()


def test_only_memfds_tell_seals(fds: Descriptors, tmp_path: Path) -> None:
    """F_GET_SEALS is EINVAL for a file on disk, a pipe and a directory."""
    others = [
        fds.open(tmp_path / "file", os.O_RDWR | os.O_CREAT), fds.pipe().r, fds.open(tmp_path, os.O_RDONLY),
    ]  # fmt: skip
    if (
        os.statvfs(tmp_path).f_bsize == PAGE
        and os.path.ismount("/dev/shm")
        and str(tmp_path).startswith("/dev/shm")
    ):
        pytest.skip("a tmp_path on tmpfs tells seals: a directory on disk is missing")
    for number in others:
        with pytest.raises(OSError, match="Invalid"):
            fcntl.fcntl(number, fcntl.F_GET_SEALS)


def test_an_exported_mapping_says_so(fds: Descriptors) -> None:
    """Python refuses to resize a mapping with views before it looks at the size: that tells whether there are any."""
    kinds = [
        mmap.mmap(-1, PAGE), mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
        mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ),
    ]  # fmt: skip
    for memory in kinds:
        with memoryview(memory), pytest.raises(BufferError):
            memory.resize(-1)
        with pytest.raises((ValueError, TypeError)):
            memory.resize(-1)
        memory.close()
