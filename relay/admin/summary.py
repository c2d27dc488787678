"""What `relay serve` says of its routes when it has begun: from where to where and how, who can hold whom, limits.

One line a route. It is the plan of the configuration on this machine, so it names what is expected of each hop; what
is measured and chosen later is in the status and in the records of sessions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from relay.config.models import Config
from relay.kernel.probe import machine
from relay.planning.hops import Hold, Hop, RoutePlan
from relay.planning.plan import make_plan
from relay.serving.route import RunningRoute

log = logging.getLogger("relay.serve")

MOST = 50  # routes that are told one by one; `relay plan` tells of all


def summary(config: Config, routes: Sequence[RunningRoute]) -> None:
    """Logs it."""
    if not log.isEnabledFor(logging.INFO):
        return
    plan = make_plan(config, machine())
    bound = {running.name: running.bound for running in routes}
    for of_route in plan.routes[:MOST]:
        data = _data(config, of_route, bound.get(of_route.name, []))
        log.info("%s", _words(of_route, data), extra={"event": "route", **data})
    if len(plan.routes) > MOST:
        log.info("and %d more routes: relay plan tells of all", len(plan.routes) - MOST)
    total, limits = plan.total, plan.machine
    log.info(
        "%d route%s with %d engines; at their limits they take %d of %d descriptors and %d%s pipe pages",
        len(plan.routes),
        "" if len(plan.routes) == 1 else "s",
        plan.engines,
        total.descriptors,
        limits.files,
        total.pages,
        f" of {limits.pipe_pages}" if limits.pipe_pages else "",
        extra={
            "event": "summary",
            "routes": len(plan.routes),
            "engines": plan.engines,
            "needs": {"descriptors": total.descriptors, "pipes": total.pipes, "pipe_pages": total.pages},
            "limits": {"descriptors": limits.files, "pipe_pages": limits.pipe_pages or None},
        },
    )


def sinks(chain: Sequence[Hop], policy: str = "") -> Iterator[tuple[Hop, str]]:
    """The sinks of a chain with their policies, those of its branches where these begin."""
    for hop in chain:
        if hop.role == "sink":
            yield hop, policy or hop.policy or "block"
        else:
            yield from sinks(hop.branch, hop.policy if hop.role == "log" else policy)


def _data(config: Config, plan: RoutePlan, bound: list[str]) -> dict[str, Any]:
    limits = config.routes[plan.name].source.limits.model_dump(mode="json", exclude_unset=True)
    return {
        "route": plan.name,
        "source": plan.source.address or plan.source.name,
        "method": plan.source.choice.method,
        "turns": plan.turns,
        "duplex": plan.duplex,
        "bound": bound,
        "sinks": [
            {"address": hop.address or hop.name, "method": hop.choice.method, "policy": policy}
            for hop, policy in sinks(plan.chain)
        ],
        "holds": [
            {"who": hold.who, "seconds": hold.seconds, "then": hold.then or None, "words": hold.words}
            for hold in plan.holds
        ],
        "limits": {key: value for key, value in limits.items() if value not in (None, [], ())},
    }


def _words(plan: RoutePlan, data: dict[str, Any]) -> str:
    to = ", ".join(f"{sink['address']} ({sink['method']}, {sink['policy']})" for sink in data["sinks"])
    way = "both ways between" if plan.duplex else "from"
    said = f"{plan.name}: {way} {data['source']} ({data['method']}) {'and' if plan.duplex else 'to'} {to}"
    if plan.holds:
        said += f"; the source can be held by {', '.join(_held(hold) for hold in plan.holds)}"
    if data["limits"]:
        said += f"; limits: {', '.join(f'{key} {_shown(value)}' for key, value in data['limits'].items())}"
    return said


def _held(hold: Hold) -> str:
    if hold.seconds is None:
        return hold.who
    return f"{hold.who} for {hold.seconds:g} s{f', then {hold.then}' if hold.then else ''}"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g} s"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
