"""The loop: edges, budgets, fairness, times, and a loop with nothing to do that does nothing."""

from __future__ import annotations

import logging
import os
import random
import select
import time
from functools import partial
from typing import Any

import pytest
from descriptors import Descriptors
from line import Line
from peers import assert_same, payload, read_all

from relay.engine import TIMERS, Engine
from relay.kernel import core
from relay.kernel.ring import Reader, Ring


def null(fds: Descriptors) -> int:
    """/dev/null."""
    return fds.open(os.devnull, os.O_WRONLY)


def ready(engine: Engine) -> list[Any]:
    """The ready list, from its first to its last."""
    found, at = [], engine.c.ready_first
    while at:
        found.append(at)
        at = at.ready_next
    assert engine.c.ready_last == (found[-1] if found else core.ffi.NULL)
    return found


def timed(engine: Engine) -> list[Any]:
    """The pipelines that wait for a time; the list is whole in both directions."""
    found, at, before = [], engine.c.timed, core.ffi.NULL
    while at:
        assert at.timed_prev == before
        found.append(at)
        before, at = at, at.timed_next
    return found


def test_a_budget_hands_the_turn_on(engine: Engine, fds: Descriptors) -> None:
    """Two pipelines that always could go on share turn by turn, and no event is needed to go on."""
    engine.c.budget = 100_000
    data = payload(1, 2_000_000)
    lines = [Line(engine, fds, data, [null(fds)]) for _ in range(2)]
    turns = 0
    while not all(("DONE", "pipeline", 0) in line.events for line in lines):
        engine.turn(0)
        turns += 1
        moved = [line.source.moved for line in lines]
        assert abs(moved[0] - moved[1]) <= 100_000 + 65536
        assert turns < 1000
    assert turns >= 10
    for line in lines:
        assert line.source.moved == len(data)
        line.close()


def test_one_edge_is_enough_for_all_that_has_come(engine: Engine, fds: Descriptors) -> None:
    """A source that was readable once, while the chain was full, is read to its end as the sink empties."""
    source, sink = fds.pipe(1 << 20), fds.pipe(4096)
    data = payload(2, 900_000)
    assert os.write(source.w, data) == len(data)
    fds.close(source.w)
    line = Line(engine, fds, source.r, [sink.w], capacity=8192)
    got = b""
    while ("SINK_DRAINED", "sink0", 0) not in line.events:
        engine.turn(5)
        got += os.read(sink.r, 4096)
    line.close()
    fds.close(sink.w)
    assert_same(got + read_all(sink.r), data)


def test_small_messages_are_seen_one_by_one(engine: Engine, fds: Descriptors) -> None:
    """After each EAGAIN the next edge is heard: a thousand messages, and none waits for a time-out."""
    (near, source), sink = fds.unix_pair(), fds.pipe()
    line = Line(engine, fds, source, [sink.w])
    engine.turn(0)
    for number in range(1000):
        message = number.to_bytes(4, "big")
        near.send(message)
        engine.turn(5)
        assert os.read(sink.r, 100) == message
    assert engine.c.calls < 1000 * 5
    line.close()


@pytest.mark.parametrize("way", ["chain", "ring"])
@pytest.mark.parametrize("kind", ["tcp", "pipe"])
def test_a_clogged_sink_wakes_nobody(engine: Engine, fds: Descriptors, kind: str, way: str) -> None:
    """When nothing can move the loop sleeps, makes no call for payload, and wakes once for each edge."""
    source = fds.pipe(65536)
    if kind == "tcp":
        near, far = fds.tcp_pair(receive_buffer=4096)
        sink: Any = near
    else:
        ends = fds.pipe(4096)
        sink = ends.w
    line = Line(engine, fds, source.r, [sink])
    if way == "ring":
        ring = Ring.pooled(engine.rings, 0, 0)
        assert ring
        reader = Reader(line.sinks[0], 1e6)
        reader.c.stays = 1
        ring.join(reader)
        line.c.ring = ring.c
    for _ in range(2000):
        before = line.source.moved
        fds.fill(source)
        engine.turn(0.02)
        if line.source.moved == before and engine.c.ready_first == core.ffi.NULL:
            break
    for _ in range(20):  # what the kernel still had to say, such as acknowledgements
        engine.turn(0.02)
    calls, wakeups = engine.c.calls, engine.c.wakeups
    began = time.monotonic()
    engine.turn(0.1)
    assert time.monotonic() - began >= 0.09
    assert (engine.c.calls, engine.c.wakeups) == (calls, wakeups + 1)

    taken = len(far.recv(1 << 20)) if kind == "tcp" else len(os.read(ends.r, 1 << 20))
    for _ in range(20):
        engine.turn(0.01)
    assert taken > 0
    assert line.sinks[0].moved > 0
    assert engine.c.calls - calls < 60
    line.close()
    if way == "ring":
        line.c.ring = core.ffi.NULL
        ring.leave(reader)


