"""Ferries: whole pipes change hands between the pump and a thread that may block."""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import socket
import threading
from pathlib import Path

import pytest
from descriptors import Descriptors
from line import File, Line
from peers import assert_same, eventually, payload, read_all
from syscalls import readable

from relay.endpoints.ferry import FOR_LARGE, LARGE, MOST_MEMORY, SMALL
from relay.endpoints.written import Writing, WrittenFile
from relay.engine import Engine
from relay.kernel import core


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


def loaded(fds: Descriptors, target: int, load: bytes) -> core.Struct:
    """A ferry to `target` that no thread carries yet, its first load handed over."""
    knock, answer = (fds.keep(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2))
    ferry = core.new("ferry", fd=target, method=core.SPLICE, knock=knock, answer=answer)
    for k in range(2):
        ferry.pipe_r[k], ferry.pipe_w[k] = fds.pipe()
    ferry.load[0] = os.write(ferry.pipe_w[0], load)
    return ferry


def test_without_a_buffer_copying_asks_for_one(fds: Descriptors, tmp_path: Path) -> None:
    """relay_ferry_run says ENOBUFS, keeps the load, and goes on where it was once it has a buffer."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    ferry = loaded(fds, target, b"x" * 5000)
    core.lib.relay_ferry_end(ferry)
    assert core.lib.relay_ferry_run(ferry) == -errno.ENOBUFS
    assert readable(ferry.pipe_r[0]) == 5000
    buffer = core.buffer(1000)
    ferry.buffer, ferry.buffer_size = buffer, 1000
    assert core.lib.relay_ferry_run(ferry) == 0
    assert (tmp_path / "out").read_bytes() == b"x" * 5000


def can_take(fd: int) -> bool:
    """Whether a write would not block."""
    return bool(select.select([], [fd], [], 0)[1])


def sleeps(name: str) -> bool:
    """Whether the one thread of that name waits in the kernel."""
    (thread,) = (each for each in threading.enumerate() if each.name == name)
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] in "SD"


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
        with_thread = ferry.turn[0] == ferry.turn[1] == 1 and stalled.nodes[0].full
        # until the fifo is full and the thread asleep in front of it a load may still come back
        return bool(with_thread and not can_take(blocking) and sleeps("test-ferry"))

    eventually(stuck, "the thread sleeps with both pipes, and the pipe before them is full")
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


# --- loads in memory, loads that wait for more, blocks reserved ahead ---------------------------------------


def straight(engine: Engine, fds: Descriptors, source: socket.socket, target: int) -> Line:
    """A line from a socket to a file, past the node's pipe."""
    line = Line(engine, fds, source, [File(target)])
    line.source.method = core.COPY
    for node in line.nodes:
        node.tee_copies = node.out_copies = 0
    assert line.ferries[0].have_memory()
    return line


