"""Plans of configurations, on a machine that is described."""

from __future__ import annotations

from relay.config.load import loads
from relay.kernel.probe import Machine
from relay.planning.hops import RoutePlan
from relay.planning.plan import Plan, make_plan

PLAIN = Machine(cpus=2)


def planned(text: str, here: Machine = PLAIN) -> Plan:
    """The plan of the configuration `text` on a machine that is described, not looked at."""
    return make_plan(loads(text), here)


def planned_route(body: str, here: Machine = PLAIN) -> RoutePlan:
    """The plan of one route in flow style."""
    return planned(f"routes: {{r: {{{body}}}}}", here).routes[0]
