"""Facts about pipes: capacity is slots, budgets are per user, one pipe has one owner."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import socket
from functools import partial
from mmap import PAGESIZE

import pytest
from descriptors import Descriptors
from forked import become, forked, needs_root
from peers import eventually, payload, wait_for
from syscalls import NONBLOCK, capacity, readable, slots

A_USER = 60321  # nobody's number, so the whole budget of pipe pages is there


def soft_budget() -> int:
    """Pages that one unprivileged user's pipes may take before new ones shrink."""
    with open("/proc/sys/fs/pipe-user-pages-soft") as stream:
        return int(stream.read())


def largest_pipe() -> int:
    """Bytes an unprivileged user may ask for."""
    with open("/proc/sys/fs/pipe-max-size") as stream:
        return int(stream.read())


def arrived(sock: socket.socket, count: int) -> bool:
    """Whether exactly `count` bytes wait in the receive queue."""
    return readable(sock) == count


def pull(source: int, pipe: int) -> int:
    """Splices into `pipe` until the kernel says EAGAIN; returns the bytes."""
    total = 0
    while True:
        try:
            total += os.splice(source, pipe, 1 << 20, flags=NONBLOCK)
        except BlockingIOError:
            return total


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_small_segments_fill_slots(fds: Descriptors, family: str) -> None:
    """One-byte segments from a socket fill a pipe long before its capacity in bytes is reached."""
    near, far = fds.tcp_pair() if family == "tcp" else fds.unix_pair()
    pipe = fds.pipe(16 * PAGESIZE)
    if family == "tcp":
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for sent in range(1, 201):
        near.send(b"x")
        eventually(partial(arrived, far, sent), f"byte {sent} in the receive queue")
    moved = pull(far.fileno(), pipe.w)
    assert slots(pipe.w) <= moved < 200
    assert readable(far) == 200 - moved
    assert not select.select([], [pipe.w], [], 0)[1]


def test_large_segments_exceed_the_capacity(fds: Descriptors) -> None:
    """Large segments make a pipe hold more bytes than F_GETPIPE_SZ says."""
    near, far = fds.tcp_pair()
    pipe = fds.pipe(16 * PAGESIZE)
    data, sent = payload(1, 1 << 20), 0
    try:
        while sent < len(data):
            sent += near.send(data[sent:])
    except BlockingIOError:
        pass  # as much as the sockets hold
    wait_for(far)
    assert pull(far.fileno(), pipe.w) > capacity(pipe.w)
    assert readable(pipe.r) > capacity(pipe.w)


def test_a_partly_drained_slot_stays_occupied(fds: Descriptors) -> None:
    """Reading all but one byte of every slot's page leaves no room, reading that byte does."""
    pipe = fds.pipe(PAGESIZE)
    assert slots(pipe.w) == 1
    assert os.write(pipe.w, b"x" * PAGESIZE) == PAGESIZE
    assert len(os.read(pipe.r, PAGESIZE - 1)) == PAGESIZE - 1
    with pytest.raises(BlockingIOError):
        os.write(pipe.w, b"y" * PAGESIZE)
    os.read(pipe.r, 1)
    assert os.write(pipe.w, b"y" * PAGESIZE) == PAGESIZE


def test_eagain_is_ambiguous(fds: Descriptors) -> None:
    """Socket to pipe answers EAGAIN alike for an empty socket and for a full pipe; poll on the pipe tells."""
    near, far = fds.tcp_pair()
    pipe = fds.pipe(PAGESIZE)
    with pytest.raises(BlockingIOError):
        os.splice(far.fileno(), pipe.w, 100, flags=NONBLOCK)
    assert select.select([], [pipe.w], [], 0)[1], "the socket was empty: the pipe has room"
    near.send(b"x" * 100)
    wait_for(far)
    fds.fill(pipe)
    with pytest.raises(BlockingIOError):
        os.splice(far.fileno(), pipe.w, 100, flags=NONBLOCK)
    assert not select.select([], [pipe.w], [], 0)[1], "the pipe was full"
    assert readable(far) == 100


@pytest.mark.parametrize("pages", [1, 16, 256])
def test_an_empty_pipe_always_takes(fds: Descriptors, pages: int) -> None:
    """A pipe that has been filled and emptied any number of times takes the next segment."""
    near, far = fds.unix_pair()
    pipe = fds.pipe(pages * PAGESIZE)
    for round_ in range(3):
        filled = fds.fill(pipe)
        while filled:
            filled -= len(os.read(pipe.r, 1 << 20))
        near.send(bytes([round_]))
        assert os.splice(far.fileno(), pipe.w, 1 << 20, flags=NONBLOCK) == 1
        assert os.read(pipe.r, 10) == bytes([round_])


