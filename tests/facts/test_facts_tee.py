"""Facts about tee: it starts at the head, cannot resume, and has an end of stream of its own."""

from __future__ import annotations

import errno
import os
import signal
from mmap import PAGESIZE

import pytest
from descriptors import Descriptors
from forked import forked
from peers import payload
from syscalls import NONBLOCK, readable, slots, tee


def test_tee_takes_nothing_away(fds: Descriptors) -> None:
    """tee duplicates and leaves the source as it was; the copy outlives the original."""
    source, target = fds.pipe(), fds.pipe()
    os.write(source.w, b"payload")
    assert tee(source.r, target.w, 100) == 7
    assert os.read(source.r, 100) == b"payload"
    fds.close(source.r, source.w)
    assert os.read(target.r, 100) == b"payload"


def test_tee_starts_at_the_head(fds: Descriptors) -> None:
    """A second tee repeats the first bytes: it cannot resume where the first one stopped."""
    source, target = fds.pipe(), fds.pipe()
    os.write(source.w, b"abcdef")
    assert tee(source.r, target.w, 3) == 3
    assert tee(source.r, target.w, 3) == 3
    assert os.read(target.r, 100) == b"abcabc"
    assert readable(source.r) == 6


def test_short_tee_continues_after_draining_exactly(fds: Descriptors) -> None:
    """After a tee cut short by a small target, draining exactly those bytes makes the next tee follow on."""
    source, target, sink = fds.pipe(16 * PAGESIZE), fds.pipe(4 * PAGESIZE), fds.pipe(16 * PAGESIZE)
    data = payload(2, 16 * PAGESIZE)
    assert os.write(source.w, data) == len(data)
    copied = b""
    while readable(source.r):
        owed = tee(source.r, target.w, 1 << 20)
        assert owed == slots(target.w) * PAGESIZE
        while owed:
            owed -= os.splice(source.r, sink.w, owed, flags=NONBLOCK)
        copied += os.read(target.r, 1 << 20)
    assert copied == data
    assert os.read(sink.r, 1 << 20) == data


def test_tee_counts_slots(fds: Descriptors) -> None:
    """A target with one slot left takes one segment of the source, however small."""
    source, target = fds.pipe(16 * PAGESIZE), fds.pipe(PAGESIZE)
    near, far = fds.unix_pair()
    for segment in (b"1", b"22", b"333"):
        near.send(segment)
        assert os.splice(far.fileno(), source.w, 100, flags=NONBLOCK) == len(segment)
    assert tee(source.r, target.w, 100) == 1
    assert os.read(target.r, 100) == b"1"


def test_tee_of_nothing_is_eagain(fds: Descriptors) -> None:
    """An empty source that has writers and a full target are both EAGAIN."""
    source, target = fds.pipe(), fds.pipe(PAGESIZE)
    with pytest.raises(BlockingIOError):
        tee(source.r, target.w, 100)
    os.write(source.w, b"x")
    fds.fill(target)
    with pytest.raises(BlockingIOError):
        tee(source.r, target.w, 100)


def test_tee_sees_the_end_only_with_room(fds: Descriptors) -> None:
    """From an empty pipe without writers tee returns 0 if the target has room, and EAGAIN if it is full."""
    source, roomy, full = fds.pipe(), fds.pipe(), fds.pipe(PAGESIZE)
    fds.close(source.w)
    fds.fill(full)
    assert tee(source.r, roomy.w, 100) == 0
    with pytest.raises(BlockingIOError):
        tee(source.r, full.w, 100)


def test_tee_of_no_bytes_looks_like_the_end(fds: Descriptors) -> None:
    """A count of 0 returns 0 although there are bytes and writers."""
    source, target = fds.pipe(), fds.pipe()
    os.write(source.w, b"x")
    assert tee(source.r, target.w, 0) == 0


def test_tee_into_a_pipe_without_readers(fds: Descriptors) -> None:
    """A target without readers is EPIPE, and the source keeps its bytes."""
    source, target = fds.pipe(), fds.pipe()
    os.write(source.w, b"kept")
    fds.close(target.r)
    with pytest.raises(BrokenPipeError):
        tee(source.r, target.w, 100)
    assert os.read(source.r, 100) == b"kept"


def test_tee_raises_sigpipe(fds: Descriptors) -> None:
    """tee into a pipe without readers kills a process that does not ignore SIGPIPE."""
    source, target = fds.pipe(), fds.pipe()
    os.write(source.w, b"x")
    fds.close(target.r)

    def die() -> int:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return tee(source.r, target.w, 100)

    with forked(die) as child:
        assert child.status() == -signal.SIGPIPE


def test_tee_wants_two_pipes(fds: Descriptors) -> None:
    """tee onto itself and tee with a socket are EINVAL."""
    pipe = fds.pipe()
    near, _ = fds.unix_pair()
    os.write(pipe.w, b"x")
    for target in (pipe.w, near.fileno()):
        with pytest.raises(OSError, match="Invalid") as refused:
            tee(pipe.r, target, 100)
        assert refused.value.errno == errno.EINVAL
