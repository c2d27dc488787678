"""Sessions of a duplex route with stages: two pipelines over the same two sockets.

Theory of operation. One pipeline goes from the source's connection to the sink's through `stages`, the other back
through `replies`. Each connection is the source of one and the sink of the other; a Party owns its descriptor. An
event on a socket turns both pipelines.

    connecting   the client's bytes wait in the kernel until the sink is connected; a failing connect resets it
    turning      a stream's end goes through its pipeline, behind the last byte, and shuts the other socket's
                 write side there. When both streams are over the sockets are closed.
    cutting      a party broke. What it had sent flows out to the other one, what was meant for it is lost and its
                 pipeline reads no more. The other one is reset when its kernel has everything, or when it took
                 nothing for GRACE seconds.

The mirrors are their pipelines' own matter: none of them, slow, dead or missing, is looked at here. They may go on
after the sockets are closed; the session's record is written when both pipelines are over.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator

from relay.config.models import Route
from relay.duplex.connect import connect
from relay.duplex.direction import Direction
from relay.duplex.party import Party
from relay.duplex.staged_record import record_of
from relay.endpoints.base import hint
from relay.endpoints.settings import EndpointSettings
from relay.endpoints.socket import GRACE, close_with_reset
from relay.engine import Engine, Timer
from relay.errors import KernelError, RelayError, name_of
from relay.journal.record import SessionRecord
from relay.pipeline.sinks import Spilling
from relay.stages.stage import Turn
from relay.ways import Ways

LOOK = 0.05  # seconds between two looks at a session that is cut
STEPS = 10  # looks within a limit of time
LONGEST = 5.0  # seconds between two looks
SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class StagedSession:
    """One connection and its counterpart. Owns the accepted descriptor until its party does, then both parties.

    `on_over(session)` is called once, with `record` there.
    """

    def __init__(
        self, owner: StagedSessions, fd: int, peer: str, ident: int, on_over: Callable[[StagedSession], None]
    ) -> None:
        self.peer = peer
        self.id = ident
        self.time = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.record: SessionRecord | None = None
        self.ended_by = self.reason = ""
        self.source_failed = False
        self.parties: tuple[Party, ...] = ()
        self.ways: tuple[Direction, ...] = ()
        self.began = self.ended = owner.engine.now
        self._owner = owner
        self._engine = owner.engine
        self._fd = fd
        self._on_over = on_over
        self._cancel: Callable[[], None] = lambda: None
        self._first: Party | None = None
        self._hung: Party | None = None
        self._timer: Timer | None = None
        self._looks = False
        self._seen: tuple[int, int] = (-1, -1)
        self._until = 0.0
        self._closed = False

    # -- beginning

    def connect(self) -> None:
        """The sink is connected to."""
        sink = self._owner.route.sink
        self._cancel = connect(self._engine, sink.address, sink.dead_after, self._connected)

    def _connected(self, fd: int, code: int, reason: str) -> None:
        self._cancel = lambda: None
        if self._closed:
            return
        if fd < 0:
            if code in SHORT:
                self._owner.on_short(code)
            advice = hint(code)
            words = reason or f"{os.strerror(code)} ({name_of(code)})" + (f"; {advice}" if advice else "")
            self.end(
                f"connecting to {self._owner.route.sink.address}: {words}",
                "relay" if code in SHORT else "sinks",
            )
            return
        self.parties = self._owner.parties(self._fd, fd, self.peer)
        self._fd = -1
        try:
            self._begin()
        except RelayError as error:
            if isinstance(error, KernelError) and error.errno in SHORT:
                self._owner.on_short(error.errno)
            self.end(f"no pipes for {self.peer}: {error}", "relay")

    def _begin(self) -> None:
        self.ways = tuple(self._owner.directions(self))
        for party in self.parties:
            code = party.attach(self)
            if code:
                raise party.source.error("watching", code)
        turn = Turn(self._owner.name, str(self.id), self.time, self.peer)
        for way in self.ways:
            if not self._closed:
                way.start(turn)

    # -- what becomes of the parties

    @property
    def broken(self) -> bool:
        """Whether a party has failed, or the session was ended."""
        return self._closed or any(party.error for party in self.parties)

    def heard(self, party: Party, error: int) -> int:
        """What comes from `party` is over: cleanly, or by `error`. The errno by which it is so in fact."""
        if error:
            self.broke(party, error)
        self._first = self._first or party
        self.look_soon()
        return error or party.error

    def broke(self, party: Party, code: int) -> None:
        """Its connection is broken: what is meant for it goes nowhere, what came from it goes on."""
        if party.error or self._closed:
            return
        party.error = code
        self._first = self._first or party
        number = self.parties.index(party)
        if party.sink.state in ("open", "cutting"):
            party.sink.fail(party.sink.error("writing to", code))
        if self.ways:
            self.ways[1 - number].break_off(f"{party.who} {party.peer} is gone: {name_of(code)}")
            party.source.c.readable = 1
            self._engine.ready(self.ways[number].c)
        self._wait_for_progress()
        self.look_soon()

    def hung(self, party: Party) -> None:
        """It failed, which may stand behind bytes that nobody takes: the pump may not come to know of it."""
        if not self.broken and self._hung is None:
            self._hung = party
            self._wait_for_progress()

    def dead(self, party: Party, silent: float) -> None:
        """It left what was sent to it unanswered for too long."""
        self.end(
            f"the {party.who} left what was sent to it unanswered for {silent:.3g} s (dead_after)", "relay"
        )

    # -- ending

    def look_soon(self) -> None:
        """Something came to its end: whether all has is looked at once everybody has heard of it."""
        if not self._looks and not self._closed:
            self._looks = True
            self._engine.post(self._look)

    def _wait_for_progress(self) -> None:
        if self._timer is None:
            self._until = self._engine.now + GRACE
            self._timer = self._engine.later(LOOK, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._look()
        if self._closed:
            return
        bad = next((party for party in self.parties if party.error), self._hung)
        if bad is None:
            return
        seen = self.ways[self.parties.index(bad)].progress
        if seen != self._seen:
            self._seen, self._until = seen, self._engine.now + GRACE
        if self._engine.now >= self._until:
            bad.error = bad.error or errno.ECONNRESET
            self._first = self._first or bad
            self._cut()
        else:
            self._timer = self._engine.later(LOOK, self._look_again)

    def _look(self) -> None:
        self._looks = False
        if self._closed or len(self.ways) < 2:
            return
        bad = [number for number, party in enumerate(self.parties) if party.error]
        if len(bad) == 2:
            self._cut()
        elif bad:
            if self.ways[bad[0]].given and not self.parties[1 - bad[0]].outstanding():
                self._cut()
        elif over := next((way for way in self.ways if way.over_by_itself), None):
            said = over.record.reason if over.record is not None else ""
            self.end(said or "its pipeline failed", "relay")
        elif all(way.given for way in self.ways):
            self._close("", self._who(), reset=False)

    def _who(self) -> str:
        return "source" if self._first is self.parties[0] else "sinks"

    def _cut(self) -> None:
        party = next(party for party in self.parties if party.error)
        self.source_failed = party is self.parties[0]
        reason = f"the {party.who} {party.peer}: {os.strerror(party.error)} ({name_of(party.error)})"
        self._close(reason, self._who(), reset=True)

    def end(self, reason: str, ended_by: str) -> None:
        """Both connections are reset; what came from them goes on to the mirrors."""
        if not self._closed:
            self._close(reason, ended_by, reset=True)

    def _close(self, reason: str, ended_by: str, *, reset: bool) -> None:
        self._closed = True
        self.reason, self.ended_by = reason, ended_by
        self.ended = self._engine.now
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._cancel()
        if self._fd >= 0:
            close_with_reset(self._fd)
            self._fd = -1
        for party in self.parties:
            if party.sink.state in ("open", "cutting"):
                party.sink.fail(party.sink.error("writing to", 0, reason=reason))
            party.close(reset=reset)
        for way in self.ways:
            way.break_off(reason)
            if way.source is None and way.record is None:  # it never began
                way.abort(reason)
        self.way_over()

    def abort(self, reason: str) -> None:
        """Everything ends now, mirrors too."""
        self.end(reason, "relay")
        for way in self.ways:
            way.abort(reason)

    def way_over(self) -> None:
        """A pipeline is over: the session is, if its sockets are closed and the other pipeline is over, too."""
        if not self._closed:
            self.look_soon()
        elif self.record is None and all(way.record is not None for way in self.ways):
            self.record = record_of(self, self._owner.route, self._owner.name)
            self._on_over(self)

    @property
    def last(self) -> float:
        """When something moved last."""
        return max((party.last for party in self.parties), default=0.0)

    @property
    def closed(self) -> bool:
        """Whether its sockets are: only mirrors are still at work then."""
        return self._closed


class StagedSessions:
    """The sessions of one route with stages on one engine: to the route what `Sessions` is to one without.

    `spill` makes the sinks that read through a log.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        route: Route,
        ways: Ways,
        ids: Iterator[int],
        on_over: Callable[[SessionRecord, str], None],
        on_short: Callable[[int], None],
        spill: Spilling | None,
    ) -> None:
        self.engine = engine
        self.name = name
        self.route = route
        self.on_short = on_short
        self._ways = ways
        self._ids = ids
        self._on_over = on_over
        self._spill = spill
        self._live: set[StagedSession] = set()
        self._to = route.sink
        self._back = route.back
        limits = route.source.limits
        steps = [limit / STEPS for limit in (limits.idle, limits.lifetime) if limit is not None]
        self._step = max(0.01, min([*steps, LONGEST])) if steps else 0.0
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._live)

    def begin(self, connections: list[tuple[int, str]]) -> None:
        """New sessions for accepted connections, nonblocking (descriptor, peer); they are this object's from here."""
        for fd, peer in connections:
            session = StagedSession(self, fd, peer, next(self._ids), self._over)
            self._live.add(session)
            session.connect()
        self._look_soon()

    def parties(self, client: int, server: int, peer: str) -> tuple[Party, Party]:
        """Both peers of a session; the descriptors are theirs."""
        source, sink = self.route.source, self.route.sink
        return (
            self._party(client, "source", source, peer),
            self._party(server, "sink", sink, str(sink.address)),
        )

    def _party(self, fd: int, who: str, end: EndpointSettings, peer: str) -> Party:
        scheme, address = end.address.scheme, str(end.address)
        return Party(
            self.engine,
            fd,
            who=who,
            scheme=scheme,
            address=address,
            peer=peer,
            dead_after=end.dead_after,
        )

    def directions(self, session: StagedSession) -> Iterator[Direction]:
        """The two pipelines of a session. Raises KernelError when no descriptor is left; none is open then."""
        made: list[Direction] = []
        client, server = session.parties
        plans = (
            (self.route.stages, self._to, client, server),
            (self.route.replies, self._back, server, client),
        )
        try:
            for stages, settings, giver, taker in plans:
                made.append(
                    Direction(
                        self.engine,
                        self.name,
                        stages,
                        settings,
                        self._ways,
                        self._spill,
                        giver=giver,
                        taker=taker,
                        heard=session.heard,
                        on_over=session.way_over,
                    )
                )
        except BaseException:
            for way in made:
                way.close()
            raise
        return iter(made)

    def _over(self, session: StagedSession) -> None:
        self._live.discard(session)
        assert session.record is not None
        self._on_over(session.record, session.peer)

    # -- limits of time, looked at for all of them together

    def _look_soon(self) -> None:
        if self._step and self._timer is None and self._live:
            self._timer = self.engine.later(self._step, self._look)

    def _look(self) -> None:
        self._timer = None
        limits, now = self.route.source.limits, self.engine.now
        for session in list(self._live):
            if session.closed:
                continue
            if limits.lifetime is not None and now - session.began >= limits.lifetime:
                session.end(f"it lived for {limits.lifetime:g} s (limits.lifetime)", "relay")
            elif limits.idle is not None and now - max(session.began, session.last) >= limits.idle:
                session.end(f"nothing moved for {limits.idle:g} s (limits.idle)", "relay")
        self._look_soon()

    # -- ending

    def reopen(self) -> None:
        """Files that were moved away are opened anew."""
        for session in self._live:
            for way in session.ways:
                way.chain.reopen()

    def abort(self, reason: str) -> None:
        """Resets every session, and ends its mirrors."""
        for session in list(self._live):
            session.abort(reason)

    def close(self) -> None:
        """Every session is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
