"""A duplex route with stages at work: its sessions are pipelines, and it has logs on disk like any other route."""

from __future__ import annotations

from functools import partial
from typing import Any

from relay.duplex.staged import StagedSessions
from relay.engine import Engine
from relay.serving.changes import Stages, pairs
from relay.serving.duplex_route import DuplexRoute
from relay.serving.route import RunningRoute
from relay.serving.stream_route import StreamRoute


class StagedRoute(DuplexRoute):
    """A route that moves bytes both ways through stages. A session counts until its mirrors are done, too."""

    def stand(self) -> None:
        """What an earlier run left in logs of mirrors goes on first."""
        self._resumption.begin(standing=False)

    def _sessions_on(self, engine: Engine) -> StagedSessions:
        spill = partial(self._spills.sink, self._ways)
        over = self._left if engine is self.home else self._ended
        made = StagedSessions(engine, self._common, over, partial(self._short, engine), spill)
        made.change(*self._both(), ())
        return made

    def _both(self) -> tuple[Stages, Stages]:
        """The stages of both ways, as they are now."""
        there = len(self.route.stages)
        return self.stages[:there], self.stages[there:]

    def change(self, stages: Stages) -> None:
        """Some of its stages have other settings from now on, those of the way back behind the others."""
        differ = tuple(pairs(self.stages, stages))
        super().change(stages)
        for engine, sessions in self._sessions.items():
            if isinstance(sessions, StagedSessions):
                engine.post(partial(sessions.change, *self._both(), differ))

    def reopen(self) -> None:
        """Files that were moved away are opened anew, those of mirrors too."""
        super().reopen()
        for engine, sessions in self._sessions.items():
            if isinstance(sessions, StagedSessions):
                engine.post(sessions.reopen)


def route_of(name: str, route: Any, *arguments: Any, **options: Any) -> RunningRoute:
    """The running route for the settings `route`: of one way, or duplex, with stages or without."""
    kind: type[RunningRoute] = StreamRoute
    if route.duplex:
        kind = StagedRoute if route.stages or route.replies else DuplexRoute
    return kind(name, route, *arguments, **options)
