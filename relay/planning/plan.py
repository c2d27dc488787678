"""A plan: what this configuration will be on this machine, worked out without opening anything.

    Hop          one step of a route, and how bytes leave it: a source into the first pipe, a stage onwards, a
                 sink's pipe out. A tee's branch, what reads a spill's log, a broadcast's subscribers and the
                 upstreams of a duplex route are hops below it.
    Hold         who can hold the source back, and what lets go of it
    RoutePlan    the tree of a route's hops, its holds, and what it needs (all three: hops.py)

The walk over stages and branches follows chain.py, which builds the same in kernel objects; methods come from
ways.py, figures from needs.py. What only opening an end can tell (what stdin is) is marked as not sure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from relay import needs
from relay.config.models import Config, Route
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.kernel.pipe import DEFAULT_CAPACITY
from relay.kernel.probe import Machine
from relay.needs import Need
from relay.pipeline.ring_shape import across
from relay.planning.duplex import plan_duplex
from relay.planning.hops import Hold, Hop, Role, RoutePlan, expects, introduces
from relay.planning.staged import plan_staged
from relay.stages.base import StageSettings
from relay.stages.checksum import Checksum
from relay.units import show_size
from relay.ways import APPENDING, STRAIGHT, Choice, Ways

INHERITED = ("stdio", "fd")


@dataclass(frozen=True)
class Plan:
    """All routes of a configuration on one machine."""

    machine: Machine
    engines: int
    routes: tuple[RoutePlan, ...]
    base: Need = field(default=needs.NOTHING)
    confined: str = ""  # what relay gives up once it has started

    @property
    def total(self) -> Need:
        """The process with every route at its limit."""
        found = self.base
        for route in self.routes:
            found += route.at_limit
        return found


def make_plan(config: Config, machine: Machine) -> Plan:
    """The plan of `config` on `machine`; opens nothing, looks at nothing."""
    engines = config.engines or machine.cpus
    routes = tuple(_plan_route(name, route, machine) for name, route in config.routes.items())
    base = needs.PROCESS + needs.ENGINE.times(engines)
    if config.admin is not None:
        base += needs.admin(config.admin.socket, config.admin.http)
    return Plan(machine, engines, routes, base)


def _plan_route(name: str, route: Route, machine: Machine) -> RoutePlan:
    ways = Ways(machine, route.method)
    if route.duplex and (route.stages or route.replies):
        return plan_staged(name, route, machine, _Walk(ways, machine), _Walk(ways, machine))
    if route.duplex:
        return plan_duplex(name, route, machine)
    walk = _Walk(ways, machine)
    chain = walk.chain(route.stages, route.sink, route.sink.slow, gated=False, within=())
    finite = route.source.verb == "read"
    turns: Literal["each", "one", "once"] = "once" if finite else route.turns()
    address = route.source.address
    standing = needs.listener(address) if route.source.verb == "listen" else needs.NOTHING
    if finite and address.scheme in ("file", *INHERITED):
        standing += needs.ENGINE  # a reader of its own: reading may wait for the disk
    listening = [sink for _place, sink in route.sinks() if sink.verb == "listen"]
    for sink in listening:
        standing += needs.listener(sink.address)
    if walk.directories:  # each locked once by whichever route is first; an engine that may wait for the disk
        standing += needs.ENGINE + Need(len(walk.directories), at_most=True)
    source, chain = walk.source(route, chain)
    stream = source.need
    for hop in chain:
        stream += hop.total()
    most = route.source.limits.connections
    return RoutePlan(
        name=name,
        method=route.method,
        turns=turns,
        source=source,
        chain=chain,
        holds=tuple(walk.holds),
        standing=standing,
        stream=stream,
        subscriber=needs.subscriber() if listening else None,
        streams=most if turns == "each" else 1,
        waiting=0 if turns != "one" else None if most is None else most - 1,
        crossing=across(route.stages, route.sink, ways, source.kind, source.choice, turns=turns == "one"),
    )


Within = tuple[tuple[str, OnSlow], ...]  # the branches around a place that have a policy, innermost first


class _Walk:
    """Follows a route as chain.Chain does, and notes the holds on its way."""

    def __init__(self, ways: Ways, machine: Machine) -> None:
        self._ways = ways
        self._machine = machine
        self._node = needs.node(machine)
        self.holds: list[Hold] = []
        self.directories: set[str] = set()

    def source(self, route: Route, chain: tuple[Hop, ...]) -> tuple[Hop, tuple[Hop, ...]]:
        """The source, how its bytes get into the first pipe, and the chain as it is if none is needed."""
        address = route.source.address
        read, chain = self._read(address.scheme, chain, route.sink)
        choice, sure = self._sure(address.scheme, read)
        need = needs.source(address, self._machine)
        shown = str(address)
        name = "stdin" if address.scheme == "stdio" else shown
        hop = Hop(
            "source",
            address.scheme,
            name,
            choice,
            need,
            shown,
            route.source.verb,
            expects(route.source),
            sure=sure,
        )
        return hop, chain

    def _read(
        self, scheme: str, chain: tuple[Hop, ...], sink: SinkSettings | None = None
    ) -> tuple[Choice, tuple[Hop, ...]]:
        """How a stream gets into `chain`; `sink` is where it goes when it may get there past all pipes."""
        only = chain[0]
        bare = len(chain) == 1 and only.entry is None and only.verb != "listen"
        straight = self._ways.straight(scheme) if bare and sink is not None and sink.straight else None
        if straight is not None and scheme in ("tcp", "unix"):
            return straight, chain if only.choice.method == "copy" else (replace(only, choice=straight),)
        choice = self._ways.from_source(scheme, alone=only.kind if bare and only.kind in STRAIGHT else "")
        return choice, (replace(only, choice=choice),) if choice.method == "sendfile" else chain

    def chain(
        self,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        slow: OnSlow,
        *,
        gated: bool,
        within: Within,
        before: Within | None = None,
    ) -> tuple[Hop, ...]:
        """Its stages and its sink. `gated`: the sink's policy stands at the head of the branch it ends, which
        is in `within` for the branch's stages; `before` is what is around the branch itself."""
        hops = [self._stage(settings, within) for settings in stages]
        if sink.sidecar and slow.policy != "spill":
            hops.append(self._checksum(Checksum(sink.sidecar, f"sidecar of {sink.address}"), within))
        need = self._node
        entry = None
        if not gated and slow.policy != "block" and sink.verb != "listen":
            entry = self._ways.between()
            need += self._node
        around = within if before is None else before
        if slow.policy == "spill" and sink.verb != "listen":
            hops.append(self._log((), sink, slow, str(sink.address), need, entry, around))
            return tuple(hops)
        hops.append(self._sink(sink, slow, str(sink.address), need, entry, around))
        return tuple(hops)

    def _stage(self, settings: StageSettings, within: Within) -> Hop:
        stage = settings.make()
        if isinstance(stage, Checksum):
            return self._checksum(stage, within, settings)
        detail = _detail(settings)
        if stage.branch is None:
            if settings.holds():
                self._held(stage.name, "stage", None, within, settings.holds())
            return Hop("stage", stage.kind, stage.name, self._ways.between(), self._node, detail=detail)
        tee, branch = self._ways.tee(), stage.branch
        # A node that tees by copying has its bytes in memory: they leave it by hand to both sides.
        into = tee if tee.method == "copy" else self._ways.between()
        entry = None
        below: tuple[Hop, ...]
        if branch.on_slow.policy == "spill" and branch.to.verb != "listen":
            below = (
                self._log(branch.stages, branch.to, branch.on_slow, stage.name, self._node, into, within),
            )
        elif branch.stages or branch.to.sidecar or branch.to.verb == "listen":
            entry = into
            own = () if branch.to.verb == "listen" else ((stage.name, branch.on_slow),)
            below = self.chain(
                branch.stages, branch.to, branch.on_slow, gated=True, within=own + within, before=within
            )
        else:
            backlog = needs.has_backlog(branch.to, branch.on_slow)
            block = branch.on_slow.policy == "block"
            need = self._node if backlog else needs.NOTHING
            hop = self._sink(branch.to, branch.on_slow, stage.name, need, None if block else into, within)
            if tee.method == "copy" and needs.passes_backlog(branch.to, branch.on_slow) and hop.sure:
                hop = replace(hop, choice=tee)
            below = (hop,)
        return Hop("stage", stage.kind, stage.name, tee, self._node, detail=detail, entry=entry, branch=below)

    def _log(
        self,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        slow: OnSlow,
        name: str,
        need: Need,
        entry: Choice | None,
        within: Within,
    ) -> Hop:
        """A log, or a buffer, and the chain that reads it: whoever is slow there holds the log, not the source."""
        self._held(name, "log", slow, within)
        behind = _Walk(self._ways, self._machine)
        block = OnSlow(policy="block").effective(listening=False)
        choice, chain = self._read("file", behind.chain(stages, sink, block, gated=False, within=()))
        if slow.directory is not None:
            self.directories.add(slow.directory)
        bound = slow.max if slow.policy == "spill" else slow.buffer
        most = f"up to {show_size(bound)}" if bound is not None else "as large as its disk lets it"
        return Hop(
            "log", "memory" if slow.directory is None else "disk", name, choice,
            need + needs.log(slow, self._machine), slow.directory or "", detail=most, entry=entry,
            policy=slow.policy or "", branch=chain,
        )  # fmt: skip

    def _checksum(self, stage: Checksum, within: Within, settings: StageSettings | None = None) -> Hop:
        why = settings.holds() if settings else "while hashing is slower than the stream"
        self._held(stage.name, "stage", None, within, why)
        choice = self._ways.to_sink("digest")
        digest = Hop("sink", "digest", stage.algorithm, choice, needs.ferry(self._machine))
        return Hop(
            "stage",
            stage.kind,
            stage.name,
            self._ways.tee(),
            self._node,
            detail=stage.algorithm,
            branch=(digest,),
        )

    def _sink(
        self, sink: SinkSettings, slow: OnSlow, name: str, need: Need, entry: Choice | None, within: Within
    ) -> Hop:
        address = sink.address
        if sink.verb == "listen":
            below = self._subscriber(slow, str(address))
            self._held(
                f"each subscriber of {address}",
                "subscriber",
                slow,
                within,
                room=needs.backlog(slow, sink.burst),
            )
            choice = self._ways.to_ring()
            return Hop(
                "sink",
                address.scheme,
                name,
                choice,
                need + needs.sink(sink, self._machine),
                str(address),
                "listen",
                entry=entry,
                policy=slow.policy or "",
                branch=(below,),
            )
        if address.scheme == "stdio":
            name = "stdout"
        if slow.buffer:
            return self._log((), sink, slow, name, need, entry, within)
        self._held(name, "sink", slow, within)
        copies = APPENDING if sink.append else ""
        choice, sure = self._sure(address.scheme, self._ways.to_sink(address.scheme, copies=copies))
        return Hop(
            "sink",
            address.scheme,
            name,
            choice,
            need + needs.sink(sink, self._machine),
            str(address),
            sink.verb,
            introduces(sink),
            entry=entry,
            policy=slow.policy or "",
            sure=sure,
        )

    def _subscriber(self, slow: OnSlow, address: str) -> Hop:
        return Hop(
            "subscriber",
            "socket",
            f"each subscriber of {address}",
            self._ways.from_ring(),
            needs.subscriber(),
            policy=slow.policy or "",
        )

    @staticmethod
    def _sure(scheme: str, choice: Choice) -> tuple[Choice, bool]:
        """What stands behind a descriptor that relay is given is known when it is there."""
        if scheme not in INHERITED or choice.method == "copy":
            return choice, True
        reason = f"{choice.reason}; a terminal, a device or a socket found there is copied"
        return Choice(choice.method, reason), False

    def _held(
        self, who: str, role: Role, slow: OnSlow | None, within: Within, how: str = "", room: int = 0
    ) -> None:
        """Notes who can hold the source: until the first policy around it lets go. `room`: a subscriber's backlog."""
        policies = [(name, around, False) for name, around in within]
        if slow is not None:
            policies.insert(0, (who, slow, True))
        loose = [
            (around.after or 0.0, name, own, _in_force(around))
            for name, around, own in policies
            if _in_force(around) != "block"
        ]
        first = min(loose, key=lambda item: item[0], default=None)
        words = f"holds the source{' ' * bool(how)}{how}"
        if slow is not None and slow.policy == "spill" and not room:
            full = f"has {show_size(slow.max)}" if slow.max is not None else "has filled its disk"
            words = f"reads from a log of its own; once that {full}, it {words}"
        elif slow is not None and slow.buffer and not room:
            words = f"reads from a buffer of its own; once that has {show_size(slow.buffer)}, it {words}"
        if first is None:
            words += ", and with it everybody on the route"
            if slow is not None:
                words += f", for as long as it is slow; after {_seconds(slow.after or 0.0)} relay warns"
            self.holds.append(Hold(who, role, slow.policy or "" if slow else "", None, "", "", words))
            return
        seconds, by, own, policy = first
        does = "loses bytes, alone" if policy == "drop" else "is disconnected"
        beside = slow.buffer if slow is not None else 0
        pipe = needs.granted(DEFAULT_CAPACITY, self._machine) + beside
        backlog = f"its backlog of {show_size(room or pipe)}"
        place = backlog if own else f"the branch {by}"
        then = f"it {does}" if own else f"that branch {does}"
        words += f" until {place} has been full for {_seconds(seconds)}; then {then}"
        self.holds.append(Hold(who, role, slow.policy or "" if slow else "", seconds, by, policy, words))


def _in_force(slow: OnSlow) -> str:
    """What a policy does to a slow sink in the end."""
    return (slow.then if slow.policy == "spill" else slow.policy) or "block"


def _seconds(amount: float) -> str:
    return f"{amount * 1000:g} ms" if 0 < amount < 1 else f"{amount:g} s"


def _detail(settings: StageSettings) -> str:
    """A stage's settings as they were given, those that fit in a line."""
    given: Mapping[str, Any] = settings.model_dump(mode="json", include=settings.model_fields_set - {"name"})
    return ", ".join(f"{key} {value}" for key, value in given.items() if isinstance(value, str | int | float))
