"""Which sinks of a route read through a log."""

from __future__ import annotations

from collections.abc import Iterator

from relay.config.models import Route
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.stages.base import StageSettings
from relay.stages.stage import Branch


def spilling(
    route: Route,
) -> Iterator[tuple[str, SinkSettings, OnSlow, tuple[StageSettings, ...]]]:
    """Every sink of the route that reads through a log, with its policy and the stages behind the log."""

    def walk(stages: tuple[StageSettings, ...]) -> Iterator[Branch]:
        for settings in stages:
            branch = settings.make().branch
            if branch is not None:
                yield branch
                if branch.on_slow.policy != "spill":
                    yield from walk(branch.stages)

    for branch in walk(route.stages + route.replies):
        if branch.on_slow.policy == "spill":
            yield str(branch.to.address), branch.to, branch.on_slow, branch.stages
    if route.sink.slow.policy == "spill":
        yield str(route.sink.address), route.sink, route.sink.slow, ()
