"""The C pump against its model in plain Python, under random schedules over real pipes; and over sockets.

RELAY_EXAMPLES sets the number of random schedules (default 120); the sanitized run takes fewer.
"""

from __future__ import annotations

import errno
import os
import random
from typing import Any

import pytest
from descriptors import Descriptors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import Node, Ring
from rig import NAMES, Outlet, Rig, Scatter, Spec

from relay.kernel import core

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "120"))
SEEDED = settings(
    derandomize=True,
    database=None,
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SLOTS = st.sampled_from([1, 2, 4, 16])
PIECES = [1, 7, 100, 4095, 4096, 4097, 65536]

SPECS = st.builds(
    Spec,
    kind=st.sampled_from(["tee", "tee", "gate", "gate", "plain"]),
    slots=SLOTS,
    leaf_slots=SLOTS,
    sink_slots=SLOTS,
    tee_copies=st.sampled_from([False, False, True]),
    out_copies=st.sampled_from([False, False, True]),
    stash=st.sampled_from([1, 1000, 8192, 65536]),
    rate=st.sampled_from([0, 0, 0, 50, 10_000, 10_000_000]),
    skip=st.sampled_from([0, 0, 0, 1, 5000]),
    left=st.sampled_from([-1, -1, -1, -1, 0, 1, 9000]),
    prefix=st.sampled_from([0, 0, 0, 1, 4096, 9000]),
    after=st.sampled_from([0, 0, 1, 1000]),
    align=st.sampled_from([1, 4, 188, 3000]),
    null=st.sampled_from([False, False, False, True]),
    hold=st.sampled_from([False, False, True]),
    past=st.booleans(),
    ring=st.sampled_from([0, 0, 4096, 20000, 300_000]),
    reserve=st.sampled_from([0, 10_000, 100_000]),
    keep=st.sampled_from([0, 1, 5000, 100_000]),
)
ACTIONS = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 60000), st.sampled_from(PIECES)),
    st.tuples(st.just("feed"), st.integers(1, 60000), st.sampled_from(PIECES)),
    st.tuples(st.just("read"), st.integers(0, 9), st.sampled_from([1, 50, 4096, 5000, 200000])),
    st.tuples(st.just("read"), st.integers(0, 9), st.sampled_from([1, 50, 4096, 5000, 200000])),
    st.tuples(st.just("later"), st.sampled_from([1000, 10**7, 10**9]), st.just(0)),
    st.tuples(st.just("kill"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("again"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("join"), SLOTS, st.sampled_from([1, 1000, 10**8])),
    st.tuples(st.just("stream"), st.just(0), st.just(0)),
    st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("change"), st.just(0), st.just(0)),
    st.tuples(st.just("change"), st.just(0), st.just(0)),
    st.tuples(st.just("stay"), st.just(0), st.just(0)),
    st.tuples(st.just("end"), st.just(0), st.just(0)),
)
SCATTERS = st.none() | st.builds(
    Scatter,
    full=st.sampled_from([4096, 20000, 300_000]),
    reserve=st.sampled_from([0, 4096, 100_000]),
    batch=st.sampled_from([0, 5000, 60_000]),
    hold=st.sampled_from([1, 100_000, 10**9]),
    quick=st.sampled_from([1, 10_000, 10**9]),
    least=st.sampled_from([1, 30_000]),
)
STEPS = st.lists(st.tuples(ACTIONS, st.booleans()), min_size=1, max_size=40)


def sane(spec: Spec, *, tail: bool = False) -> Spec:
    """`spec` as relay would build it: what copies by tee copies out, only branches drop, a tail may broadcast."""
    changed: dict[str, Any] = {}
    if spec.tee_copies and spec.kind == "plain":
        changed["tee_copies"] = False
    if not tail:
        changed["ring"] = 0
    elif spec.ring:
        changed |= {"kind": "tee", "null": True, "hold": False, "ring": spec.ring + spec.keep}
    if spec.kind == "gate" and "kind" not in changed:
        changed |= {"skip": 0, "left": -1}
    else:
        changed["after"] = 0
    if spec.align > spec.leaf_slots * 4096:
        changed["align"] = 1
    return Spec(**{**spec.__dict__, **changed})


def readable_spec(spec: Spec, *, tail: bool) -> Spec:
    """`spec` without what only a chain can do."""
    kind = "tee" if spec.kind == "plain" else spec.kind
    plain = {"kind": kind, "rate": 0, "skip": 0, "left": -1, "prefix": 0, "ring": 0}
    return sane(Spec(**{**spec.__dict__, **plain}), tail=tail)