def test_a_throttled_pipeline_wakes_in_time_and_seldom(engine: Engine, fds: Descriptors) -> None:
    """A rate wakes the loop when a quantum is due, in steps of about 10 ms, with no other event."""
    line = Line(engine, fds, payload(3, 60_000), [null(fds)])
    line.nodes[0].rate, line.nodes[0].burst = 1_000_000, 10_000
    began = time.monotonic()
    while ("DONE", "pipeline", 0) not in line.events:
        engine.turn(5)
        assert engine.c.wakeups < 40
    assert 0.045 < time.monotonic() - began < 4
    assert timed(engine) == []
    line.close()


def test_a_forgotten_pipeline_is_on_no_list(engine: Engine, fds: Descriptors) -> None:
    """Queued, timed or both, first or last: relay_forget takes out that pipeline and nothing else."""
    generator = random.Random(4)
    lines = [Line(engine, fds, b"x" * 5000, [null(fds)], capacity=4096) for _ in range(6)]
    for line in lines:
        line.nodes[0].rate, line.nodes[0].burst = 1, 1
    events = core.ffi.new("struct relay_event[]", 64)
    queued, waiting = [line.c for line in lines], []
    for _ in range(2000):
        c = generator.choice(lines).c
        action = generator.choice(["ready", "sweep", "forget"])
        if action == "ready":
            engine.ready(c)
            if c not in queued:
                queued.append(c)
        elif action == "sweep":
            core.lib.relay_sweep(engine.c, c, events, 64)
            if c not in waiting:
                waiting.insert(0, c)
        else:
            engine.forget(c)
            engine.ready(c)  # it may be freed by now: somebody who still knows it puts it on no list
            assert ready(engine) == [other for other in queued if other != c]
            c.forgotten = 0  # another one in its place
            queued = [other for other in queued if other != c]
            waiting = [other for other in waiting if other != c]
        assert ready(engine) == queued
        assert timed(engine) == waiting
    for line in lines:
        line.close()
    assert ready(engine) == timed(engine) == []


def test_an_event_is_heard_by_both_ways(engine: Engine, fds: Descriptors) -> None:
    """An end that one pipeline reads and another writes turns both of them."""
    client, here = fds.unix_pair()
    other, there = fds.unix_pair()
    forth = Line(engine, fds, here, [there.fileno()])
    engine.drop_end(forth.sinks[0])
    forth.sinks[0].kind = 0
    back = Line(engine, fds, there, [other.fileno()])
    for line in (forth, back):
        line.close()
        line.c.forgotten = 0  # it has other ends now
    end, reply = core.new_end(here.fileno()), core.new_end(there.fileno())
    end.is_socket = reply.is_socket = 1
    end.reads, end.writes, reply.reads, reply.writes = forth.c, back.c, back.c, forth.c
    forth.c.source, forth.nodes[0].sink = end, reply
    back.c.source, back.nodes[0].sink = reply, end
    for one in (end, reply):
        assert engine.add_end(one, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP) == 0
    client.send(b"question")
    engine.turn(5)
    assert other.recv(100) == b"question"
    other.send(b"answer")
    engine.turn(5)
    assert client.recv(100) == b"answer"
    for one in (end, reply):
        engine.drop_end(one)
    for line in (forth, back):
        engine.forget(line.c)


