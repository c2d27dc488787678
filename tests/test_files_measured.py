"""What a stream to files costs: the threads that write them count, and `auto` compares its ways by that."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from descriptors import Descriptors
from line import File, Line
from peers import PATIENCE, assert_same, connected, payload, send_all
from relays import Relay

from relay.engine import Engine
from relay.kernel import core
from relay.pipeline import balance, crossing

MIB = 1 << 20
WORK = 20_000_000  # nanoseconds, far more than the engine takes for a few bytes


def of_thread(line: Line) -> int:
    """Nanoseconds of CPU that the thread of the line's only ferry took so far."""
    ident = line.ferries[0]._thread.ident
    assert ident is not None
    return time.clock_gettime_ns(time.pthread_getcpuclockid(ident))


def gauge(line: Line, since: int, until: int) -> None:
    """What comes between those positions is a sample."""
    line.c.gauge_from, line.c.gauge_until = since, until
    line.c.cpu_ns = line.c.gauged = 0
    line.c.sample += 1


def until(line: Line, what: str) -> None:
    """Turns the engine, without a pause, until that event has come."""
    deadline = time.monotonic() + PATIENCE
    while all(seen != what for seen, _who, _error in line.events):
        assert time.monotonic() < deadline, f"no {what}"
        line.turn(0.05)


