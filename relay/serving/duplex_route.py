"""A duplex route at work: its listeners, and its sessions on every engine.

The listeners live on the route's home engine and accept many connections at once; sessions are spread over all
engines, those of one accept in one message each, and their connects begin in the order of accepts (duplex/begun.py).
Each session counts as under way from when it was accepted until its record is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from relay.duplex.begun import Beginnings, Begun
from relay.duplex.health import Checks
from relay.duplex.sessions import Common, Sessions
from relay.duplex.upstreams import Upstreams
from relay.endpoints.listening import Crowd
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.kernel import core
from relay.serving.facts import Facts
from relay.serving.introductions import Introduced
from relay.serving.resumption import ids
from relay.serving.route import RunningRoute


class DuplexRoute(RunningRoute):
    """A route that moves bytes both ways between each connection and one of its own to the sink."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._under_way = 0
        self._sessions: dict[Engine, Sessions] = {}
        self._overs: deque[tuple[SessionRecord, str]] = deque()  # from other engines
        self._told = False
        self.upstreams = Upstreams(self.name, self.route.sink, self.home)
        self._beginnings = Beginnings(self.upstreams, self.route.sink)
        self._unready: deque[tuple[float, list[tuple[Engine, Introduced]]]] = deque()  # when they came
        self._checks: Checks | None = None
        self._replaced = False

    def follow(self, old: RunningRoute) -> None:
        """What the route whose place it takes knows of the upstreams that both have goes on."""
        if isinstance(old, DuplexRoute):
            self.upstreams = Upstreams(self.name, self.route.sink, self.home, old.upstreams)
            self._beginnings = Beginnings(self.upstreams, self.route.sink)

    def begin(self) -> None:
        """Connections come in from now on."""
        super().begin()
        if self.route.sink.health is not None:
            self._checks = Checks(self.home, self.upstreams, self.route.sink)
            self.home.post(self._checks.start)

    def _check_no_more(self) -> None:
        if self._checks is not None:
            self._checks.stop()

    def drain(self) -> None:
        """As for every route; upstreams are not checked any more."""
        self._check_no_more()
        super().drain()

    def leave(self) -> None:
        """As for every route; whoever took its place tells of the upstreams that both have."""
        self._replaced = True
        super().leave()

    def _crowds(self) -> Crowd:
        return self._crowd

    def _let_in(self, connections: list[Introduced]) -> None:
        came: list[tuple[Engine, Introduced]] = []
        for who in connections:
            fd, peer, _local, _via = who
            if (self._once and self._under_way) or not self._admission.admit(peer):
                core.lib.relay_refuse(fd)
                continue
            self._under_way += 1
            came.append((next(self._spread), who))
        if self._once and self._under_way:
            self.reception.close(sources_only=True)
        if not came:
            return
        if self._unready or any(engine is not self.home for engine, _who in came):
            self._unready.append((self.home.now, came))
            self.upstreams.ready(self.home, self._connect)
        else:
            self._on(self.home).begin([who for _engine, who in came])

    def _connect(self) -> None:
        """The upstreams are known: connects begin for the crowd that has waited longest."""
        if self._unready:
            came, crowd = self._unready.popleft()
            begun = self._beginnings.begin([who.peer for _engine, who in crowd], came, self.home.now)
            self._share_out(crowd, begun)

    def _share_out(self, crowd: Sequence[tuple[Engine, Introduced]], begun: Sequence[Begun | None]) -> None:
        shares: dict[Engine, list[tuple[Introduced, Begun | None]]] = {}
        for (engine, who), one in zip(crowd, begun, strict=True):
            shares.setdefault(engine, []).append((who, one))
        for engine, share in shares.items():
            sessions = self._on(engine)
            if engine is self.home:
                sessions.go_on(share)
            else:
                engine.post(partial(sessions.go_on, share))

    def _on(self, engine: Engine) -> Sessions:
        sessions = self._sessions.get(engine)
        if sessions is None:
            sessions = self._sessions[engine] = self._sessions_on(engine)
        return sessions

    @property
    def _common(self) -> Common:
        return Common(self.name, self.route, self._ways, self.upstreams, ids)

    def _sessions_on(self, engine: Engine) -> Sessions:
        """Those that will be on that engine."""
        over = self._left if engine is self.home else self._ended
        return Sessions(engine, self._common, over, partial(self._short, engine))

    def _short(self, engine: Engine, code: int) -> None:
        """On any engine: it was a descriptor short of a session. Newcomers wait in the kernel for a moment."""
        if engine is self.home:
            self.reception.cannot_accept(code)
        else:
            self.home.post(partial(self.reception.cannot_accept, code))

    def _ended(self, record: SessionRecord, peer: str) -> None:
        """On the session's engine, which is another one."""
        self._overs.append((record, peer))
        if not self._told:
            self._told = True
            self.home.post(self._all_left)

    def _all_left(self) -> None:
        self._told = False  # first: whoever comes from here on posts again
        while self._overs:
            self._left(*self._overs.popleft())

    def _left(self, record: SessionRecord, peer: str) -> None:
        """On the home engine."""
        self._admission.leave(peer)
        self._under_way -= 1
        self._on_record(record)
        if self.finite:
            self.records.append(record)
        self._look_whether_done()

    def facts(self) -> Facts:
        """What there is to tell of it now. On its home engine."""
        upstreams = () if self._replaced else self.upstreams.snapshot()
        return replace(super().facts(), sessions=tuple(self._sessions.items()), upstreams=upstreams)

    @property
    def under_way(self) -> bool:
        """Whether a connection is open."""
        return self._under_way > 0 or super().under_way

    def abort(self, reason: str) -> None:
        """Resets every connection."""
        self._check_no_more()
        self.cut_short = self.cut_short or self.under_way
        while self._unready:
            _came, crowd = self._unready.popleft()
            self._share_out(crowd, [None] * len(crowd))
        for engine, sessions in self._sessions.items():
            engine.post(partial(sessions.abort, reason))
        super().abort(reason)

    def _look_whether_done(self) -> None:
        if not self._under_way:
            super()._look_whether_done()

    def _finished(self) -> None:
        self._check_no_more()
        for engine, sessions in self._sessions.items():
            engine.post(sessions.close)
