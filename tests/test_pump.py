"""The C pump against its model in plain Python, over real pipes, in what is worth a test of its own."""

from __future__ import annotations

import errno
import os
import random
from typing import Any

import pytest
from descriptors import Descriptors
from rig import NAMES, Rig
from schedules import PIECES, check, finish
from twins import Outlet, Spec

from relay.kernel import core


def slow_gate(fds: Descriptors, **more: Any) -> tuple[Rig, Outlet]:
    """A tail and, in front of it, a branch whose reader does not read and which drops in pieces of 1000."""
    spec = Spec("gate", slots=4, leaf_slots=1, sink_slots=1, after=1, align=1000, **more)
    rig = Rig(fds, [spec, Spec("tail", null=True)])
    return rig, rig.outlets[0]


def test_a_gap_begins_when_the_piece_under_way_is_whole(fds: Descriptors) -> None:
    """A reader that falls behind gets its unfinished piece, then nothing, then whole pieces again."""
    rig, outlet = slow_gate(fds)
    for _ in range(8):
        rig.feed(3333)
        rig.sweep()
    assert rig.events.count(("SLOW", outlet.gate.model.name, 0)) == 1
    for _ in range(20):
        rig.read(outlet, 5000)
        rig.feed(333)
        rig.sweep()
    finish(rig)
    check(rig, outlet)
    assert outlet.gate.c.dropped > 0
    assert ("CAUGHT_UP", outlet.gate.model.name, 0) in rig.events


@pytest.mark.parametrize("copies", [False, True])
def test_a_gap_that_is_called_off_leaves_nothing_behind(fds: Descriptors, copies: bool) -> None:
    """A branch that is cut off while the piece before its gap is kept aside counts that piece as dropped."""
    rig, outlet = slow_gate(fds, tee_copies=copies, out_copies=copies)
    while not outlet.gate.c.rest_have:
        rig.feed(1111)
        rig.sweep()
    outlet.gate.c.dropping, outlet.gate.model.dropping = 0, False
    outlet.gate.c.left = outlet.gate.model.left = 0
    rig.sweep()
    assert outlet.gate.c.rest_have == 0
    assert outlet.gate.c.passed + outlet.gate.c.dropped <= rig.source.moved


def broadcast(fds: Descriptors, **more: Any) -> Rig:
    """A pipeline that ends in a broadcast."""
    return Rig(fds, [Spec("tail", **{"null": True, "ring": 1, "slots": 64, **more})], source_slots=64)


@pytest.mark.parametrize("align", [1, 188])
@pytest.mark.parametrize("seed", range(8))
def test_whoever_joins_gets_the_last_bytes_and_then_what_follows(
    fds: Descriptors, seed: int, align: int
) -> None:
    """At whatever moment somebody joins, the burst and what follows are one run of the stream, from a border on."""
    rig, chance = broadcast(fds, ring=65536, keep=30000, align=align), random.Random(seed)
    joined: list[tuple[Outlet, int]] = []
    for _ in range(60):
        rig.feed(chance.randrange(20000), chance.choice(PIECES))
        if chance.random() < 0.5:
            rig.sweep()
        if chance.random() < 0.2:
            joined.append((rig.join(16, 10**9), int(rig.ring[0].c.position)))  # type: ignore[index]
        for outlet, _at in joined:
            rig.read(outlet, chance.randrange(1, 60000))
    finish(rig)
    assert joined
    for outlet, at in joined:
        first = max(0, at - 30000)
        first += -first % align
        assert outlet.began == first
        assert outlet.got == rig.fed[first:]


def test_without_readers_bytes_pass_and_no_memory_is_held(fds: Descriptors) -> None:
    """A broadcast that nobody reads takes the stream at any size; the last reader to go gives the memory back."""
    rig = broadcast(fds)
    ring = rig.ring[0]  # type: ignore[index]
    rig.feed(100_000)
    rig.sweep()
    assert (ring.c.position, bool(ring.c.memory)) == (100_000, False)
    outlet = rig.join(16, 1)
    assert ring.c.memory
    rig.leave(outlet)
    assert not ring.c.memory
    rig.feed(100_000)
    rig.sweep()
    assert ring.c.position == 200_000


def test_a_slow_reader_holds_the_source_for_its_time_and_then_skips(fds: Descriptors) -> None:
    """Full, it holds everybody; slow, it drops for itself: a gap of whole pieces, and it goes on at the newest."""
    rig = broadcast(fds, ring=28672, reserve=4096, align=188)
    slow, quick = rig.join(1, 10**9), rig.join(16, 10**9)
    held = -1
    while held < rig.source.moved:
        held = int(rig.source.moved)
        rig.feed(10_000)
        rig.sweep()
        rig.read(quick, 1 << 20)
    assert slow.reader[0].c.since_ns  # type: ignore[index]
    assert 32768 <= held <= 32768 + 64 * 4096 + 4096
    rig.later(10**10)
    assert ("SLOW", slow.model.name, 0) in rig.sweep()
    while rig.source.moved < 1_000_000:
        rig.feed(10_000)
        rig.sweep()
        rig.read(quick, 1 << 20)
    while not rig.read(slow, 1 << 20) or slow.reader[0].c.dropping:  # type: ignore[index]
        rig.sweep()
    assert ("CAUGHT_UP", slow.model.name, 0) in rig.events
    finish(rig)
    for outlet in (slow, quick):
        check(rig, outlet)
    assert quick.got == rig.fed
    assert slow.reader[1].dropped > 900_000  # type: ignore[index]
    assert slow.reader[1].dropped % 188 == 0  # type: ignore[index]