@pytest.mark.parametrize("copy", [False, True])
def test_the_thread_that_writes_a_file_is_in_the_sample(engine: Engine, fds: Descriptors, copy: bool) -> None:
    """A file that is handed references costs its thread the copy: a sample has that, byte for byte of its loads."""
    data = payload(1, MIB) * 24
    target = fds.memfd()
    line = Line(engine, fds, data, [File(target, copy)])
    gauge(line, 0, len(data) // 2)
    began = of_thread(line)
    until(line, "GAUGED")
    (ferry,) = line.ferries
    assert line.c.gauged >= len(data) // 2
    assert 0 < ferry.c.weighed <= line.c.gauged
    assert 0 < ferry.c.weighed_ns <= of_thread(line) - began
    assert line.c.gauge_until == 0
    until(line, "SINK_DRAINED")
    line.end_ferries()
    line.close()


def test_loads_of_another_sample_do_not_count(engine: Engine, fds: Descriptors) -> None:
    """What was handed over before a sample began comes back untold, and a second sample has only its own loads."""
    data = payload(2, MIB) * 24
    line = Line(engine, fds, data, [File(fds.memfd())])
    gauge(line, 8 * MIB, 16 * MIB)
    until(line, "GAUGED")
    (ferry,) = line.ferries
    # at most what came from where it begins on, and what the pipes of both sides held then
    assert 0 < ferry.c.weighed <= line.c.fed - 8 * MIB + 4 * 65536
    first = int(ferry.c.sample)
    line.events.clear()
    begins = int(line.c.fed)
    gauge(line, begins, begins + 4 * MIB)
    until(line, "GAUGED")
    assert ferry.c.sample == first + 1
    assert 0 < ferry.c.weighed <= line.c.fed - begins + 4 * 65536
    until(line, "SINK_DRAINED")
    line.end_ferries()
    line.close()


def test_a_sample_waits_for_a_load_to_come_back(fds: Descriptors) -> None:
    """Bytes that were all read tell nothing while no thread has written any: then the sample ends with the first."""
    source, held = fds.pipe(), [fds.pipe(), fds.pipe()]
    chain = fds.pipe()
    ferry = core.new("ferry", fd=-1, method=core.SPLICE)
    ferry.knock, ferry.answer = (fds.keep(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2))
    for k, ends in enumerate(held):
        ferry.pipe_r[k], ferry.pipe_w[k] = ends
    sink = core.new_end(kind=core.FERRY)
    sink.ferry = ferry
    node = core.new("node", pipe_r=chain.r, pipe_w=chain.w, capacity=65536, left=-1, align=1, sink=sink)
    end = core.new_end(source.r)
    engine = core.new("engine", epoll=-1, budget=1 << 20)
    pipeline = core.new("pipeline", head=node, nodes=1, source=end, gauge_until=1000, sample=1)
    out = core.ffi.new("struct relay_event[]", 64)

    def told() -> list[int]:
        end.readable = 1
        pipeline.queued = 0
        engine.ready_first = engine.ready_last = core.ffi.NULL
        return [out[i].what for i in range(core.lib.relay_sweep(engine, pipeline, out, 64))]

    os.write(source.w, payload(3, 2000))
    assert core.GAUGED not in told()
    assert pipeline.gauged == 2000
    assert core.GAUGED not in told()
    assert core.lib.relay_ferry_wait(ferry) == 2000
    began = time.thread_time_ns()
    while time.thread_time_ns() < began + WORK:  # as if it wrote to a file
        pass
    core.lib.relay_ferry_give_back(ferry)
    assert told() == [core.GAUGED]
    assert ferry.weighed == 2000
    assert pipeline.cpu_ns >= ferry.weighed_ns >= WORK


@pytest.mark.parametrize("count", [2, 3])
def test_auto_measures_a_stream_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Both ways are tried while files are written: each is whole, and the record tells what each way cost."""
    monkeypatch.setattr(balance, "SHARE", 0.5)
    monkeypatch.setattr(crossing, "PATIENCE", 10.0)
    data = payload(4, MIB) * 128
    stages = [{"tee": {"to": f"file://{tmp_path}/f{number}"}} for number in range(1, count)]
    route = {"source": "tcp://127.0.0.1:0", "stages": stages, "sink": f"file://{tmp_path}/f0"}
    with Relay(route) as relay, connected(relay.bound[-1]) as source:
        send_all(source, data)
        source.shutdown(socket.SHUT_WR)
        record = relay.wait()
    assert record is not None
    for number in range(count):
        assert_same((tmp_path / f"f{number}").read_bytes(), data)
    told = record.as_dict()["measured"]
    assert told["began"] == "copy"
    assert min(told["samples"].values()) > 0
    assert all(cost > 0 for cost in told["cpu_seconds_per_gib"].values())
    assert sum(told["bytes"].values()) == len(data)
    most = "copy" if told["bytes"]["copy"] > told["bytes"]["zero-copy"] else "splice"
    assert {sink.method for sink in record.sinks} == {most}


@pytest.mark.parametrize(("size", "all_of_them"), [(512, False), (32768, True)])
def test_of_small_sweeps_only_some_are_measured(fds: Descriptors, size: int, all_of_them: bool) -> None:
    """The clock is not looked at for each small message, which would cost as much as moving it; for each large one."""
    source, chain, sink = fds.pipe(), fds.pipe(), fds.pipe()
    end, out_end = core.new_end(source.r), core.new_end(sink.w)
    node = core.new("node", pipe_r=chain.r, pipe_w=chain.w, capacity=65536, left=-1, align=1, sink=out_end)
    engine = core.new("engine", epoll=-1, budget=1 << 20)
    pipeline = core.new("pipeline", head=node, nodes=1, source=end, gauge_until=1 << 40, sample=1)
    out = core.ffi.new("struct relay_event[]", 64)
    count = 400
    for _ in range(count):
        os.write(source.w, bytes(size))
        end.readable = out_end.writable = 1
        pipeline.queued = 0
        engine.ready_first = engine.ready_last = core.ffi.NULL
        core.lib.relay_sweep(engine, pipeline, out, 64)
        assert len(os.read(sink.r, 65536)) == size
    assert pipeline.fed == count * size
    assert (pipeline.gauged == pipeline.fed) == all_of_them
    assert pipeline.fed / 32 < pipeline.gauged <= (pipeline.fed if all_of_them else pipeline.fed / 2)
