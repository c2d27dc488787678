"""Everything that the C core and its model both know, compared: what differs is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model import Reader as ModelReader
from syscalls import readable
from twins import Step

if TYPE_CHECKING:
    from rig import Rig


def compare(rig: Rig) -> None:
    """Everything the C core knows is what the model has, and what the kernel says."""
    assert rig.source.moved == rig.pipeline.fed
    assert rig.model.source
    assert rig.source.moved == rig.model.source.moved
    chain = []
    at = rig.pipeline.head
    while at:
        chain.append(at)
        at = at.after
    assert [rig.names[c.token] for c in chain] == [model.name for model in rig.model.nodes]
    assert rig.pipeline.nodes == len(chain)
    for step in rig.steps:
        compare_step(step)
    for outlet in rig.outlets:
        assert outlet.c.moved == outlet.model.moved, f"{outlet.model.name}: moved"
        assert outlet.c.last_ns == outlet.model.last, f"{outlet.model.name}: last"
        for reader in (outlet.reader, outlet.place):
            if reader:
                assert rig.ring
                assert rig.ring[0].c.position == rig.ring[1].position
                compare_reader(reader[0].c, reader[1])
    if rig.model.ring and rig.ring:
        c, ring = rig.ring[0].c, rig.model.ring
        assert (c.offered, c.base, c.rush, c.need) == (ring.offered, ring.base, ring.rush, ring.need)
        assert (c.held_ns, c.window_ns, c.window) == (ring.held, ring.window_at, ring.window)
    assert rig.pipeline.still == rig.model.still
    assert (rig.pipeline.idle_ns, bool(rig.pipeline.tell_idle)) == (
        rig.model.idle,
        rig.model.tell_idle,
    )


def compare_step(step: Step) -> None:
    """What one node holds, owes and has let pass."""
    c, model, name = step.c, step.model, step.model.name
    in_pipe = readable(step.ends.r)
    assert in_pipe == model.pipe.held, f"{name}: bytes in the pipe"
    assert c.held == in_pipe + c.stash_len - c.stash_out, f"{name}: held is not what is there"
    assert c.stash_len - c.stash_out == len(model.stash), f"{name}: stash"
    for field in ("owed", "passed", "dropped", "skip", "left", "tokens", "rest_need"):
        assert getattr(c, field) == getattr(model, field), f"{name}: {field}"
    for field in ("full", "ended", "done", "slow", "dropping"):
        assert bool(getattr(c, field)) == getattr(model, field), f"{name}: {field}"
    assert (c.since_ns, c.blocked_ns) == (model.since, model.blocked), f"{name}: blocked"
    assert c.stuck_ns == model.stuck, f"{name}: stuck"
    assert c.rest_have == len(model.rest), f"{name}: rest"
    assert c.prefix_left == len(model.prefix), f"{name}: prefix"
    if c.next:
        assert c.stash_len - c.stash_next == len(model.untold), f"{name}: untold"


def compare_reader(c: Any, model: ModelReader) -> None:
    """Where one reader of a ring is."""
    assert bool(c.sink) == bool(model.sink), f"{model.name}: sink"
    for field in ("at", "dropped"):
        assert getattr(c, field) == getattr(model, field), f"{model.name}: {field}"
    for field in ("slow", "dropping", "done"):
        assert bool(getattr(c, field)) == getattr(model, field), f"{model.name}: {field}"
    assert (c.since_ns, c.blocked_ns) == (model.since, model.blocked), f"{model.name}: blocked"
    assert c.rest_left == len(model.rest), f"{model.name}: rest"
