"""The C pump against its model in plain Python, under random schedules over real pipes; and over sockets.

RELAY_EXAMPLES sets the number of random schedules (default 300); the sanitized run takes fewer.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any

import pytest
from descriptors import Descriptors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import Node
from peers import payload
from rig import NAMES, Outlet, Rig, Spec

from relay.kernel import core

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "300"))
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
)
ACTIONS = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 60000), st.sampled_from(PIECES)),
    st.tuples(st.just("feed"), st.integers(1, 60000), st.sampled_from(PIECES)),
    st.tuples(st.just("read"), st.integers(0, 9), st.sampled_from([1, 50, 4096, 5000, 200000])),
    st.tuples(st.just("read"), st.integers(0, 9), st.sampled_from([1, 50, 4096, 5000, 200000])),
    st.tuples(st.just("later"), st.sampled_from([1000, 10**7, 10**9]), st.just(0)),
    st.tuples(st.just("kill"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("again"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("join"), SPECS, st.just(0)),
    st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("end"), st.just(0), st.just(0)),
)
STEPS = st.lists(st.tuples(ACTIONS, st.booleans()), min_size=1, max_size=40)


def sane(spec: Spec, *, newcomer: bool = False) -> Spec:
    """`spec` as relay would build it: what copies by tee copies out, and only branches drop."""
    changed: dict[str, Any] = {}
    if spec.tee_copies and spec.kind == "plain":
        changed["tee_copies"] = False
    if newcomer:
        changed |= {"kind": "gate", "hold": False, "prefix": 0, "skip": 0, "left": -1, "rate": 0}
    elif spec.kind != "gate":
        changed["after"] = 0
    if spec.kind == "gate" or newcomer:
        changed |= {"skip": 0, "left": -1}
    if spec.align > spec.leaf_slots * 4096:
        changed["align"] = 1
    return Spec(**{**spec.__dict__, **changed})


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
    elif name == "join" and len(rig.outlets) < 6:
        rig.join(sane(first, newcomer=True))
    elif name == "leave" and which:
        rig.leave(which)
    elif name == "end":
        rig.end()


def finish(rig: Rig) -> None:
    """The source ends, every receiver reads on: nothing may stay behind."""
    rig.end()
    for _ in range(20000):
        for outlet in rig.outlets:
            rig.again(outlet)
        rig.sweep()
        got = [rig.read(outlet, 1 << 20) for outlet in rig.outlets]
        rig.later(10**9)
        idle = not any(got) and not any(node.held for node in rig.model.nodes)
        if idle and ("DONE", "pipeline", 0) in rig.events:
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


def check(rig: Rig, outlet: Outlet) -> None:
    """What a receiver got is what it must get: all, from where it joined, until it went, but for gaps."""
    came = inflows(rig)
    gate = outlet.gate
    if outlet.newcomer:
        stream = came[id(rig.trunk[-1].model)][outlet.missed :]
    else:
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
    budget=st.sampled_from([1, 5000, 1 << 22]),
    seed=st.integers(0, 2**32),
)
def test_every_schedule_ends_as_the_model_says(
    specs: list[Spec],
    steps: list[tuple[tuple[str, Any, int], bool]],
    source_slots: int,
    copy_source: bool,
    budget: int,
    seed: int,
) -> None:
    """In whatever order things happen, each sweep does what the model does, and every byte arrives."""
    with Descriptors() as fds:
        rig = Rig(
            fds,
            [sane(spec) for spec in specs],
            seed=seed,
            source_slots=source_slots,
            copy_source=copy_source,
            budget=budget,
        )
        for (name, first, second), then_sweep in steps:
            act(rig, name, first, second)
            if then_sweep:
                rig.sweep()
        finish(rig)
        for outlet in rig.outlets:
            check(rig, outlet)


def slow_gate(fds: Descriptors, **more: Any) -> tuple[Rig, Outlet]:
    """A tail and, in front of it, a newcomer whose reader does not read and which drops in pieces of 1000."""
    rig = Rig(fds, [Spec("tail", null=True)])
    spec = Spec("gate", slots=4, leaf_slots=1, sink_slots=1, after=1, align=1000, **more)
    outlet = rig.join(spec)
    return rig, outlet


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
    """A newcomer that goes while the piece before its gap is kept aside is taken out all the same."""
    rig, outlet = slow_gate(fds, tee_copies=copies, out_copies=copies)
    while not outlet.gate.c.rest_have:
        rig.feed(1111)
        rig.sweep()
    rig.leave(outlet)
    rig.sweep()
    assert ("REMOVED", outlet.gate.model.name, 0) in rig.events
    assert outlet.gate.c.passed + outlet.gate.c.dropped == rig.source.moved


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


def test_sendfile_without_its_socket_falls_back_to_a_pipe(fds: Descriptors) -> None:
    """When a newcomer stands between a file and its only sink, the file goes through the pipes to both."""
    rig = Rig(fds, [Spec("tail")])
    data = payload(5, 100_000)
    rig.source.fd, rig.source.method, rig.source.kind = fds.memfd(data), core.SENDFILE, core.INSTANT
    rig.source.offset, rig.source.left, rig.source.readable = 0, len(data), 1
    outlet = rig.join(Spec("gate"))
    got: dict[int, bytes] = {0: b"", 1: b""}
    while min(map(len, got.values())) < len(data):
        before = sum(map(len, got.values()))
        swept(rig, 1)
        for number, at in enumerate((rig.outlets[0], outlet)):
            assert at.ends
            with contextlib.suppress(BlockingIOError):
                got[number] += os.read(at.ends.r, 1 << 20)
        assert sum(map(len, got.values())) > before, "nothing moved"
    assert got == {0: data, 1: data}