def test_a_socket_is_read_straight_into_memory(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """A stream of pieces of every size is the same in the file, the node's pipe stays empty, its loads are whole."""
    data = payload(6, 5_000_001)
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = straight(engine, fds, ours, target)

        def feed() -> None:
            chance, at = random.Random(6), 0
            while at < len(data):
                size = chance.choice([1, 700, 65_536, 1_000_000])
                theirs.sendall(data[at : at + size])
                at += size
            theirs.shutdown(socket.SHUT_WR)

        feeder = threading.Thread(target=feed)
        feeder.start()
        line.until("SINK_DRAINED", "sink0")
        feeder.join()
        line.end_ferries()
        assert line.nodes[0].passed == len(data)
        assert readable(line.nodes[0].pipe_r) == 0
        line.close()
    assert line.ferries[0].c.moved == line.sinks[0].moved == len(data)
    assert_same((tmp_path / "out").read_bytes(), data)


def test_bytes_already_in_the_pipe_come_first(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """Loads of pipe and of memory alternate in the order in which their bytes came."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = straight(engine, fds, ours, target)
        line.source.method = core.SPLICE
        theirs.sendall(b"first,")
        eventually(lambda: line.turn(0.01) or line.sinks[0].moved == 6, "the pipe's bytes are handed over")
        line.source.method = core.COPY
        theirs.sendall(b"second,")
        eventually(lambda: line.turn(0.01) or line.sinks[0].moved == 13, "the memory's bytes are taken")
        line.source.method = core.SPLICE
        theirs.sendall(b"third")
        theirs.shutdown(socket.SHUT_WR)
        line.until("SINK_DRAINED", "sink0")
        line.end_ferries()
        line.close()
    assert (tmp_path / "out").read_bytes() == b"first,second,third"


def test_what_waits_for_more_leaves_by_itself(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """After a rush a small rest, less than the mark that wakes, is in the file although nothing else happens."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as theirs,
    ):
        ours, _ = listener.accept()
        with ours:
            ours.setblocking(False)
            line = straight(engine, fds, ours, target)
            data = payload(8, 3_000_000)
            feeder = threading.Thread(target=theirs.sendall, args=(data,))
            feeder.start()
            eventually(
                lambda: line.turn(0.01) or os.fstat(target).st_size == len(data), "the rest leaves as well"
            )
            feeder.join()
            theirs.sendall(b"x")
            eventually(lambda: line.turn(0.01) or os.fstat(target).st_size == len(data) + 1, "so does a byte")
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
            assert line.source.mark == 0
            theirs.shutdown(socket.SHUT_WR)
            line.until("SINK_DRAINED", "sink0")
            line.end_ferries()
            line.close()


def test_a_nudge_comes_before_the_next_load(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """`carry` returns when it was nudged, with the load still to be carried, and goes on when called again."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    ferry = loaded(fds, target, b"x" * 500)
    core.lib.relay_ferry_nudge(ferry)
    core.lib.relay_ferry_end(ferry)
    assert core.lib.relay_ferry_run(ferry) == -errno.EINTR
    assert readable(ferry.pipe_r[0]) == 500
    assert core.lib.relay_ferry_run(ferry) == 0
    assert (tmp_path / "out").read_bytes() == b"x" * 500


def test_memory_has_a_bound(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """Few ferries have large loads, many have small ones, and those beyond the bound of their engine do with pipes;
    what they had is free again when they are closed."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    few = FOR_LARGE // (2 * LARGE)
    many = (MOST_MEMORY - FOR_LARGE) // (2 * SMALL)
    lines = [Line(engine, fds, b"", [File(target)]) for _ in range(few + many + 1)]
    assert [line.ferries[0].have_memory() for line in lines] == [True] * (few + many) + [False]
    assert [line.ferries[0].c.room for line in lines] == [LARGE] * few + [SMALL] * many + [0]
    assert engine.ferried == MOST_MEMORY
    for line in lines:
        line.close()
    assert engine.ferried == 0


def test_without_memory_a_ferry_does_with_pipes(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """Where the system refuses the memory the answer is no, and none of it counts as taken."""
    target = fds.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    line = Line(engine, fds, b"", [File(target)])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, hard))
    try:
        had = line.ferries[0].have_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    line.close()
    assert not had
    assert engine.ferried == 0


def test_reserved_blocks_are_given_back(fds: Descriptors, tmp_path: Path) -> None:
    """A file that grew beyond the step of its reservations has no more blocks than its bytes need, whole or not."""
    written = WrittenFile(tmp_path / "out", Writing())
    fd = written.open()
    try:
        if not written.ahead:
            pytest.skip("the temporary directory is not on ext4")
        before = payload(2, 5_000_000)
        os.write(fd, before)
        pipes = [fds.pipe(), fds.pipe()]
        knock, answer = (fds.keep(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2))
        ferry = core.new("ferry", fd=fd, method=core.SPLICE, knock=knock, answer=answer, ahead=written.ahead)
        ferry.moved = len(before)
        for k, ends in enumerate(pipes):
            ferry.pipe_r[k], ferry.pipe_w[k] = ends
        ferry.load[0] = os.write(pipes[0].w, b"y" * 60_000)
        core.lib.relay_ferry_end(ferry)
        assert core.lib.relay_ferry_run(ferry) == 0
        assert ferry.reserved == len(before) + 60_000 + written.ahead
        assert os.fstat(fd).st_blocks * 512 >= ferry.reserved - 60_000
        written.trim(ferry.reserved)
        status = os.fstat(fd)
        assert status.st_size == len(before) + 60_000
        assert status.st_blocks * 512 < status.st_size + 65_536
    finally:
        written.close()
