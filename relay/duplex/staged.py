"""Sessions of a duplex route with stages: two pipelines over the same two sockets.

Theory of operation. Until both its sockets are connected a session is one like any other: upstreams, tries, limits and
its record are those of `Sessions`, and its C struct owns both descriptors from beginning to end. Then it lends them:
one pipeline goes from the source's connection to the sink's through `stages`, the other back through `replies`. Each
connection is the source of one and the sink of the other, and an event on a socket turns both.

    turning      a stream's end goes through its pipeline, behind the last byte, and shuts the other socket's
                 write side there. When both streams are over the sockets are closed.
    cutting      a party broke. What it had sent flows out to the other one, what was meant for it is lost and its
                 pipeline reads no more. The other one is reset when its kernel has everything, or when it took
                 nothing for GRACE seconds.

The mirrors are their pipelines' own matter: none of them, slow, dead or missing, is looked at here. They may go on
after the sockets are closed; the session's record is told of when both pipelines are over.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from relay.config.models import Route
from relay.duplex.direction import Direction
from relay.duplex.party import Party
from relay.duplex.patrol import Patrol
from relay.duplex.sessions import SHORT, Session, Sessions
from relay.duplex.staged_record import complete
from relay.duplex.upstreams import Upstreams
from relay.endpoints.proxy_header import local_of
from relay.endpoints.socket import GRACE
from relay.engine import Engine, Timer
from relay.errors import KernelError, RelayError, name_of
from relay.journal.record import SessionRecord
from relay.kernel import core
from relay.pipeline.sinks import Spilling
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.ways import Ways

LOOK = 0.05  # seconds between two looks at a session that is cut


class StagedSession:
    """The pipelines of `session`, which is connected, and borrows its descriptors to its parties.

    `over(staged)` is called when there is nothing left for them to do, for `reason` if they broke by themselves;
    `told(staged)` once the session has its record and both pipelines are over.
    """

    def __init__(
        self,
        engine: Engine,
        session: Session,
        over: Callable[[StagedSession, str], None],
        told: Callable[[StagedSession], None],
    ) -> None:
        self.session = session
        self.record: SessionRecord | None = None
        self.parties: tuple[Party, ...] = ()
        self.ways: tuple[Direction, ...] = ()
        self._engine = engine
        self._over = over
        self._told = told
        self._hung: Party | None = None
        self._timer: Timer | None = None
        self._looks = self._parted = False
        self._seen: tuple[int, int] = (-1, -1)
        self._until = 0.0

    def start(self, parties: tuple[Party, ...], ways: tuple[Direction, ...], turn: Turn) -> None:
        """Bytes flow from here on. Raises SourceError when the engine can watch no more."""
        self.parties, self.ways = parties, ways
        for party in parties:
            code = party.attach()
            if code:
                raise party.source.error("watching", code)
        for way in ways:
            if not self._parted:
                way.start(turn)

    # -- what becomes of the parties

    @property
    def broken(self) -> bool:
        """Whether a party has failed, or the session is over."""
        return self._parted or any(party.error for party in self.parties)

    def heard(self, party: Party, error: int) -> int:
        """What comes from `party` is over: cleanly, or by `error`. The errno by which it is so in fact."""
        if error:
            self.broke(party, error)
        self._ended(party)
        self.look_soon()
        return error or party.error

    def _ended(self, party: Party) -> None:
        c = self.session.c
        if not self._parted and not c.first:
            c.first = 1 + self.parties.index(party)

    def broke(self, party: Party, code: int) -> None:
        """Its connection is broken: what is meant for it goes nowhere, what came from it goes on."""
        if party.error or self._parted:
            return
        number = self.parties.index(party)
        self._fails(party, code)
        if party.sink.state in ("open", "cutting"):
            party.sink.fail(party.sink.error("writing to", code))
        self.ways[1 - number].break_off(f"{party.peer} is gone: {name_of(code)}")
        party.source.c.readable = 1
        self._engine.ready(self.ways[number].c)
        self._wait_for_progress()
        self.look_soon()

    def _fails(self, party: Party, code: int) -> None:
        party.error = self.session.c.sides[self.parties.index(party)].error = code
        self._ended(party)

    def hung(self, party: Party) -> None:
        """It failed, which may stand behind bytes that nobody takes: the pump may not come to know of it."""
        if not self.broken and self._hung is None:
            self._hung = party
            self._wait_for_progress()

    # -- ending

    def look_soon(self) -> None:
        """Something came to its end: whether all has is looked at once everybody has heard of it."""
        if not self._looks and not self._parted:
            self._looks = True
            self._engine.post(self._look)

    def _wait_for_progress(self) -> None:
        if self._timer is None:
            self._until = self._engine.now + GRACE
            self._timer = self._engine.later(LOOK, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._look()
        bad = next((party for party in self.parties if party.error), self._hung)
        if self._parted or bad is None:
            return
        seen = self.ways[self.parties.index(bad)].progress
        if seen != self._seen:
            self._seen, self._until = seen, self._engine.now + GRACE
        if self._engine.now < self._until:
            self._timer = self._engine.later(LOOK, self._look_again)
            return
        self._fails(bad, bad.error or errno.ECONNRESET)
        self._over(self, "")

    def _look(self) -> None:
        self._looks = False
        if self._parted:
            return
        bad = [number for number, party in enumerate(self.parties) if party.error]
        if len(bad) == 2:
            self._over(self, "")
        elif bad:
            if self.ways[bad[0]].given and not self.parties[1 - bad[0]].outstanding():
                self._over(self, "")
        elif failed := next((way for way in self.ways if way.over_by_itself), None):
            said = failed.record.reason if failed.record is not None else ""
            self._over(self, said or "a pipeline of it failed")
        elif all(way.given for way in self.ways):
            self._over(self, "")

    def sync(self) -> None:
        """What moved, and when it did last, for those who look at the session and not at its pipelines."""
        c = self.session.c
        c.last_ns = max(c.last_ns, *(party.last_ns for party in self.parties))
        for side, way in zip(c.sides, self.ways, strict=True):
            side.given = min(way.giver.source.moved, way.taken)

    @property
    def untold(self) -> tuple[int, int]:
        """Bytes there and back once its sockets are closed."""
        if self.record is None:
            return 0, 0
        there, back = (min(way.giver.source.moved, way.taken) for way in self.ways)
        return there, back

    def part(self, reason: str) -> None:
        """The sockets are about to be closed. What came from them goes on to the mirrors."""
        self._parted = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for party in self.parties:
            if party.sink.state in ("open", "cutting"):
                party.sink.fail(party.sink.error("writing to", 0, reason=reason))
            party.let_go()
        for way in self.ways:
            way.break_off(reason)
            if way.source is None and way.record is None:  # it never began
                way.abort(reason)

    def abort(self, reason: str) -> None:
        """The mirrors end now, too."""
        for way in self.ways:
            way.abort(reason)

    def way_over(self) -> None:
        """A pipeline is over, or the session is: all is told when both are."""
        if not self._parted:
            self.look_soon()
        elif self.record is not None and all(way.record is not None for way in self.ways):
            self._told(self)


class StagedSessions(Sessions):
    """The sessions of one route with stages on one engine. `spill` makes the sinks that read through a log.

    `on_over` is told of a session when its mirrors are done, too.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        route: Route,
        ways: Ways,
        upstreams: Upstreams,
        ids: Iterator[int],
        on_over: Callable[[SessionRecord, str], None],
        on_short: Callable[[int], None],
        spill: Spilling | None,
    ) -> None:
        super().__init__(engine, name, route, ways, upstreams, ids, self._recorded, on_short)
        self._route = route
        self._stages, self._replies = route.stages, route.replies
        self._crosses = ways
        self._spill = spill
        self._tell_over = on_over
        self._names_peers = True
        self._back = route.back
        self._staged: dict[int, StagedSession] = {}
        self._locals: dict[int, str] = {}
        self._patrol = _Synced(engine, route, self._live, self._expired, self._sync)

    # -- beginning

    def _name_peer(self, session: Session, fd: int, local: str) -> None:
        """It is lent to pipelines once it is connected; a PROXY header is theirs to send."""
        session.c.lends = 1
        if self._route_sink.transparent:
            super()._name_peer(session, fd, local)
        if self._route_sink.proxy_protocol is not None:
            self._locals[session.id] = local or local_of(fd)

    def _event(self, what: int, error: int, slot: int) -> None:
        session = self._live.get(slot) if what == core.CONNECTED else None
        if session is not None:
            self._connected(session)
        else:
            super()._event(what, error, slot)

    def _connected(self, session: Session) -> None:
        staged = StagedSession(self._engine, session, self._staged_over, self._all_over)
        self._staged[session.id] = staged
        at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        turn = Turn(self._name, str(session.id), at, session.peer, local=self._locals.pop(session.id, ""))
        try:
            parties = self._parties(staged)
            staged.start(parties, self._directions(staged, parties), turn)
        except RelayError as error:
            if isinstance(error, KernelError) and -error.errno in SHORT:
                self._on_short(error.errno)
            self._fail(session, 0, "relay", "opening pipes for", str(error))

    def _parties(self, staged: StagedSession) -> tuple[Party, ...]:
        session, sides = staged.session, staged.session.c.sides
        assert session.attempt is not None
        there = session.attempt.upstream
        client = Party(
            self._engine, sides[0].fd, self._route.source.address.scheme, self._source, session.peer, staged
        )
        return client, Party(self._engine, sides[1].fd, there.scheme, there.address, there.name, staged)

    def _directions(self, staged: StagedSession, parties: tuple[Party, ...]) -> tuple[Direction, ...]:
        """The two pipelines of a session. Raises KernelError when no descriptor is left; none is open then."""
        client, server = parties
        made: list[Direction] = []
        try:
            for stages, settings, giver, taker in (
                (self._stages, self._route_sink, client, server),
                (self._replies, self._back, server, client),
            ):
                made.append(
                    Direction(
                        self._engine,
                        self._name,
                        stages,
                        settings,
                        self._crosses,
                        self._spill,
                        giver=giver,
                        taker=taker,
                        heard=staged.heard,
                        on_over=staged.way_over,
                    )
                )
        except BaseException:
            for way in made:
                way.close()
            raise
        return tuple(made)

    def change(
        self,
        stages: tuple[StageSettings, ...],
        replies: tuple[StageSettings, ...],
        differ: Sequence[tuple[StageSettings, StageSettings]],
    ) -> None:
        """These are the stages from now on; of those at work some `differ`, (old, new) each."""
        self._stages, self._replies = stages, replies
        for staged in self._staged.values() if differ else ():
            for way in staged.ways:
                for old, new in differ if not way.closed else ():
                    way.chain.change(old, new)
                    self._engine.ready(way.c)

    # -- the end

    def _staged_over(self, staged: StagedSession, reason: str) -> None:
        if reason:
            self._expired(staged.session, reason)
        else:
            self._over(staged.session)

    def _close(self, session: Session, reason: str, ended_by: str, *, source_failed: bool = False) -> None:
        self._locals.pop(session.id, None)
        staged = self._staged.get(session.id)
        if staged is not None:
            staged.part(reason)
        super()._close(session, reason, ended_by, source_failed=source_failed)

    def _recorded(self, record: SessionRecord, peer: str) -> None:
        """Its sockets are closed."""
        staged = self._staged.get(int(record.id))
        if staged is None:
            self._tell_over(record, peer)
        else:
            staged.record = record
            staged.way_over()

    def _all_over(self, staged: StagedSession) -> None:
        """Its mirrors are done, too."""
        del self._staged[staged.session.id]
        assert staged.record is not None
        if staged.ways:
            complete(staged.record, *staged.ways)
        staged.ways = staged.parties = ()  # which name it
        self._tell_over(staged.record, staged.session.peer)

    def live(self) -> list[Session]:
        """Those whose sockets are open."""
        self._sync()
        return super().live()

    def _sync(self) -> None:
        for staged in self._staged.values():
            if staged.ways and staged.record is None:
                staged.sync()

    @property
    def untold(self) -> tuple[int, int]:
        """Of those whose mirrors are still at work."""
        both = [staged.untold for staged in self._staged.values() if staged.ways]
        return sum(there for there, _ in both), sum(back for _, back in both)

    def reopen(self) -> None:
        """Files that were moved away are opened anew."""
        for staged in self._staged.values():
            for way in staged.ways:
                way.chain.reopen()

    def abort(self, reason: str) -> None:
        """Resets every session, and ends its mirrors."""
        super().abort(reason)
        for staged in list(self._staged.values()):
            staged.abort(reason)


class _Synced(Patrol[Session]):
    """Asks the pipelines when something moved before it looks."""

    def __init__(
        self,
        engine: Engine,
        route: Route,
        live: Mapping[int, Session],
        expired: Callable[[Session, str], None],
        sync: Callable[[], None],
    ) -> None:
        super().__init__(engine, route, live, expired)
        self._sync = sync

    def _look(self) -> None:
        self._sync()
        super()._look()