def test_capacity_is_rounded_up(fds: Descriptors) -> None:
    """F_SETPIPE_SZ grants powers of two of pages and says what it granted."""
    pipe = fds.pipe()
    assert fcntl.fcntl(pipe.w, fcntl.F_SETPIPE_SZ, PAGESIZE + 1) == 2 * PAGESIZE
    assert capacity(pipe.r) == 2 * PAGESIZE
    assert fcntl.fcntl(pipe.w, fcntl.F_SETPIPE_SZ, 5 * PAGESIZE) == 8 * PAGESIZE


def test_a_pipe_cannot_shrink_below_its_bytes(fds: Descriptors) -> None:
    """F_SETPIPE_SZ answers EBUSY when more slots are in use than it is to have."""
    pipe = fds.pipe(16 * PAGESIZE)
    fds.fill(pipe)
    with pytest.raises(OSError, match="busy") as refused:
        fcntl.fcntl(pipe.w, fcntl.F_SETPIPE_SZ, PAGESIZE)
    assert refused.value.errno == errno.EBUSY
    assert capacity(pipe.w) == 16 * PAGESIZE


def test_the_largest_pipe_is_a_limit(fds: Descriptors) -> None:
    """Above pipe-max-size F_SETPIPE_SZ is EPERM without CAP_SYS_RESOURCE, and the pipe stays as it was."""
    pipe = fds.pipe(largest_pipe())

    def ask() -> int:
        if os.geteuid() == 0:
            become(A_USER)
        return fcntl.fcntl(pipe.w, fcntl.F_SETPIPE_SZ, 2 * largest_pipe())

    with forked(ask) as child, pytest.raises(PermissionError) as refused:
        child.answer()
    assert refused.value.errno == errno.EPERM
    assert capacity(pipe.w) == largest_pipe()


@needs_root
def test_large_pipes_have_a_budget() -> None:
    """When an unprivileged user's soft budget of pages is spent, the next pipe is 2 pages and cannot grow."""

    def spend() -> list[int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        become(A_USER)
        granted = 0
        while True:
            _, w = os.pipe()
            try:
                fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, largest_pipe())
            except PermissionError:
                return [granted, capacity(w)]
            granted += 1

    with forked(spend) as child:
        granted, last = child.answer()
    assert granted == soft_budget() // (largest_pipe() // PAGESIZE)
    assert last == 2 * PAGESIZE


@needs_root
def test_default_pipes_shrink() -> None:
    """Once the user's soft budget is spent a default pipe has 2 pages in place of 16; pipe() never fails."""

    def spend() -> list[int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        become(A_USER)
        sizes = [capacity(os.pipe()[1]) for _ in range(soft_budget() // 16 + 1)]
        return [sizes.count(16 * PAGESIZE), sizes[-1]]

    with forked(spend) as child:
        whole, last = child.answer()
    assert whole == soft_budget() // 16
    assert last == 2 * PAGESIZE


def test_a_blocked_splice_locks_the_pipe(fds: Descriptors) -> None:
    """While a splice waits for a blocking socket, even FIONREAD on its pipe waits, uninterruptibly."""
    near, far = fds.tcp_pair(blocking=True)
    pipe = fds.pipe()
    with forked(lambda: os.splice(far.fileno(), pipe.w, 10)) as splicing:
        splicing.wait_until_blocked("S")
        with forked(lambda: readable(pipe.r)) as asking:
            asking.wait_until_blocked("D")
            near.send(b"x")
            assert splicing.answer() == 1
            assert asking.answer() == 1


def test_a_reopened_pipe_has_flags_of_its_own(fds: Descriptors) -> None:
    """Opening /proc/self/fd/N of a pipe gives a description of its own: O_NONBLOCK there is not seen here."""
    pipe = fds.pipe(blocking=True)
    again = fds.open(f"/proc/self/fd/{pipe.r}", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        os.read(again, 1)
    assert os.get_blocking(pipe.r)
    os.write(pipe.w, b"same pipe")
    assert os.read(again, 100) == b"same pipe"


def test_a_duplicate_shares_its_flags(fds: Descriptors) -> None:
    """O_NONBLOCK set on a duplicate holds for the original too: inherited descriptors are left alone."""
    pipe = fds.pipe(blocking=True)
    os.set_blocking(fds.keep(os.dup(pipe.r)), False)
    assert not os.get_blocking(pipe.r)


def test_a_socket_cannot_be_reopened(fds: Descriptors) -> None:
    """Opening /proc/self/fd/N of a socket is ENXIO."""
    near, _ = fds.unix_pair()
    with pytest.raises(OSError, match="No such device") as refused:
        os.open(f"/proc/self/fd/{near.fileno()}", os.O_RDWR)
    assert refused.value.errno == errno.ENXIO