def test_watched_descriptors_are_told_of_until_they_are_not(engine: Engine, fds: Descriptors) -> None:
    """A watch is level-triggered: it comes again while there is something, and stops when it is closed."""
    ends = fds.pipe()
    seen: list[int] = []
    watch = engine.watch(ends.r, select.EPOLLIN, seen.append)
    engine.turn(0)
    assert seen == []
    os.write(ends.w, b"x")
    engine.turn(5)
    engine.turn(5)
    assert seen == [select.EPOLLIN, select.EPOLLIN]
    watch.close()
    engine.turn(0)
    assert len(seen) == 2


def test_more_ready_than_fits_one_turn_waits_for_the_next(engine: Engine, fds: Descriptors) -> None:
    """When the room for events is used up the pipelines left over stay ready, and none is forgotten."""
    events = core.ffi.new("struct relay_event[]", 24)
    lines = [Line(engine, fds, b"x" * 100, [null(fds)]) for _ in range(8)]
    rounds = 0
    while ready(engine):
        assert core.lib.relay_poll(engine.c, 0, events, 24) >= 0
        rounds += 1
        assert rounds < 50
    assert all(line.source.moved == 100 for line in lines)
    assert rounds > 1
    for line in lines:
        line.close()


@pytest.mark.parametrize("coarse", [0, 1])
def test_a_wait_ends_when_it_is_due_and_not_before(engine: Engine, coarse: int) -> None:
    """Half a millisecond is waited for as half a one; without epoll_pwait2 it is rounded up, and nothing spins."""
    engine.c.coarse = coarse
    took, turns = [], 0
    for _ in range(20):
        fired: list[float] = []
        began = time.monotonic()
        engine.later(0.0005, lambda fired=fired: fired.append(time.monotonic()))  # type: ignore[misc]
        while not fired:
            engine.turn(engine._until_due())
            turns += 1
        took.append(fired[0] - began)
    if engine.c.coarse != coarse:
        pytest.skip("epoll_pwait2 is missing: Linux 5.11")
    assert min(took) >= 0.0005
    assert min(took) < (0.0009 if not coarse else 0.01)
    assert turns <= 60


def test_timers_that_were_cancelled_are_not_kept(engine: Engine) -> None:
    """Ten thousand that were due in an hour leave no more than TIMERS behind; the others run, in order."""
    ran: list[int] = []
    wanted = [engine.later(0.2 - number / 1e3, partial(ran.append, number)) for number in range(100)]
    for _ in range(10_000):
        engine.later(3600.0, list).cancel()
    assert len(wanted) <= len(engine._timers) <= TIMERS
    end = time.monotonic() + 5
    while len(ran) < len(wanted) and time.monotonic() < end:
        engine.turn(0.01)
    assert ran == sorted(range(100), key=lambda number: wanted[number].due)


def test_events_are_read_whole() -> None:
    """What Python takes out of the memory of C's events is what their fields say, for every width of them."""
    chance = random.Random(7)
    events = core.ffi.new("struct relay_event[]", 50)
    told = []
    for event in events[0:50]:
        told.append(
            (
                chance.getrandbits(64),
                chance.randrange(40),
                chance.randint(-1000, 1000),
                chance.getrandbits(32),
            )
        )
        event.token, event.what, event.error, event.mask = told[-1]
    assert list(core.EVENT.iter_unpack(core.ffi.buffer(events))) == told


def test_a_callback_that_fails_is_said_and_harms_nobody_else(
    engine: Engine, fds: Descriptors, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two descriptors that are ready at once the second is heard of although the first one's callback raised."""
    monkeypatch.setattr(logging.getLogger("relay"), "propagate", True)
    pipes, heard = [fds.pipe() for _ in range(2)], []

    def fails(_mask: int) -> None:
        heard.append("first")
        raise ValueError("nobody thought of it")

    watches = [
        engine.watch(pipes[0].r, select.EPOLLIN, fails),
        engine.watch(pipes[1].r, select.EPOLLIN, lambda _mask: heard.append("second")),
    ]
    for pipe in pipes:
        os.write(pipe.w, b"x")
    engine.turn(1.0)
    for watch in watches:
        watch.close()
    assert sorted(heard) == ["first", "second"]
    (said,) = [record for record in caplog.records if record.name == "relay.engine"]
    assert "ValueError in a callback of test: nobody thought of it" in said.getMessage()
    assert said.exc_info is not None
