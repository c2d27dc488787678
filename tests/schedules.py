"""Random schedules for the rig: what may be built, what may happen to it, and what every receiver must have got.

RELAY_EXAMPLES sets the number of random schedules (default 120); the sanitized run takes fewer.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from model import Node, Ring
from rig import Rig
from twins import Outlet, Scatter, Spec

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


def play(rig: Rig, steps: list[tuple[tuple[str, Any, int], bool]]) -> None:
    """Does the steps, lets all flow out, and looks at what each receiver got."""
    for (name, first, second), then_sweep in steps:
        act(rig, name, first, second)
        if then_sweep:
            rig.sweep()
    finish(rig)
    for outlet in rig.outlets:
        check(rig, outlet)
