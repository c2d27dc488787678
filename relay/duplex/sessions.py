"""Duplex sessions: the connections of one route on one engine, each relayed both ways by C (kernel/duplex.c).

Theory of operation. There may be thousands of sessions and thousands of new ones a second, so a session is a C struct
with two descriptors, and here a small object that knows what its record will want. C comes back for two things: a
connect that failed, after which another upstream is tried, and a session that is over. Everything else, how bytes
move, how ends and resets pass, is C's. Nothing is read from a client before its upstream is connected, so what it sent
meanwhile waits in the kernel for whichever upstream that is. A limit of time is looked at for all sessions together
(see Patrol).
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from relay.config.models import Route
from relay.duplex.begun import SHORT, Begun, Client
from relay.duplex.gauge import Gauge
from relay.duplex.patrol import Patrol
from relay.duplex.session import Session
from relay.duplex.upstream import Attempt, in_words
from relay.duplex.upstreams import Upstreams
from relay.endpoints.base import hint
from relay.endpoints.dial import TRANSPARENT, sockaddr_from
from relay.endpoints.proxy_header import local_of, make
from relay.endpoints.tcp import CHECK_NAME
from relay.engine import Engine
from relay.errors import name_of
from relay.journal.record import SessionRecord, SinkRecord
from relay.kernel import core
from relay.ways import Ways

BACKLOG_FULL = 0.02  # seconds until unix listeners whose backlogs were full are tried again
TRIAL = 0.01, 0.2  # seconds after which a connect to an ejected upstream is looked at, at first and at most

NOT_FROM_THERE = {
    errno.EPERM: TRANSPARENT,
    errno.EAFNOSUPPORT: "'transparent' needs a sink of the peer's address family, IPv4 or IPv6",
}

lib = core.lib


class Common(NamedTuple):
    """What the sessions of one route share, whichever engine they are on."""

    name: str
    route: Route
    ways: Ways
    upstreams: Upstreams
    ids: Iterator[int]


class Sessions:
    """The sessions of one route on one engine. `on_over(record, peer)` is told of each that ended, `on_short(errno)`
    when no descriptor was left, both on the engine's thread.

    `begin` and `go_on` take connections over; `abort` resets whatever is left.
    """

    def __init__(
        self,
        engine: Engine,
        common: Common,
        on_over: Callable[[SessionRecord, str], None],
        on_short: Callable[[int], None] = lambda _code: None,
    ) -> None:
        name, route, ways, self._upstreams, self._ids = common
        self._engine = engine
        self._name = name
        self._source = str(route.source.address)
        self._sink = str(route.sink.address)
        self._route_sink = route.sink
        self._names_peers = route.sink.proxy_protocol is not None or route.sink.transparent
        self._tries = route.sink.tries
        self._timeout = route.sink.connect_timeout
        self._on_over = on_over
        self._on_short = on_short
        self._fresh: deque[Session] = deque()  # accepted together, not connecting so far
        self._exchange = engine.exchange()
        self._token = engine.register(self._event)
        self._tcp = int(route.source.address.scheme == "tcp")
        there = {scheme: ways.duplex(scheme) for scheme in {each.scheme for each in route.sink.addresses}}
        self._why = {scheme: each.reason for scheme, each in there.items() if each.method == "copy"}
        self._gauge = Gauge(engine, name, ways, route.source.address.scheme, there)
        self._schemes = route.sink.address.scheme, route.source.address.scheme
        # of the upstreams that a session is tried at some may want another method than it began with
        self._mixed = len(there) > 1
        self._live: dict[int, Session] = {}
        self._patrol = Patrol(engine, route, self._live, self._expired)

    def __len__(self) -> int:
        return len(self._live)

    @property
    def methods(self) -> tuple[str, str]:
        """How bulk crosses to the sink, and back."""
        there, back = (core.METHOD_NAMES[method] for method in self._codes())
        return there, back

    def _codes(self) -> tuple[int, int]:
        there, back = self._schemes
        return self._gauge.method(0, there), self._gauge.method(1, back)

    def live(self) -> list[Session]:
        """Those that are not over. On the engine's thread; a session that is over later has slot -1."""
        return list(self._live.values())

    @property
    def untold(self) -> tuple[int, int]:
        """Bytes, there and back, of sessions that are neither live nor told to be over."""
        return 0, 0

    def begin(self, clients: Sequence[Client]) -> None:
        """New sessions for accepted connections, which are this object's from here."""
        now, methods = self._engine.now, self._codes()
        self._fresh.extend([self._made(client, now, methods) for client in clients])
        self._dial_fresh(now)

    def go_on(self, clients: Sequence[tuple[Client, Begun | None]]) -> None:
        """As `begin`, for clients whose connects were begun elsewhere, or (None) could not be."""
        now, methods = self._engine.now, self._codes()
        for client, begun in clients:
            session = self._made(client, begun.came if begun is not None else now, methods)
            if begun is None:
                self._fresh.append(session)
            else:
                self._adopt(session, begun, now)
        self._dial_fresh(now)

    def _made(self, client: Client, came: float, methods: tuple[int, int]) -> Session:
        """A new session; one that could not be registered is over."""
        fd, peer, local, via = client
        slot = self._exchange.take()
        c = self._exchange.sessions[slot]
        session = self._live[slot] = Session(slot, c, next(self._ids), peer, via, came)
        error = lib.relay_duplex_begin(self._engine.c, c, fd, self._tcp, *methods, self._token, slot)
        c.gauges = self._gauge.measures
        if error:
            self._fail(session, -error, "source", "registering")
        elif self._names_peers:
            self._name_peer(session, fd, local)
        return session

    def _dial_fresh(self, now: float) -> None:
        known = self._upstreams.known(now)
        while self._fresh:
            session = self._fresh.popleft()
            if known:
                self._dial(session, now)
            else:
                self._upstreams.ready(self._engine, partial(self._dial, session))
        self._patrol.look_soon()

    def _adopt(self, session: Session, begun: Begun, now: float) -> None:
        """Its first connect was begun."""
        attempt = begun.attempt
        if session.slot < 0:
            lib.relay_refuse(begun.fd)
            self._upstreams.leave(attempt)
            return
        session.until = begun.at + self._timeout
        self._tries_at(session, attempt)
        if begun.fd < 0:
            self._refused(session, attempt, -begun.fd)
            self._next(session)
            return
        share = self._timeout / max(1, min(self._tries, len(self._upstreams)))
        left = int(max(0.0, begun.at + share - now) * 1e9)
        tcp = attempt.upstream.scheme == "tcp"
        error = lib.relay_duplex_adopt(self._engine.c, session.c, begun.fd, tcp, not tcp, left)
        if error:  # it cannot be watched, which is no upstream's fault: as if there had been none
            self._upstreams.refused(attempt, -error)
            session.attempt, session.tries = None, 0
            self._next(session)
        elif attempt.trial:
            self._look_at_trial(session, attempt, TRIAL[0])

    def _name_peer(self, session: Session, fd: int, local: str) -> None:
        """The sink learns of the session's peer, by a PROXY header or by the address that connects to it."""
        c = session.c
        if self._route_sink.proxy_protocol is not None:
            header = make(self._route_sink.proxy_protocol, session.peer, local or local_of(fd))
            c.ahead = session.ahead = core.ffi.new("char[]", header)
            c.ahead_size = len(header)
        if self._route_sink.transparent:
            address = sockaddr_from(session.peer)
            core.ffi.memmove(c.origin, address, len(address))
            c.origin_size = len(address)

    # -- connecting

    def _dial(self, session: Session, now: float | None = None) -> None:
        """The upstreams are known: the first that is chosen is tried."""
        if session.slot >= 0:
            now = self._engine.now if now is None else now
            session.until = now + self._timeout
            self._next(session, now)

    def _next(self, session: Session, now: float | None = None) -> None:
        """Tries one upstream after another until a connect does not fail at once. `now`: the time, if it is known."""
        most = min(self._tries, len(self._upstreams))
        while session.slot >= 0:
            now = self._engine.now if now is None else now
            attempt = None
            if session.tries < most and (not session.tries or now < session.until):
                attempt = self._upstreams.pick(session.peer, session.tried)
            if attempt is None:
                self._not_to_be_connected(session)
                return
            upstream = attempt.upstream
            self._tries_at(session, attempt)
            share = int(max(0.0, session.until - now) * 1e9 / (most - session.tries + 1))
            now = None
            error = lib.relay_duplex_dial(self._engine.c, session.c, upstream.dial, share)
            while error in SHORT and self._make_room(-error):
                error = lib.relay_duplex_dial(self._engine.c, session.c, upstream.dial, share)
            if not error:
                if attempt.trial:
                    self._look_at_trial(session, attempt, TRIAL[0])
                return
            self._refused(session, attempt, -error)

    def _tries_at(self, session: Session, attempt: Attempt) -> None:
        session.attempt = attempt
        session.tries += 1
        if attempt.passed:
            self._passed(session, attempt.passed)
        if self._mixed:
            session.c.sides[0].method = self._gauge.method(0, attempt.upstream.scheme)

    def _make_room(self, code: int) -> bool:
        """No descriptor is left for a connection's counterpart: of those accepted with it the last gives up its own."""
        self._on_short(code)
        while self._fresh:
            last = self._fresh.pop()
            if last.slot >= 0:
                self._fail(last, code, "relay", "opening a connection for")
                return True
        return False

    def _refused(self, session: Session, attempt: Attempt, code: int) -> None:
        """An upstream that it could not be connected to is out of the question, and others hear of it."""
        session.attempt = None
        session.tried += (attempt.upstream,)
        session.failed = (attempt.upstream, code)
        session.busy = session.busy or code == errno.EAGAIN
        self._upstreams.refused(attempt, code)
        self._passed(session, [(attempt.upstream.name, in_words(code))])

    def _passed(self, session: Session, those: list[tuple[str, str]]) -> None:
        """Why upstreams did not get it: the latest word on each."""
        session.passed = tuple({**dict(session.passed), **dict(those)}.items())

    def _not_to_be_connected(self, session: Session) -> None:
        """All that may be tried were. A unix listener's backlog that was full may have room soon: nothing tells."""
        if session.busy and self._engine.now < session.until:
            session.busy, session.tried, session.tries = False, (), 0
            self._engine.later(BACKLOG_FULL, partial(self._next, session))
            return
        if session.failed is None:
            self._fail(session, 0, "sinks", "connecting to", f"{self._upstreams.reason}; {CHECK_NAME}")
            return
        last, code = session.failed
        session.passed = tuple(one for one in session.passed if one[0] != last.name)
        code = errno.ETIMEDOUT if code == errno.EAGAIN else code
        self._fail(session, code, "sinks", "connecting to", whom=last.name)

    def _look_at_trial(self, session: Session, attempt: Attempt, wait: float) -> None:
        """It connects to an upstream that was ejected: others may go there again as soon as it is connected."""

        def look() -> None:
            if session.attempt is not attempt or session.slot < 0:
                return
            if session.c.state == lib.RELAY_CONNECTING:
                self._look_at_trial(session, attempt, min(2 * wait, TRIAL[1]))
            else:
                self._upstreams.connected(attempt)

        self._engine.later(wait, look)

    def _not_connected(self, session: Session, code: int) -> None:
        if session.attempt is not None:
            self._refused(session, session.attempt, code)
        self._next(session)

    # -- the end

    def _event(self, what: int, error: int, slot: int) -> None:
        session = self._live.get(slot)
        if session is None:
            return
        if what == core.OVER:
            self._over(session)
        elif what == core.NOT_CONNECTED:
            self._not_connected(session, error)
        elif what == core.GAUGED:
            self._gauge.heard(session, error, self._live.values())

    def _over(self, session: Session) -> None:
        a, b = session.c.sides[0], session.c.sides[1]
        code_a, code_b = a.error, b.error
        attempt = session.attempt
        if attempt is not None and attempt.trial:
            self._upstreams.connected(attempt)
        if not (code_a or code_b):
            self._close(session, "", "source" if session.c.first == 1 else "sinks")
            return
        first = session.c.first
        ended_by = "source" if first == 1 else "sinks" if first == 2 else "source" if code_a else "sinks"
        sink = attempt.upstream.name if attempt is not None else self._sink
        who, address, code = ("source", session.peer, code_a) if code_a else ("sink", sink, code_b)
        reason = f"the {who} {address}: {os.strerror(code)} ({name_of(code)})"
        self._close(session, reason, ended_by, source_failed=bool(code_a))

    def _fail(
        self, session: Session, code: int, ended_by: str, operation: str, words: str = "", whom: str = ""
    ) -> None:
        """It never came to be a session of two."""
        if not words:
            advice = hint(code)
            if self._route_sink.transparent and ended_by == "sinks":
                advice = NOT_FROM_THERE.get(code, advice)
            words = in_words(code) + (f"; {advice}" if advice else "")
        whom = whom or (self._sink if ended_by == "sinks" else session.peer)
        self._close(session, f"{operation} {whom}: {words}", ended_by)

    def _expired(self, session: Session, reason: str) -> None:
        """A limit of time is reached, or a peer is dead."""
        self._close(session, reason, "relay")

    def abort(self, reason: str) -> None:
        """Resets every session."""
        for session in list(self._live.values()):
            self._close(session, reason, "relay")

    def _close(self, session: Session, reason: str, ended_by: str, *, source_failed: bool = False) -> None:
        """Closes both descriptors, with resets if there is a `reason`, and tells of it."""
        slot, c = session.slot, session.c
        a, b = c.sides[0], c.sides[1]
        to, back = a.given, b.given
        lost, back_lost = a.moved - to, b.moved - back
        method = "splice" if a.spliced * 2 > to else "copy"
        back_method = "splice" if b.spliced * 2 > back else "copy"
        connected = c.connected_ns / 1e9
        measured = self._gauge.over(session) if c.gauges else {}
        lib.relay_duplex_close(self._engine.c, c, bool(reason))
        session.slot = -1
        del self._live[slot]
        self._exchange.give_back(slot)
        attempt, address, upstream, why = session.attempt, self._sink, "", ""
        if attempt is not None:
            address, upstream = attempt.upstream.address, attempt.upstream.name
            if method == "copy":
                why = self._why.get(attempt.upstream.scheme, "")
            if session.passed:
                session.passed = tuple(one for one in session.passed if one[0] != upstream)
            self._upstreams.leave(attempt)
        seconds = self._engine.now - session.began
        result = "failed" if reason else "delivered"
        # what a record must have by its place, the rest by name afterwards: by name alone is thrice the price
        sink = SinkRecord(self._sink, address, to, seconds, method, result)
        sink.lost, sink.upstream, sink.tries, sink.passed_over = lost, upstream, session.tries, session.passed
        if connected:
            took = connected - session.began
            sink.connects = (took if took > 1e-6 else 1e-6,)
        name, ident, moved = self._name, str(session.id), to + lost
        record = SessionRecord(
            name, ident, self._source, session.peer, moved, seconds, method, ended_by, result
        )
        record.reason, record.why_method, record.sinks = reason, why, [sink]
        record.source_failed, record.measured, record.via = source_failed, measured, session.via
        record.back, record.back_lost, record.back_method = back, back_lost, back_method
        self._on_over(record, session.peer)

    def close(self) -> None:
        """Hears of nothing any more. Every session is over."""
        self._patrol.close()
        self._engine.forget_token(self._token)
