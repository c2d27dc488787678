"""How one pipeline stands, looked at on its engine's thread; and how many of them stand together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from relay.admin.status import HopStatus, SinkStatus, Spill, StreamStatus
from relay.config.models import Route
from relay.duplex.direction import Direction
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.journal.record import SinkRecord
from relay.kernel import core
from relay.pipeline.outlet import Outlet
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.subscribers import Subscribers
from relay.spill.sink import SpillSink
from relay.stages.base import StageSettings
from relay.stages.tee import Settings as Tee

# The worst first: what a sink's state is called where there are many of it.
STATES = ("away", "failed", "slow", "opening", "finishing", "open", "finished", "none")


def known_sinks(route: Route) -> Iterator[tuple[str, str, str]]:
    """The name, the address and the policy of each sink that a pipeline of this route has (as chain.py names them).

    Those of one name are one.
    """
    seen = set()
    back = list(_walk(route.replies, route.back, route.back.slow, ""))[:-1] if route.duplex else ()
    for name, sink, slow in (*_walk(route.stages, route.sink, route.sink.slow, ""), *back):
        if name not in seen:
            seen.add(name)
            yield name, str(sink.address), slow.policy or "block"


def _walk(
    stages: tuple[StageSettings, ...], sink: SinkSettings, slow: OnSlow, name: str
) -> Iterator[tuple[str, SinkSettings, OnSlow]]:
    for stage in stages:
        if isinstance(stage, Tee):
            listens = stage.to.verb == "listen"
            logged = stage.slow.policy == "spill" and not listens
            own = logged or not (stage.stages or stage.to.sidecar or listens)
            called = (stage.name or "") if own else ""
            yield from _walk(() if logged else stage.stages, stage.to, stage.slow, called)
    yield name or str(sink.address), sink, slow


def stream_of(pipeline: Pipeline) -> StreamStatus:
    """On its engine: how it stands now."""
    intake, turn = pipeline.intake, pipeline.turn
    source = intake.source if intake is not None else None
    ring = pipeline.crossing.way == "ring"
    straight = source is not None and source.c.method == core.SENDFILE
    method = "copy" if ring else source.method_now if source is not None else ""
    hops = [HopStatus("source", method)] if source is not None else []
    sinks = []
    groups = {id(group.outlet): group for group in pipeline.subscribers}
    for outlet in pipeline.chain.outlets:
        if outlet.hidden:
            continue
        sink = _sink(outlet, groups.get(id(outlet)), ring=ring, sendfile=straight)
        sinks.append(sink)
        if source is not None and sink.method:
            hops.append(HopStatus(sink.sink, sink.method))
    return StreamStatus(
        id=turn.id if turn is not None and source is not None else "",
        peer=(source.peer or source.address) if source is not None else "",
        seconds=pipeline.engine.now - intake.began if intake is not None else 0.0,
        bytes=source.moved if source is not None else 0,
        method=method,
        why_method=intake.choice.reason if intake is not None else "",
        hops=tuple(hops),
        sinks=tuple(sinks),
    )


def mirrors_of(way: Direction) -> Iterator[SinkStatus]:
    """On its engine: how the sinks of the tees of one direction of a duplex session stand, be it over or not."""
    visible = [outlet for outlet in way.chain.outlets if not outlet.hidden]
    over = way.record.sinks if way.record is not None else None
    for number, outlet in enumerate(visible):
        if outlet is way.main:
            continue
        if over is None:
            yield _sink(outlet, None, ring=way.crossing.way == "ring", sendfile=False)
        else:
            record = over[number]
            yield _status(outlet, record, "failed" if record.result == "failed" else "finished")


def _sink(outlet: Outlet, group: Subscribers | None, *, ring: bool, sendfile: bool) -> SinkStatus:
    record = outlet.record(sendfile=sendfile)
    sink = outlet.sink
    waiting = outlet.waiting
    if group is not None:
        waiting = max([waiting, *(group.behind(member) for member in group.members.values())])
    return replace(
        _status(outlet, record, _state(outlet)),
        method="copy" if ring else record.method,
        backlog=record.backlog or waiting,
        spill=_spill(sink) if isinstance(sink, SpillSink) else None,
        subscribers=len(group.members) if group is not None else None,
        given=group.given if group is not None else None,
    )


def _status(outlet: Outlet, record: SinkRecord, state: str) -> SinkStatus:
    assert outlet.settings is not None
    return SinkStatus(
        sink=record.sink,
        address=str(outlet.settings.address),
        policy=outlet.slow.policy or "block",
        state=state,
        method=record.method,
        why_method=record.why_method,
        bytes=record.bytes,
        backlog=record.backlog,
        blocked_seconds=record.blocked_seconds,
        dropped=record.dropped,
        lost=record.lost,
        twice=record.twice,
        reconnects=record.reconnects,
        reason=record.reason,
    )


def _spill(sink: SpillSink) -> Spill:
    directory = sink.log.directory
    return Spill(bytes=sink.backlog, age=sink.age, directory=str(directory or ""))


def _state(outlet: Outlet) -> str:
    sink = outlet.sink
    if sink is None:
        return "none"
    behind = isinstance(sink, SpillSink) and sink.state == "open" and not sink.delivery.connected
    if outlet.absent or sink.away or behind:
        return "away"
    if sink.state == "open":
        gate = outlet.place.c if outlet.place is not None else outlet.gate.c
        slow = gate.slow or gate.dropping
        return "slow" if slow else "open"
    return "finishing" if sink.state == "cutting" else sink.state


def combined(name: str, address: str, policy: str, parts: Sequence[SinkStatus]) -> SinkStatus:
    """The same sink of many streams: sums, the worst state, the oldest byte; the method of most of them."""
    if not parts:
        return SinkStatus(name, address, policy)
    methods = [part.method for part in parts if part.method]
    method = max(set(methods), key=methods.count) if methods else ""
    spills = [part.spill for part in parts if part.spill is not None]
    spill = None
    if spills:
        spill = Spill(sum(s.bytes for s in spills), max(s.age for s in spills), spills[0].directory)
    readers = [part.subscribers for part in parts if part.subscribers is not None]
    return SinkStatus(
        sink=name,
        address=address,
        policy=policy,
        state=min((part.state for part in parts), key=STATES.index),
        method=method,
        why_method=next((part.why_method for part in parts if part.method == method), ""),
        bytes=sum(part.bytes for part in parts),
        backlog=sum(part.backlog for part in parts),
        blocked_seconds=sum(part.blocked_seconds for part in parts),
        dropped=sum(part.dropped for part in parts),
        lost=sum(part.lost for part in parts),
        twice=sum(part.twice for part in parts),
        reconnects=sum(part.reconnects for part in parts),
        spill=spill,
        subscribers=sum(readers) if readers else None,
        given=sum(part.given or 0 for part in parts) if readers else None,
        reason=next((part.reason for part in parts if part.reason), ""),
    )
