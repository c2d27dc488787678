"""vmsplice, tee and splice for programs: short counts, waiting, timeouts and the ends of streams done right."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from descriptors import Descriptors
from peers import payload
from piped import read

import relay
from relay.kernel import core

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE


def test_vmsplice_copies_what_is_not_an_arenas(pipe: relay.Pipe) -> None:
    """bytes, a bytearray, an array and an mmap go in by copying: changed afterwards, they arrive unchanged."""
    sources: list[Any] = [
        b"abcd" * 100, bytearray(b"abcd" * 100), numpy.full(100, 1684234849, "<u4"), mmap.mmap(-1, 400),
    ]  # fmt: skip
    sources[3][:] = b"abcd" * 100
    for source in sources:
        with pytest.raises(BufferError, match="is not lent"):
            relay.vmsplice(source, pipe, copy=False)
        assert relay.vmsplice(source, pipe) == 400
        if not isinstance(source, bytes):
            memoryview(source).cast("B")[:] = b"\xff" * 400
        assert read(pipe, 400) == b"abcd" * 100


@pytest.mark.parametrize("kind", ["arena", "bytes"])
def test_vmsplice_waits_for_a_slow_reader(kind: str) -> None:
    """All of a source larger than the pipe goes through while a reader drains it, at its pace."""
    content = payload(3, (3 << 20) + 11)
    source = content if kind == "bytes" else relay.Arena(len(content))
    if isinstance(source, relay.Arena):
        source.write(content)
    got: list[bytes] = []
    with relay.Pipe(65536) as pipe:
        os.set_blocking(pipe.read_fd, True)
        reader = threading.Thread(target=lambda: got.append(read(pipe, len(content))))
        reader.start()
        assert relay.vmsplice(source, pipe) == len(content)
        reader.join()
    assert got == [content]


def test_time_that_is_up_is_told(pipe: relay.Pipe) -> None:
    """With a timeout a call returns what it did; BlockingIOError if that is nothing."""
    assert relay.vmsplice(b"x" * (2 << 20), pipe, timeout=0.01) == pipe.capacity
    with pytest.raises(BlockingIOError):
        relay.vmsplice(b"x", pipe, timeout=0)
    with relay.Pipe() as other:
        with pytest.raises(BlockingIOError):
            relay.splice(other, pipe, 10, timeout=0.01)
        with pytest.raises(BlockingIOError):
            relay.tee(other, pipe, 10, timeout=0.01)


def test_splice_ends_with_the_stream(fds: Descriptors, pipe: relay.Pipe) -> None:
    """Without a size it moves all there is; 0 is the end and nothing else."""
    near, far = fds.unix_pair()
    content = payload(4, 3 << 20)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(_drain(pipe)))
    writer = threading.Thread(target=lambda: _send_all(far, content))
    os.set_blocking(pipe.read_fd, True)
    reader.start()
    writer.start()
    assert relay.splice(near, pipe) == len(content)
    assert relay.splice(near, pipe, 5) == 0
    pipe.close_write()
    reader.join()
    writer.join()
    assert got == [content]


def _drain(pipe: relay.Pipe) -> bytes:
    found = b""
    while chunk := os.read(pipe.read_fd, 1 << 20):
        found += chunk
    return found


def _send_all(sock: socket.socket, content: bytes) -> None:
    sock.setblocking(True)
    sock.sendall(content)
    sock.shutdown(socket.SHUT_WR)


def test_tee_and_splice_fan_out(pipe: relay.Pipe, fds: Descriptors, tmp_path: Path) -> None:
    """tee, then drain just what it gave: two readers and a file get the whole stream."""
    content = payload(6, 300_000)
    out = fds.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    source = fds.memfd(content)
    with relay.Pipe(65536) as copy:
        seen = b""
        moved = 0
        while count := relay.splice(source, pipe, 65536):
            while count:
                teed = relay.tee(pipe, copy, count)
                assert relay.splice(pipe, out, teed) == teed
                seen += read(copy, teed)
                count -= teed
                moved += teed
    assert moved == len(content)
    assert seen == content == (tmp_path / "out").read_bytes()


def test_mistakes_are_named(fds: Descriptors, pipe: relay.Pipe, tmp_path: Path) -> None:
    """No pipe at either end, a blocking socket with a timeout, no bytes: an error that says what to do."""
    near, _far = fds.unix_pair(blocking=True)
    with pytest.raises(ValueError, match="setblocking"):
        relay.splice(pipe, near, 10, timeout=1)
    file = fds.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="one end must be a pipe") as refused:
        relay.splice(file, file, 10)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="negative"):
        relay.splice(pipe, near, -1)
    with pytest.raises(ValueError, match="nothing to do"):
        relay.tee(pipe, pipe, 0)
    pipe_without_reader = fds.pipe()
    fds.close(pipe_without_reader.r)
    with pytest.raises(BrokenPipeError):
        relay.vmsplice(b"x", pipe_without_reader.w)


@pytest.mark.parametrize("lent", [True, False], ids=["lent", "copied"])
def test_busy_ends_move_the_same_bytes(pipe: relay.Pipe, lent: bool) -> None:
    """Ends that keep their CPU instead of sleeping give and take every byte once, in order."""
    content = payload(21, (4 << 20) + 3)
    got = bytearray()

    def take() -> None:
        with relay.Pipe() as onward:
            while count := relay.splice(pipe, onward, 100_000, busy=1.0):
                while count:
                    piece = os.read(onward.read_fd, count)
                    got.extend(piece)
                    count -= len(piece)

    taker = threading.Thread(target=take)
    taker.start()
    with relay.Arena(content) as arena:
        assert relay.vmsplice(arena if lent else content, pipe, busy=1.0) == len(content)
    pipe.close_write()
    taker.join(20)
    assert bytes(got) == content


def test_busy_ends_keep_to_the_time(pipe: relay.Pipe) -> None:
    """A busy wait is over when its time is, whether it was spinning or asleep by then."""
    for busy in (0.01, 10.0):
        begun = time.monotonic()
        with pytest.raises(BlockingIOError):
            relay.splice(pipe, pipe, 1, timeout=0.05, busy=busy)
        assert 0.04 < time.monotonic() - begun < 5


def test_spinning_says_what_it_found(pipe: relay.Pipe) -> None:
    """Spinning ends at once where the descriptor is ready, and says so; a closed one is its errno, or ready."""
    assert core.lib.relay_spin(pipe.write_fd, 4, 10**12) == 1
    assert core.lib.relay_spin(pipe.read_fd, 1, 1000) == 0


@pytest.mark.parametrize("size", [0, 1, 4097, (8 << 20) - 1, (8 << 20) + 13])
def test_large_copies_are_whole(size: int) -> None:
    """However much is copied and by whatever instruction, it is those bytes and not one more."""
    source, target = payload(22, size), bytearray(b"?" * (size + 64))
    with core.ffi.from_buffer("char[]", target) as to, core.ffi.from_buffer("char[]", source) as content:
        core.lib.relay_copy(to, content, size)
    assert target[:size] == source
    assert target[size:] == b"?" * 64
