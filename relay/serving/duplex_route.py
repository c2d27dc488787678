"""A duplex route at work: its listeners, and its sessions on every engine.

The listeners live on the route's home engine and accept many connections at once; sessions are spread over all
engines, those of one accept in one message each. Each session counts as under way from when it was accepted until
its record is written.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

from relay.duplex.sessions import Sessions
from relay.endpoints.listening import Crowd
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.kernel import core
from relay.serving.facts import Facts
from relay.serving.route import RunningRoute, ids


class DuplexRoute(RunningRoute):
    """A route that moves bytes both ways between each connection and one of its own to the sink."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._persistent = False
        self._under_way = 0
        self._sessions: dict[Engine, Sessions] = {}
        self._overs: deque[tuple[SessionRecord, str]] = deque()  # from other engines
        self._told = False

    def stand(self) -> None:
        """Nothing outlives a session."""

    def begin(self) -> None:
        """Connections come in from now on."""
        self.reception.accept()

    def _crowds(self) -> Crowd:
        return self._crowd

    def _crowd(self, connections: list[tuple[int, str]]) -> None:
        """On the home engine: some connections came at once."""
        spread: dict[Engine, list[tuple[int, str]]] = {}
        for fd, peer in connections:
            if (self._once and self._under_way) or not self._admission.admit(peer):
                core.lib.relay_refuse(fd)
                continue
            self._under_way += 1
            spread.setdefault(next(self._spread), []).append((fd, peer))
        if self._once and self._under_way:
            self.reception.close(sources_only=True)
        for engine, share in spread.items():
            sessions = self._sessions.get(engine)
            if sessions is None:
                sessions = self._sessions[engine] = Sessions(
                    engine,
                    self.name,
                    self.route,
                    self._ways,
                    ids,
                    partial(self._ended, engine),
                    partial(self._short, engine),
                )
            if engine is self.home:
                sessions.begin(share)
            else:
                engine.post(partial(sessions.begin, share))

    def _short(self, engine: Engine, code: int) -> None:
        """On any engine: it was a descriptor short of a session. Newcomers wait in the kernel for a moment."""
        if engine is self.home:
            self.reception.cannot_accept(code)
        else:
            self.home.post(partial(self.reception.cannot_accept, code))

    def _ended(self, engine: Engine, record: SessionRecord, peer: str) -> None:
        """On the session's engine."""
        if engine is self.home:
            self._left(record, peer)
        else:
            self._overs.append((record, peer))
            if not self._told:
                self._told = True
                self.home.post(self._all_left)

    def _all_left(self) -> None:
        self._told = False  # first: whoever comes from here on posts again
        while self._overs:
            self._left(*self._overs.popleft())

    def _left(self, record: SessionRecord, peer: str) -> None:
        self._admission.leave(peer)
        self._under_way -= 1
        self._on_record(record)
        if self.finite:
            self.records.append(record)
        self._look_whether_done()

    def facts(self) -> Facts:
        """What there is to tell of it now. On its home engine."""
        return replace(super().facts(), sessions=tuple(self._sessions.items()))

    @property
    def under_way(self) -> bool:
        """Whether a connection is open."""
        return self._under_way > 0

    def abort(self, reason: str) -> None:
        """Resets every connection."""
        self._ending = True
        self.reception.refuse()
        self.cut_short = self.cut_short or self._under_way > 0
        for engine, sessions in self._sessions.items():
            engine.post(partial(sessions.abort, reason))
        self._look_whether_done()

    def _look_whether_done(self) -> None:
        if self._under_way or self._done:
            return
        super()._look_whether_done()
        if self._done:
            for engine, sessions in self._sessions.items():
                engine.post(sessions.close)


def route_of(name: str, route: Any, *arguments: Any, **options: Any) -> RunningRoute:
    """The running route for the settings `route`: of one way, or duplex."""
    kind = DuplexRoute if route.duplex else RunningRoute
    return kind(name, route, *arguments, **options)