def act(rig: Rig, name: str, first: Any, second: int) -> None:
    """One step of a schedule."""
    which = rig.outlets[first % len(rig.outlets)] if isinstance(first, int) else None
    if name == "feed":
        rig.feed(first if second > 100 else min(first, second * 40), second)
    elif name == "read" and which:
        rig.read(which, second)
    elif name == "later":
        rig.later(first)
    elif name == "kill" and which:
        rig.kill(which)
    elif name == "again" and which:
        rig.again(which)
    elif name == "join" and rig.ring and not rig.model.ring and len(rig.outlets) < 8:
        rig.join(first, second)
    elif name == "stream":
        rig.new_stream()
    elif name == "leave" and which:
        rig.leave(which)
    elif name == "change":
        rig.change()
    elif name == "stay":
        rig.stay()
    elif name == "end":
        rig.end()


def finish(rig: Rig) -> None:
    """The source ends, every receiver reads on: nothing may stay behind."""
    rig.end()
    rig.stay()
    for _ in range(20000):
        for outlet in rig.outlets:
            rig.again(outlet)
        rig.sweep()
        got = [rig.read(outlet, 1 << 20) for outlet in rig.outlets]
        rig.later(10**9)
        idle = not any(got) and not any(node.held for node in rig.model.nodes)
        if rig.ring:
            over = (not reader.sink or reader.done or reader.sink.failed for reader in rig.ring[1].readers)
            idle = idle and all(over)
        if idle and ("DONE", "pipeline", 0) in rig.events:
            rig.leave_ring()
            return
    pytest.fail("something is stuck")


def inflows(rig: Rig) -> dict[int, bytes]:
    """What entered each node, worked out from the specs alone."""
    came: dict[int, bytes] = {}
    stream = bytes(rig.fed[: rig.source.moved])
    for step in rig.trunk:
        stream = step.prefix + stream
        came[id(step.model)] = stream
        if step.spec.kind == "plain":
            stream = passes(stream, step.spec)
    return came


def passes(stream: bytes, spec: Spec) -> bytes:
    """What a gate lets through."""
    return stream[spec.skip :][: spec.left if spec.left >= 0 else None]


def pieces(stream: bytes, node: Node) -> bytes:
    """What a dropping node let pass; fails unless every gap begins and ends at a multiple of its align."""
    kept, at = b"", 0
    previous = "passed"
    for became, size in node.history:
        if became != previous:
            assert at % node.align == 0, "a gap within a piece"
        if became == "passed":
            kept += stream[at : at + size]
        at, previous = at + size, became
    return kept


def check_subscriber(outlet: Outlet, ring: Ring, stream: bytes) -> None:
    """It got the stream from a border on, but for gaps between borders, all counted, until it went."""

    def is_border(at: int) -> bool:
        return any(
            at == end or (begun <= at < end and (at - begun) % align == 0)
            for begun, end in zip(ring.origins, [*ring.origins[1:], 1 << 62], strict=True)
        )

    assert ring.stream == stream
    assert outlet.reader
    reader, at, told = outlet.reader[1], outlet.began, b""
    align = reader.align
    gaps = 0
    assert is_border(at) or not (outlet.alive or reader.runs), (
        "it did not go before the border that it waited for"
    )
    for start, end in reader.runs:
        if start != at:
            assert is_border(at)
            assert is_border(start)
            gaps += start - at
        told += stream[start:end]
        at = end
    if not outlet.alive:
        assert told.startswith(outlet.got)
        return
    assert bytes(outlet.got) == told
    gaps += max(0, len(stream) - at)
    assert reader.dropped == gaps


def check(rig: Rig, outlet: Outlet) -> None:
    """What a receiver got is what it must get: all, from where it joined, until it went, but for gaps."""
    came = inflows(rig)
    gate = outlet.gate
    if outlet.reader:
        check_subscriber(outlet, rig.ring[1], passes(came[id(gate.model)], gate.spec))
        return
    stream = passes(came[id(gate.model)], gate.spec)
    if outlet.gate is not outlet.step and outlet.alive:
        assert gate.c.passed + gate.c.dropped == len(stream)
        stream = pieces(stream, gate.model)
    if not outlet.alive and outlet.gate is not outlet.step:
        return  # with a pipe of its own behind it nobody knows how far it came
    if outlet.second:
        assert stream.endswith(outlet.got) if outlet.alive else outlet.got in stream
    elif outlet.ends is None:
        assert outlet.c.moved == len(stream)
    elif outlet.alive:
        assert bytes(outlet.got) == stream
    else:
        assert stream.startswith(outlet.got)


