"""The plan of a duplex route with stages: two chains between the same two sockets."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from relay import needs
from relay.config.models import Route
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.kernel.probe import Machine
from relay.needs import Need
from relay.pipeline.ring_shape import across
from relay.planning.duplex import checks, counterpart
from relay.planning.hops import Back, Hold, Hop, RoutePlan, expects
from relay.stages.base import StageSettings
from relay.ways import Ways

SOCKET = Need(1)


class Walk(Protocol):
    """What follows one chain and notes the holds on its way (plan.py has it)."""

    holds: list[Hold]
    directories: set[str]

    def chain(
        self,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        slow: OnSlow,
        *,
        gated: bool,
        within: tuple[tuple[str, OnSlow], ...],
    ) -> tuple[Hop, ...]: ...


def plan_staged(name: str, route: Route, machine: Machine, there: Walk, back: Walk) -> RoutePlan:
    """Each way is a chain of its own. The sockets are counted where bytes enter, at the source and at the sink."""
    ways = Ways(machine, route.method)
    client, server = route.back, route.sink
    *stages, tail = there.chain(route.stages, server, server.slow, gated=False, within=())
    *replies, end = back.chain(route.replies, client, client.slow, gated=False, within=())
    sink = counterpart(server, tail.choice)
    chain = (*stages, replace(sink, need=tail.need, policy=tail.policy))
    source = Hop(
        "source",
        client.address.scheme,
        str(client.address),
        ways.from_source(client.address.scheme),
        SOCKET,
        str(client.address),
        "listen",
        expects(route.source),
    )
    answers = Back(
        source=replace(
            sink, role="source", choice=ways.from_source(sink.kind), need=needs.NOTHING, branch=()
        ),
        chain=(
            *replies,
            replace(end, verb="listen", need=replace(end.need, descriptors=end.need.descriptors - 1)),
        ),
        crossing=across(route.replies, client, ways, sink.kind, ways.from_source(sink.kind), turns=False),
    )
    stream = source.need
    for hop in (*chain, *answers.chain):
        stream += hop.total()
    standing = needs.listener(client.address) + checks(server)
    directories = there.directories | back.directories
    if directories:  # each locked once by whichever route is first; an engine that may wait for the disk
        standing += needs.ENGINE + Need(len(directories), at_most=True)
    return RoutePlan(
        name=name,
        method=route.method,
        turns="each",
        source=source,
        chain=chain,
        holds=(*there.holds, *(_of_the_way_back(hold) for hold in back.holds)),
        standing=standing,
        stream=stream,
        subscriber=None,
        streams=route.source.limits.connections,
        waiting=0,
        crossing=across(route.stages, server, ways, source.kind, source.choice, turns=False),
        duplex=True,
        back=answers,
    )


def _of_the_way_back(hold: Hold) -> Hold:
    """Who holds the way back holds the sink, and nothing that goes there."""
    words = hold.words.replace("holds the source", "holds what the sink sends back")
    return replace(hold, words=words.replace("everybody on the route", "everybody on that way"))
