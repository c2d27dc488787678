"""The plan of a duplex route: two sockets a connection, and the upstreams that one of them may lead to."""

from __future__ import annotations

from relay import needs
from relay.config.models import Route
from relay.endpoints.settings import SinkSettings
from relay.kernel.probe import Machine
from relay.needs import Need
from relay.planning.hops import Hold, Hop, RoutePlan, expects, introduces
from relay.ways import Choice, Ways


def plan_duplex(name: str, route: Route, machine: Machine) -> RoutePlan:
    """Two sockets a connection; each end's method is that of what comes from it."""
    ways = Ways(machine, route.method)
    there, back = ways.duplex(route.sink.address.scheme), ways.duplex(route.source.address.scheme)
    pipes = needs.exchange("splice" in (there.method, back.method), machine)
    source, sink = str(route.source.address), counterpart(route.sink, back)
    need, comes = Need(1), expects(route.source)
    words = "holds the source, and the source holds it: back-pressure passes as over one connection"
    return RoutePlan(
        name=name,
        method=route.method,
        turns="each",
        source=Hop("source", route.source.address.scheme, source, there, need, source, "listen", comes),
        chain=(sink,),
        holds=(Hold(sink.name, "sink", "", None, "", "", words),),
        standing=needs.listener(route.source.address) + pipes + checks(route.sink),
        stream=need.times(2),
        subscriber=None,
        streams=route.source.limits.connections,
        waiting=0,
        duplex=True,
    )


def counterpart(sink: SinkSettings, back: Choice) -> Hop:
    """The counterpart of each connection: the one address, or one of several. `back`: how bytes come from it."""
    address, need = str(sink.address), Need(1)
    if not sink.others and sink.health is None and sink.balance is None:
        return Hop("sink", sink.address.scheme, address, back, need, address, "connect", introduces(sink))
    count = len(sink.addresses)
    several = f"one of {count} upstreams" if count > 1 else f"the upstreams at {address}"
    words = [sink.balanced, f"{sink.tries} {'try' if sink.tries == 1 else 'tries'}"]
    if sink.health is not None:
        asked = "asked" if sink.health.expect else "checked"
        words.append(f"{asked} every {sink.health.every:g} s")
    words += [introduces(sink)] * bool(introduces(sink))
    upstreams = tuple(
        Hop("upstream", each.scheme, str(each), back, needs.NOTHING, str(each), "connect")
        for each in sink.addresses
    )
    name = f"{several} ({', '.join(words)})"
    return Hop("sink", sink.address.scheme, name, back, need, detail=sink.balanced, branch=upstreams)


def checks(sink: SinkSettings) -> Need:
    """A check holds a descriptor while it is under way; a name may stand for more upstreams than one."""
    return Need(len(sink.addresses), at_most=True) if sink.health is not None else needs.NOTHING
