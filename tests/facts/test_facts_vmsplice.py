"""Facts about lending memory: slots per page, who blocks, and what protects a lent page from its lender."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from mmap import MADV_DONTNEED, PAGESIZE
from pathlib import Path

import pytest
from descriptors import Descriptors
from forked import forked
from peers import eventually, payload, receive_exactly
from syscalls import NONBLOCK, Memory, mlock, readable, slots, unacknowledged, vmsplice


def refusal() -> str:
    """Why memory cannot be lent here, or nothing."""
    r, w = os.pipe()
    try:
        with Memory(1) as memory:
            memory[0] = 1
            vmsplice(w, [memory.span(0, 1)])
    except OSError as error:
        return f"vmsplice is missing, refused by a sandbox or the kernel: {error}"
    finally:
        os.close(r)
        os.close(w)
    return ""


pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal())


def test_one_slot_per_page_touched(fds: Descriptors) -> None:
    """A pipe of n slots takes n aligned pages, and one page less of an unaligned buffer plus its two ends."""
    with Memory(64) as memory:
        aligned, unaligned = fds.pipe(16 * PAGESIZE), fds.pipe(16 * PAGESIZE)
        assert vmsplice(aligned.w, [memory.span()]) == slots(aligned.w) * PAGESIZE
        assert vmsplice(unaligned.w, [memory.span(100)]) == slots(unaligned.w) * PAGESIZE - 100
        for pipe in (aligned, unaligned):
            with pytest.raises(BlockingIOError):
                vmsplice(pipe.w, [memory.span()])


def test_small_spans_take_a_slot_each(fds: Descriptors) -> None:
    """Spans of one byte cost a whole slot each, even when they are neighbours."""
    with Memory(1) as memory:
        pipe = fds.pipe(16 * PAGESIZE)
        assert vmsplice(pipe.w, [memory.span(place, 1) for place in range(100)]) == slots(pipe.w)


def test_spans_are_limited(fds: Descriptors) -> None:
    """1024 spans are taken, 1025 are EINVAL."""
    with Memory(1) as memory:
        pipe = fds.pipe()
        with pytest.raises(OSError, match="Invalid") as refused:
            vmsplice(pipe.w, [memory.span(0, 1)] * 1025)
        assert refused.value.errno == errno.EINVAL
        assert vmsplice(pipe.w, [memory.span(0, 1)] * 1024) > 0


def test_o_nonblock_is_ignored(fds: Descriptors) -> None:
    """On a full pipe with O_NONBLOCK vmsplice waits all the same; SPLICE_F_NONBLOCK makes it say EAGAIN."""
    with Memory(1) as memory:
        pipe = fds.pipe(PAGESIZE)
        assert not os.get_blocking(pipe.w)
        fds.fill(pipe)
        with pytest.raises(BlockingIOError):
            vmsplice(pipe.w, [memory.span()], NONBLOCK)
        with forked(lambda: vmsplice(pipe.w, [memory.span()], 0)) as child:
            child.wait_until_blocked()
            os.read(pipe.r, 1 << 20)
            assert child.answer() == PAGESIZE


def test_it_waits_for_the_first_slot_only(fds: Descriptors) -> None:
    """Without SPLICE_F_NONBLOCK too, vmsplice comes short rather than waiting for a second slot."""
    with Memory(4) as memory:
        pipe = fds.pipe(PAGESIZE, blocking=True)
        assert vmsplice(pipe.w, [memory.span()], 0) == PAGESIZE


def test_writing_after_the_lend_shows_through(fds: Descriptors) -> None:
    """The reader of a lent page sees what is written into it afterwards: a lend is no copy."""
    with Memory(1) as memory:
        pipe = fds.pipe()
        memory[:6] = b"before"
        vmsplice(pipe.w, [memory.span(0, 6)])
        memory[:6] = b"after!"
        assert os.read(pipe.r, 6) == b"after!"


def hop_pipe(fds: Descriptors) -> tuple[int, Callable[[int], bytes]]:
    """Another pipe as the next hop: where to splice to, and how its end reads."""
    pipe = fds.pipe(1 << 20)
    return pipe.w, lambda count: os.read(pipe.r, count)


def hop_tcp(fds: Descriptors) -> tuple[int, Callable[[int], bytes]]:
    """A tcp connection as the next hop."""
    near, far = fds.tcp_pair()
    return near.fileno(), lambda count: receive_exactly(far, count)


def hop_unix(fds: Descriptors) -> tuple[int, Callable[[int], bytes]]:
    """A unix connection as the next hop."""
    near, far = fds.unix_pair()
    return near.fileno(), lambda count: receive_exactly(far, count)


Hop = Callable[[Descriptors], tuple[int, Callable[[int], bytes]]]
HOPS = pytest.mark.parametrize("hop", [hop_pipe, hop_tcp, hop_unix])


@HOPS
def test_an_empty_pipe_gives_nothing_back(fds: Descriptors, hop: Hop) -> None:
    """A page spliced onwards is still lent though its pipe is empty: the peer sees what is written then."""
    size = 8 * PAGESIZE
    with Memory(8) as memory:
        pipe = fds.pipe()
        output, read = hop(fds)
        memory[:] = b"a" * size
        vmsplice(pipe.w, [memory.span()])
        assert os.splice(pipe.r, output, size, flags=NONBLOCK) == size
        assert readable(pipe.r) == 0
        memory[:] = b"b" * size
        assert read(size) == b"b" * size


@HOPS
def test_replaced_pages_are_safe(fds: Descriptors, hop: Hop) -> None:
    """MADV_DONTNEED on private memory right after the lend leaves the old pages to the reader for good."""
    size = 8 * PAGESIZE
    data = payload(3, size)
    with Memory(8) as memory:
        pipe = fds.pipe()
        output, read = hop(fds)
        memory[:] = data
        vmsplice(pipe.w, [memory.span()])
        memory.madvise(MADV_DONTNEED)
        assert memory[:] == bytes(size), "the lender has fresh pages"
        memory[:] = b"b" * size
        assert os.splice(pipe.r, output, size, flags=NONBLOCK) == size
        assert read(size) == data


def test_unmapped_pages_are_safe(fds: Descriptors) -> None:
    """Unmapping memory right after the lend leaves the bytes to the reader, whatever is mapped there next."""
    data = payload(4, 8 * PAGESIZE)
    pipe = fds.pipe()
    with Memory(8) as memory:
        memory[:] = data
        vmsplice(pipe.w, [memory.span()])
    with Memory(8) as other:
        other[:] = b"b" * len(data)
        assert os.read(pipe.r, 1 << 20) == data


def test_shared_memory_cannot_be_replaced(fds: Descriptors) -> None:
    """MADV_DONTNEED on shared memory succeeds and protects nothing: the next write shows through."""
    with Memory(1, shared=True) as memory:
        pipe = fds.pipe()
        memory[:6] = b"before"
        vmsplice(pipe.w, [memory.span(0, 6)])
        memory.madvise(MADV_DONTNEED)
        memory[:6] = b"after!"
        assert os.read(pipe.r, 6) == b"after!"


def test_locked_memory_cannot_be_replaced() -> None:
    """MADV_DONTNEED on locked pages is EINVAL: its result must be looked at."""
    with Memory(1) as memory:
        memory[0] = 1
        mlock(memory.span())
        with pytest.raises(OSError, match="Invalid") as refused:
            memory.madvise(MADV_DONTNEED)
        assert refused.value.errno == errno.EINVAL


def test_untouched_pages_lend_zeros(fds: Descriptors) -> None:
    """A page lent before its first write is the zero page: what is written later never reaches the reader."""
    with Memory(1) as memory:
        pipe = fds.pipe()
        vmsplice(pipe.w, [memory.span(0, 5)])
        memory[:5] = b"later"
        assert os.read(pipe.r, 5) == bytes(5)


@pytest.mark.parametrize("kind", ["file", "memfd"])
def test_a_file_copies_at_once(fds: Descriptors, tmp_path: Path, kind: str) -> None:
    """Splicing lent memory into a file or memfd copies it: later writes to the memory stay out of it."""
    with Memory(4) as memory:
        pipe = fds.pipe()
        file = fds.memfd() if kind == "memfd" else fds.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        memory[:] = b"a" * len(memory)
        vmsplice(pipe.w, [memory.span()])
        assert os.splice(pipe.r, file, len(memory)) == len(memory)
        memory[:] = b"b" * len(memory)
        assert os.pread(file, len(memory), 0) == b"a" * len(memory)


def test_acknowledged_is_not_yours_again(fds: Descriptors) -> None:
    """Even after tcp has acknowledged every byte, the peer reads what is written into the lent page now."""
    size = PAGESIZE
    with Memory(1) as memory:
        pipe = fds.pipe()
        near, far = fds.tcp_pair()
        memory[:] = b"a" * size
        vmsplice(pipe.w, [memory.span()])
        assert os.splice(pipe.r, near.fileno(), size, flags=NONBLOCK) == size
        eventually(lambda: unacknowledged(near) == 0, "the acknowledgement")
        memory[:] = b"b" * size
        assert receive_exactly(far, size) == b"b" * size
