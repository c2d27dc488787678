"""What the configuration knows and this version does not act on yet: refused, never ignored.

The models and the schema keep it. So far that is what duplex routes do without.
"""

from __future__ import annotations

from collections.abc import Iterator

from relay.config.models import Config, Route
from relay.settings import Problem


def refusals(config: Config) -> Iterator[Problem]:
    """A problem for each key in `config` that nothing acts on, at its place in the document."""
    for name, route in config.routes.items():
        if route.duplex:
            yield from (problem.within("routes", name) for problem in _duplex(route))


def _duplex(route: Route) -> Iterator[Problem]:
    """What a duplex route cannot have so far, and what would mean nothing there."""
    later = "is not available on duplex routes in this version"
    if not route.source.listen:
        key = route.source.verb if route.source.connect else route.source.address.scheme
        yield Problem(f"'{key}' {later}; its source listens", ("source", key), at_key=True)
    if not route.sink.connect:
        yield Problem(f"'fd' {later}; its sink connects", ("sink", "fd"), at_key=True)
    none = "means nothing on a duplex route"
    if route.source.connections == "one":
        said = f"'connections: one' {none}: each connection has one to the sink of its own"
        yield Problem(said, ("source", "connections"), at_key=True)
    if route.sink.slow.policy != "block" or route.sink.slow.buffer:
        said = f"'on_slow' {none}: a side that takes nothing holds the other back, as over one connection"
        yield Problem(said, ("sink", "on_slow"), at_key=True)
    if route.wait_for_sinks is not None:
        said = f"'wait_for_sinks' {none}: nothing is read from a connection before its sink is there"
        yield Problem(said, ("wait_for_sinks",), at_key=True)