@SEEDED
@given(
    specs=st.lists(SPECS, min_size=1, max_size=4),
    steps=STEPS,
    source_slots=SLOTS,
    copy_source=st.booleans(),
    pipes=st.booleans(),
    budget=st.sampled_from([1, 5000, 1 << 22]),
    seed=st.integers(0, 2**32),
    scatter=SCATTERS,
)
def test_every_schedule_ends_as_the_model_says(
    specs: list[Spec],
    steps: list[tuple[tuple[str, Any, int], bool]],
    source_slots: int,
    copy_source: bool,
    pipes: bool,
    budget: int,
    seed: int,
    scatter: Scatter | None,
) -> None:
    """In whatever order things happen, each sweep does what the model does, and every byte arrives."""
    with Descriptors() as fds:
        rig = Rig(
            fds,
            [sane(spec, tail=number == len(specs)) for number, spec in enumerate(specs, 1)],
            seed=seed,
            source_slots=source_slots,
            copy_source=copy_source,
            pipes=pipes,
            budget=budget,
            scatter=scatter,
        )
        for (name, first, second), then_sweep in steps:
            act(rig, name, first, second)
            if then_sweep:
                rig.sweep()
        finish(rig)
        for outlet in rig.outlets:
            check(rig, outlet)


@SEEDED
@given(
    specs=st.lists(SPECS, min_size=1, max_size=4),
    steps=STEPS,
    scatter=SCATTERS.filter(bool),
    begins=st.booleans(),
    budget=st.sampled_from([1, 5000, 1 << 22]),
    seed=st.integers(0, 2**32),
)
def test_every_schedule_ends_as_the_model_says_through_a_ring(
    specs: list[Spec],
    steps: list[tuple[tuple[str, Any, int], bool]],
    scatter: Scatter,
    begins: bool,
    budget: int,
    seed: int,
) -> None:
    """Plain sinks read a ring as they are fed by a chain, whenever the bytes change from one way to the other."""
    with Descriptors() as fds:
        plain = [readable_spec(spec, tail=number == len(specs)) for number, spec in enumerate(specs, 1)]
        rig = Rig(fds, plain, seed=seed, budget=budget, scatter=scatter, pipes=bool(seed % 2))
        if begins:
            rig.change()
            rig.sweep()
            assert rig.changes == 1
        for (name, first, second), then_sweep in steps:
            act(rig, name, first, second)
            if then_sweep:
                rig.sweep()
        finish(rig)
        for outlet in rig.outlets:
            check(rig, outlet)


def drawn(chance: random.Random) -> Spec:
    """A place of a chain that a ring can stand in for, with small pipes and, often, a sink that drops."""
    slots = [chance.choice([1, 2, 4, 16]) for _ in range(3)]
    return Spec(
        kind=chance.choice(["tee", "gate"]),
        slots=slots[0],
        leaf_slots=slots[1],
        sink_slots=slots[2],
        after=chance.choice([0, 1, 1000]),
        align=chance.choice([1, 4, 188, 3000]),
        null=chance.random() < 0.1,
        hold=chance.random() < 0.4,
        past=chance.random() < 0.5,
        tee_copies=chance.random() < 0.2,
        out_copies=chance.random() < 0.2,
    )


@pytest.mark.parametrize("seed", range(max(10, EXAMPLES // 2)))
def test_long_schedules_that_change_their_way(fds: Descriptors, seed: int) -> None:
    """Over many changes between chain and ring, with slow, dying and new sinks, nothing is lost and all is counted."""
    chance = random.Random(seed)
    scatter = Scatter(
        full=chance.choice([24000, 60_000, 300_000]),
        reserve=4096,
        batch=chance.choice([0, 10_000, 60_000]),
        hold=chance.choice([1, 10**6, 10**9]),
        quick=chance.choice([1, 10_000]),
        least=chance.choice([1, 30_000]),
    )
    specs = [readable_spec(drawn(chance), tail=False) for _ in range(chance.randrange(4))]
    specs.append(readable_spec(drawn(chance), tail=True))
    budget = chance.choice([5000, 1 << 22])
    rig = Rig(fds, specs, seed=seed, scatter=scatter, budget=budget, pipes=bool(seed % 2))
    greedy = chance.random() < 0.7
    for _ in range(150):
        what = chance.random()
        if what < 0.4:
            act(rig, "feed", chance.randrange(1, 60_000), chance.choice(PIECES))
        elif what < 0.8 or greedy:
            act(rig, "read", chance.randrange(len(rig.outlets)), chance.choice([1, 4096, 50_000, 1 << 20]))
        elif what < 0.83:
            act(rig, "later", chance.choice([1000, 10**7, 10**9]), 0)
        elif what < 0.84:
            act(rig, "kill", chance.randrange(len(rig.outlets)), 0)
        elif what < 0.88:
            act(rig, "again", chance.randrange(len(rig.outlets)), 0)
        if chance.random() < 0.05:
            act(rig, chance.choice(["change", "change", "stay"]), 0, 0)
        if chance.random() < 0.7:
            rig.sweep()
    finish(rig)
    for outlet in rig.outlets:
        check(rig, outlet)


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
