"""Ferries: whole pipes change hands between the pump and a thread that may block."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from descriptors import Descriptors
from line import File, Line
from peers import assert_same, eventually, payload, read_all
from syscalls import readable

from relay.engine import Engine
from relay.kernel import core


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without a thread: the test turns it."""
    made = Engine("test")
    yield made
    made.close()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("capacity", [4096, 65536])
def test_loads_arrive_in_order(
    engine: Engine, fds: Descriptors, tmp_path: Path, copy: bool, capacity: int
) -> None:
    """A stream of many loads, through two pipes that alternate, is the same stream in the file."""
    data = payload(7, 700_000)
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    line = Line(engine, fds, data, [File(target, copy, capacity)], copy=copy)
    line.until("SINK_DRAINED", "sink0")
    line.end_ferries()
    line.close()
    assert line.failures == [None]
    assert line.ferries[0].c.moved == line.sinks[0].moved == len(data)
    assert_same((tmp_path / "out").read_bytes(), data)


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_the_last_load_is_handed_over_at_the_end(
    engine: Engine, fds: Descriptors, tmp_path: Path, size: int
) -> None:
    """A ferry that is ended with bytes in a pipe that is not full delivers them; without any it just ends."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    ends = fds.pipe()
    line = Line(engine, fds, ends.r, [File(target)])
    os.write(ends.w, payload(1, size))
    line.turn()
    line.end_ferries()
    line.close()
    assert_same((tmp_path / "out").read_bytes(), payload(1, size))


def test_a_full_device_is_an_error_of_its_sink_alone(engine: Engine, fds: Descriptors) -> None:
    """/dev/full refuses splice, so the ferry copies, and then fails with ENOSPC; the other sink gets all."""
    data = payload(2, 300_000)
    other = fds.pipe(1 << 20)
    line = Line(engine, fds, data, [File(fds.open("/dev/full", os.O_WRONLY)), other.w])
    assert line.until("SINK_FAILED", "sink0") == errno.ENOSPC
    line.until("SINK_DRAINED", "sink1")
    line.close()
    fds.close(other.w)
    assert_same(read_all(other.r), data)
    assert [type(error) for error in line.failures] == [OSError]
    assert line.ferries[0].c.method == core.COPY


def test_a_file_that_refuses_splice_is_copied_and_loses_nothing(
    engine: Engine, fds: Descriptors, tmp_path: Path
) -> None:
    """An O_APPEND file answers EINVAL with a load already in the thread's hands: that load is copied."""
    data = payload(3, 200_000)
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    line = Line(engine, fds, data, [File(target, capacity=8192)])
    line.until("SINK_DRAINED", "sink0")
    line.end_ferries()
    line.close()
    assert_same((tmp_path / "out").read_bytes(), data)


def test_without_a_buffer_copying_asks_for_one(fds: Descriptors, tmp_path: Path) -> None:
    """relay_ferry_run says ENOBUFS, keeps the load, and goes on where it was once it has a buffer."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    pipes = [fds.pipe(), fds.pipe()]
    knock, answer = (fds.keep(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2))
    ferry = core.new("ferry", fd=target, method=core.SPLICE, knock=knock, answer=answer)
    for k, ends in enumerate(pipes):
        ferry.pipe_r[k], ferry.pipe_w[k] = ends
    ferry.load[0] = os.write(pipes[0].w, b"x" * 5000)
    core.lib.relay_ferry_end(ferry)
    assert core.lib.relay_ferry_run(ferry) == -errno.ENOBUFS
    assert readable(pipes[0].r) == 5000
    buffer = core.buffer(1000)
    ferry.buffer, ferry.buffer_size = buffer, 1000
    assert core.lib.relay_ferry_run(ferry) == 0
    assert (tmp_path / "out").read_bytes() == b"x" * 5000


def test_a_file_that_stalls_does_not_stall_the_loop(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """While a thread blocks in a write, other pipelines on the engine move; then the rest arrives."""
    os.mkfifo(tmp_path / "fifo")
    reader = fds.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    blocking = fds.open(tmp_path / "fifo", os.O_WRONLY)
    data = payload(4, 1_000_000)
    stalled = Line(engine, fds, data, [File(blocking)])

    def stuck() -> bool:
        stalled.turn(0.01)
        ferry = stalled.ferries[0].c
        return bool(ferry.turn[0] == ferry.turn[1] == 1 and stalled.nodes[0].full)

    eventually(stuck, "both pipes are with the thread, and the pipe before them is full")
    other = Line(engine, fds, data, [fds.open(os.devnull, os.O_WRONLY)])
    other.until("SINK_DRAINED", "sink0")
    calls = engine.c.calls
    for _ in range(50):
        engine.turn(0)
    assert engine.c.calls == calls, "the loop asks although nothing has changed"

    got: list[bytes] = []
    taker = threading.Thread(target=lambda: got.append(read_all(reader)))
    taker.start()
    stalled.until("SINK_DRAINED", "sink0")
    stalled.end_ferries()
    fds.close(blocking)
    taker.join()
    stalled.close()
    other.close()
    assert_same(got[0], data)


@pytest.mark.parametrize("copy", [False, True])
def test_an_end_that_somebody_made_nonblocking_gets_every_byte(
    engine: Engine, fds: Descriptors, copy: bool
) -> None:
    """EAGAIN from a ferry's end means waiting for it; what was read out of the pipe by then is not lost."""
    data = payload(5, 400_000)
    target = fds.pipe(8192)
    line = Line(engine, fds, data, [File(target.w, copy)])
    got: list[bytes] = []
    eventually(lambda: line.turn(0.01) or readable(target.r) >= 8192, "the end is full")
    taker = threading.Thread(target=lambda: got.append(read_all(target.r)))
    taker.start()
    line.until("SINK_DRAINED", "sink0")
    line.end_ferries()
    line.close()
    fds.close(target.w)
    taker.join()
    assert line.failures == [None]
    assert_same(got[0], data)
