"""A duplex route with stages at work: its sessions are pipelines, and it has logs on disk like any other route."""

from __future__ import annotations

from functools import partial
from typing import Any

from relay.duplex.staged import StagedSessions
from relay.engine import Engine
from relay.serving.changes import Stages, pairs
from relay.serving.duplex_route import DuplexRoute
from relay.serving.names import Found
from relay.serving.reception import Take, nobody
from relay.serving.route import RunningRoute


class StagedRoute(DuplexRoute):
    """A route that moves bytes both ways through stages. A session counts until its mirrors are done, too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.stages = self.route.stages + self.route.replies

    def open(self, found: Found | None = None, take: Take = nobody, *, wait: bool = False) -> None:
        """As a duplex route; what an earlier run left in logs of mirrors goes on first."""
        self.reception.open(found or {}, take)
        self._resumption.begin(standing=False)
        if not wait:
            self.begin()

    def _sessions_on(self, engine: Engine) -> StagedSessions:
        spill = partial(self._spills.sink, self._ways)
        made = StagedSessions(engine, *self._sessions_of(engine), spill=spill)
        made.change(*self._both, ())
        return made

    @property
    def _both(self) -> tuple[Stages, Stages]:
        """Those to the sink and those on the way back, as they were changed since."""
        count = len(self.route.stages)
        return self.stages[:count], self.stages[count:]

    def change(self, stages: Stages) -> None:
        """Some stages of either direction have other settings from now on; what is under way goes on by them."""
        before, self.stages = self.stages, stages
        changed = tuple(pairs(before, stages))
        for engine, sessions in self._sessions.items():
            if isinstance(sessions, StagedSessions):
                engine.post(partial(sessions.change, *self._both, changed))

    @property
    def under_way(self) -> bool:
        """Whether a connection is open, or bytes of a mirror wait."""
        return super().under_way or bool(self._resumption)

    def reopen(self) -> None:
        """Files that were moved away are opened anew, those of mirrors too."""
        super().reopen()
        for engine, sessions in self._sessions.items():
            if isinstance(sessions, StagedSessions):
                engine.post(sessions.reopen)

    def abort(self, reason: str) -> None:
        """Resets every connection; logs of mirrors are delivered no further."""
        self.cut_short = self.cut_short or bool(self._resumption)
        self._resumption.stop(reason)
        super().abort(reason)


def route_of(name: str, route: Any, *arguments: Any, **options: Any) -> RunningRoute:
    """The running route for the settings `route`: of one way, or duplex, with stages or without."""
    kind: type[RunningRoute] = RunningRoute
    if route.duplex:
        kind = StagedRoute if route.stages or route.replies else DuplexRoute
    return kind(name, route, *arguments, **options)
