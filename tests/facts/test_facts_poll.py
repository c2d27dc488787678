"""Facts about readiness: what epoll takes, when edges come, and how fifos open."""

from __future__ import annotations

import errno
import os
import select
from mmap import PAGESIZE
from pathlib import Path

import pytest
from descriptors import Descriptors


@pytest.mark.parametrize("kind", ["regular file", "/dev/null", "memfd"])
def test_epoll_refuses_files(fds: Descriptors, tmp_path: Path, kind: str) -> None:
    """What never waits cannot be polled: epoll_ctl answers EPERM for regular files, memfds and /dev/null."""
    if kind == "memfd":
        number = fds.memfd()
    else:
        path = kind if kind == "/dev/null" else tmp_path / "file"
        number = fds.open(path, os.O_RDWR | os.O_CREAT)
    with pytest.raises(PermissionError) as refused:
        fds.epoll().register(number, select.EPOLLIN)
    assert refused.value.errno == errno.EPERM


def test_write_edge_comes_again(fds: Descriptors) -> None:
    """An edge-triggered write end that was full fires again after a reader has made room."""
    pipe, events = fds.pipe(16 * PAGESIZE), fds.epoll()
    events.register(pipe.w, select.EPOLLOUT | select.EPOLLET)
    assert events.poll(0) == [(pipe.w, select.EPOLLOUT)], "the first edge: there is room at the start"
    fds.fill(pipe)
    assert events.poll(0) == []
    os.read(pipe.r, 1 << 20)
    assert events.poll(10) == [(pipe.w, select.EPOLLOUT)]


def test_read_edge_comes_with_each_write(fds: Descriptors) -> None:
    """An edge-triggered read end fires once for bytes that nobody takes, and again when more are written."""
    pipe, events = fds.pipe(), fds.epoll()
    events.register(pipe.r, select.EPOLLIN | select.EPOLLET)
    os.write(pipe.w, b"one")
    assert events.poll(10) == [(pipe.r, select.EPOLLIN)]
    assert events.poll(0) == [], "what was not taken makes no new edge"
    os.write(pipe.w, b"two")
    assert events.poll(10) == [(pipe.r, select.EPOLLIN)]


def test_end_of_a_pipe_is_a_hangup(fds: Descriptors) -> None:
    """The last writer's close is EPOLLHUP at the read end, the last reader's EPOLLERR at the write end."""
    first, second, events = fds.pipe(), fds.pipe(), fds.epoll()
    events.register(first.r, select.EPOLLIN | select.EPOLLET)
    events.register(second.w, select.EPOLLOUT | select.EPOLLET)
    events.poll(0)
    fds.close(first.w, second.r)
    assert dict(events.poll(10)) == {first.r: select.EPOLLHUP, second.w: select.EPOLLOUT | select.EPOLLERR}


def test_fifo_reader_before_any_writer(fds: Descriptors, tmp_path: Path) -> None:
    """A fifo without writer reads 0 at once, yet epoll says nothing until the first writer came and went."""
    path, events = tmp_path / "fifo", fds.epoll()
    os.mkfifo(path)
    reader = fds.open(path, os.O_RDONLY | os.O_NONBLOCK)
    events.register(reader, select.EPOLLIN)
    assert os.read(reader, 1) == b""
    assert events.poll(0) == []
    writer = fds.open(path, os.O_WRONLY | os.O_NONBLOCK)
    assert events.poll(0) == []
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    fds.close(writer)
    assert events.poll(10) == [(reader, select.EPOLLHUP)]
    assert os.read(reader, 1) == b""


def test_fifo_writer_before_any_reader(fds: Descriptors, tmp_path: Path) -> None:
    """Opening a fifo for writing without waiting is ENXIO until there is a reader."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="No such device") as refused:
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    assert refused.value.errno == errno.ENXIO
    fds.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fds.open(path, os.O_WRONLY | os.O_NONBLOCK)


def test_fifo_opened_both_ways_never_ends(fds: Descriptors, tmp_path: Path) -> None:
    """A fifo opened O_RDWR is its own writer: it sees no end of stream when others close."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    both = fds.open(path, os.O_RDWR | os.O_NONBLOCK)
    writer = fds.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"x")
    fds.close(writer)
    assert os.read(both, 10) == b"x"
    with pytest.raises(BlockingIOError):
        os.read(both, 10)