@pytest.mark.parametrize("dropping", [False, True])
def test_a_sink_apart_holds_a_turns_end_no_longer_than_it_may(fds: Descriptors, dropping: bool) -> None:
    """What waits for a sink that holds nobody is not under way: IDLE comes when that took nothing for its time."""
    spec = Spec("gate", leaf_slots=1, sink_slots=1, after=1 if dropping else 0, align=7, apart=10**9)
    rig = Rig(fds, [spec, Spec("tail", null=True)], keep=True)
    rig.feed(30_000 if dropping else 7_000)
    for _ in range(4):
        rig.sweep()
    rig.end()
    rig.sweep()
    rig.pipeline.tell_idle, rig.model.tell_idle = 1, True
    rig.sweep()
    assert ("IDLE", "pipeline", 0) not in rig.events
    rig.later(2 * 10**9)
    rig.sweep()
    assert ("IDLE", "pipeline", 0) in rig.events
    assert rig.steps[1].c.held > 0


def test_between_two_streams_the_pump_says_when_nothing_is_under_way(fds: Descriptors) -> None:
    """With `keep` a source's end is not the stream's, and IDLE comes once the pipes are empty."""
    rig = Rig(fds, [Spec("tee", out_copies=True), Spec("tail", sink_slots=1)], keep=True)
    rig.feed(30000)
    rig.end()
    rig.sweep()
    rig.pipeline.tell_idle, rig.model.tell_idle = 1, True
    rig.sweep()
    assert ("SOURCE_ENDED", "pipeline", 0) in rig.events
    assert ("IDLE", "pipeline", 0) not in rig.events
    while sum(rig.read(outlet, 1 << 20) for outlet in rig.outlets):
        rig.sweep()
    assert rig.events.count(("IDLE", "pipeline", 0)) == 1
    assert not any(what in ("DONE", "SINK_DRAINED") for what, _, _ in rig.events)


def test_a_pipeline_with_nothing_to_do_does_nothing(fds: Descriptors) -> None:
    """Sweeps of a pipeline whose reader stands still ask the kernel for nothing, however often they come."""
    rig = Rig(fds, [Spec("tee", sink_slots=1), Spec("tail")])
    rig.feed(1 << 20)
    for _ in range(4):
        rig.sweep()
    calls = rig.engine.calls
    for _ in range(100):
        rig.source.readable = 0
        rig.model.source.readable = False  # type: ignore[union-attr]
        core.lib.relay_sweep(rig.engine, rig.pipeline, rig._out, 64)
    assert rig.engine.calls == calls


def test_a_pipe_that_was_emptied_or_filled_is_left_alone(fds: Descriptors) -> None:
    """It is not asked again before an edge: whoever is at its other end holds it locked, and a call would spin."""
    rig = Rig(fds, [Spec("tail", sink_slots=16)], pipes=True)
    rig.feed(65536)
    rig.sweep()
    assert rig.engine.calls == 2, "one call into the pipe of relay's own, one out of it"
    assert not rig.source.readable
    assert not rig.outlets[0].c.writable
    rig.feed(1000)
    fds.close(rig.inlet.w)
    rig.inlet_open = False
    rig.ask_poll()
    core.lib.relay_sweep(rig.engine, rig.pipeline, rig._out, 64)
    assert rig.source.readable or rig.pipeline.source_ended, "the end of the stream is not waited for in vain"


def test_one_byte_segments_fill_a_pipe_and_pass(fds: Descriptors) -> None:
    """A pipe full of single bytes is full, not taken for an empty source; its bytes arrive in order."""
    rig = Rig(fds, [Spec("tee", slots=2, sink_slots=1), Spec("tail", slots=2, sink_slots=2)])
    for _ in range(40):
        rig.feed(1)
        rig.sweep()
    finish(rig)
    for outlet in rig.outlets:
        assert outlet.got == rig.fed


@pytest.mark.parametrize("copies", [False, True])
def test_a_device_that_takes_nothing_fails(fds: Descriptors, copies: bool) -> None:
    """A sink that epoll refuses, /dev/full, is not taken for one that forgets: its error is reported."""
    rig = Rig(fds, [Spec("tail", null=True, out_copies=copies)])
    rig.outlets[0].c.fd = fds.open("/dev/full", os.O_WRONLY)
    rig.feed(1000)
    events = swept(rig, 3)
    assert ("SINK_FAILED", "sink of node0", errno.ENOSPC) in events
    assert copies or ("WANTS_COPY", "node0", errno.EINVAL) in events
    assert rig.outlets[0].c.moved == 0


def swept(rig: Rig, times: int) -> set[tuple[str, str, int]]:
    """The events of some sweeps of the C pump alone."""
    found = set()
    for _ in range(times):
        rig.ask_poll()
        count = core.lib.relay_sweep(rig.engine, rig.pipeline, rig._out, 64)
        found |= {(NAMES[e.what], rig.names[e.token], e.error) for e in rig._out[0:count]}
    return found
