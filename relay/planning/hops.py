"""What a route's plan is made of: hops, who holds whom, and all of a route."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from relay import needs
from relay.endpoints.settings import SinkSettings, SourceSettings
from relay.needs import Need
from relay.pipeline.ring_shape import Across
from relay.ways import Choice

Role = Literal["source", "stage", "log", "sink", "subscriber", "upstream"]


@dataclass(frozen=True)
class Hop:
    """One step of a route. `entry` is the way into a pipe of its own in front of it: a branch's first, or a
    sink's backlog; None without one. `sure` is False where the method depends on what is found at opening.
    """

    role: Role
    kind: str
    name: str
    choice: Choice
    need: Need
    address: str = ""
    verb: str = ""
    detail: str = ""
    entry: Choice | None = None
    policy: str = ""
    sure: bool = True
    branch: tuple[Hop, ...] = ()

    def total(self) -> Need:
        """What it takes with everything below it, subscribers apart."""
        found = self.need
        for below in self.branch:
            if below.role != "subscriber":
                found += below.total()
        return found


@dataclass(frozen=True)
class Hold:
    """`who` can hold the source. `seconds` is for how long at most, None if nothing lets go; `by` then says
    whose policy does, `then` what it does."""

    who: str
    role: Role
    policy: str
    seconds: float | None
    by: str
    then: str
    words: str


@dataclass(frozen=True)
class Back:
    """The way back on a duplex route with stages: `source` is the sink's connection, the chain ends at the source's."""

    source: Hop
    chain: tuple[Hop, ...]
    crossing: Across


@dataclass(frozen=True)
class RoutePlan:
    """One route. `turns`: each stream has a pipeline of its own, streams take turns on one, or there is one
    stream only. `streams` may be under way at once and `waiting` wait for their turn; None: as many as come.
    """

    name: str
    method: str
    turns: Literal["each", "one", "once"]
    source: Hop
    chain: tuple[Hop, ...]
    holds: tuple[Hold, ...]
    standing: Need
    stream: Need
    subscriber: Need | None
    streams: int | None
    waiting: int | None
    crossing: Across | None = None
    duplex: bool = False
    back: Back | None = None

    @property
    def at_limit(self) -> Need:
        """With as many streams as its limit lets in; with one where there is no limit. Subscribers apart."""
        count = 1 if self.streams is None else self.streams
        return self.standing + self.stream.times(count) + needs.WAITING.times(self.waiting or 0)


def hops(route: RoutePlan) -> Iterator[Hop]:
    """Every hop of a route, from the source on, each before what is below it."""
    waiting = [*reversed(route.chain), route.source]
    if route.back is not None:
        waiting = [*reversed(route.back.chain), route.back.source, *waiting]
    while waiting:
        hop = waiting.pop()
        yield hop
        waiting.extend(reversed(hop.branch))


def expects(source: SourceSettings) -> str:
    """Whose PROXY headers a source believes, in words; empty for nobody's."""
    if source.proxy_protocol is None:
        return ""
    return f"expects PROXY headers from {', '.join(map(str, source.proxy_protocol.trust)) or 'whoever may connect'}"


def introduces(sink: SinkSettings) -> str:
    """How a sink learns of the source's peer, in words; empty where it does not."""
    header = [f"begins with a PROXY header ({sink.proxy_protocol})"] if sink.proxy_protocol else []
    return ", ".join([*header, *["from the peer's own address"] * sink.transparent])
