"""Duplex sessions: the connections of one route on one engine, each relayed both ways by C (kernel/duplex.c).

Theory of operation. There may be thousands of sessions and thousands of new ones a second, so a session is a C struct
with two descriptors, and here a small object that knows what its record will want. C comes back for two things: a
connect that failed, after which the next address is tried, and a session that is over. Everything else, how bytes
move, how ends and resets pass, is C's. A limit of time is looked at for all sessions together (see Patrol).
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from relay.config.models import Route
from relay.duplex.patrol import Patrol
from relay.endpoints.base import hint
from relay.endpoints.connecting import CONNECT_TIMEOUT
from relay.endpoints.dial import Dials
from relay.endpoints.tcp import CHECK_NAME
from relay.engine import Engine
from relay.errors import name_of
from relay.journal.record import SessionRecord, SinkRecord
from relay.kernel import core
from relay.ways import Ways

BACKLOG_FULL = 0.02  # seconds until a unix listener whose backlog was full is tried again

SHORT = (-errno.EMFILE, -errno.ENFILE, -errno.ENOBUFS, -errno.ENOMEM)

lib = core.lib


class Session:
    """One connection and its counterpart. `slot` is its number in the exchange, -1 once it is closed."""

    __slots__ = ("began", "c", "id", "peer", "slot")

    def __init__(self, slot: int, c: core.Struct, ident: int, peer: str, began: float) -> None:
        self.slot = slot
        self.c = c
        self.id = ident
        self.peer = peer
        self.began = began


class Way(NamedTuple):
    """One direction of a session that is over: bytes the receiver's kernel took, those that were read and had
    nowhere to go, and how most of them crossed."""

    bytes: int
    lost: int
    method: str

    @classmethod
    def of(cls, side: core.Struct) -> Way:
        """What came from `side`."""
        given = side.given
        return cls(given, side.moved - given, "splice" if side.spliced * 2 > given else "copy")


class Sessions:
    """The sessions of one route on one engine. `on_over(record, peer)` is told of each that ended, `on_short(errno)`
    when no descriptor was left, both on the engine's thread.

    `begin` takes connections over; `abort` resets whatever is left.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        route: Route,
        ways: Ways,
        ids: Iterator[int],
        on_over: Callable[[SessionRecord, str], None],
        on_short: Callable[[int], None] = lambda _code: None,
    ) -> None:
        self._engine = engine
        self._name = name
        self._source = str(route.source.address)
        self._sink = str(route.sink.address)
        self._ids = ids
        self._on_over = on_over
        self._on_short = on_short
        self._fresh: deque[Session] = deque()  # accepted together, not connecting so far
        self._exchange = engine.exchange()
        self._token = engine.register(self._event)
        self._dials = Dials(engine, route.sink.address, route.sink.dead_after)
        self._tcp = int(route.source.address.scheme == "tcp")
        choices = [ways.duplex(end.address.scheme) for end in (route.sink, route.source)]
        self._methods = [core.SPLICE if choice.method == "splice" else core.COPY for choice in choices]
        self._why = choices[0].reason if choices[0].method == "copy" else ""
        self._live: dict[int, Session] = {}
        self._attempts: dict[int, tuple[list[core.Struct], int, float]] = {}  # slot: addresses, which, until
        self._patrol = Patrol(engine, route, self._live, self._expired)

    def __len__(self) -> int:
        return len(self._live)

    @property
    def methods(self) -> tuple[str, str]:
        """How bulk crosses to the sink, and back."""
        there, back = (core.METHOD_NAMES[method] for method in self._methods)
        return there, back

    def live(self) -> list[Session]:
        """Those that are not over. On the engine's thread; a session that is over later has slot -1."""
        return list(self._live.values())

    def begin(self, connections: list[tuple[int, str]]) -> None:
        """New sessions for accepted connections, nonblocking (descriptor, peer); they are this object's from here."""
        now = self._engine.now
        exchange, live = self._exchange, self._live
        fresh = self._fresh
        for fd, peer in connections:
            slot = exchange.take()
            c = exchange.sessions[slot]
            session = live[slot] = Session(slot, c, next(self._ids), peer, now)
            fresh.append(session)
            error = lib.relay_duplex_begin(
                self._engine.c, c, fd, self._tcp, *self._methods, self._token, slot
            )
            if error:
                self._fail(session, -error, "source", "registering")
        while fresh:
            self._dials.get(partial(self._dial, fresh.popleft()))
        self._patrol.look_soon()

    # -- connecting

    def _dial(self, session: Session, dials: list[core.Struct], reason: str) -> None:
        """The addresses are known: the first is tried."""
        if session.slot < 0:
            return
        if not dials:
            self._fail(session, 0, "sinks", "connecting to", f"{reason}; {CHECK_NAME}")
            return
        # most often the first try is all there is
        share = int(CONNECT_TIMEOUT * 1e9 / len(dials))
        error = lib.relay_duplex_dial(self._engine.c, session.c, dials[0], share)
        while error in SHORT and self._make_room(-error):
            error = lib.relay_duplex_dial(self._engine.c, session.c, dials[0], share)
        if error:
            self._attempt(session, dials, 0, session.began + CONNECT_TIMEOUT)
        elif len(dials) > 1:
            self._attempts[session.slot] = (dials, 0, session.began + CONNECT_TIMEOUT)

    def _make_room(self, code: int) -> bool:
        """No descriptor is left for a connection's counterpart: of those accepted with it the last gives up its own."""
        self._on_short(code)
        while self._fresh:
            last = self._fresh.pop()
            if last.slot >= 0:
                self._fail(last, code, "relay", "opening a connection for")
                return True
        return False

    def _attempt(self, session: Session, dials: list[core.Struct], number: int, until: float) -> None:
        """Tries the addresses from `number` on until one does not fail at once."""
        if session.slot < 0:
            return
        code = errno.EADDRNOTAVAIL
        while number < len(dials):
            left = until - self._engine.now
            share = int(max(0.0, left) * 1e9 / (len(dials) - number))
            code = -lib.relay_duplex_dial(self._engine.c, session.c, dials[number], share)
            if not code:
                self._attempts[session.slot] = (dials, number, until)
                return
            if code == errno.EAGAIN and left > 0:  # a unix listener's backlog is full
                self._engine.later(BACKLOG_FULL, partial(self._attempt, session, dials, number, until))
                return
            number += 1
        self._fail(session, errno.ETIMEDOUT if code == errno.EAGAIN else code, "sinks", "connecting to")

    def _not_connected(self, session: Session, code: int) -> None:
        dials, number, until = self._attempts.pop(session.slot, ([], 0, 0.0))
        if number + 1 < len(dials):
            self._attempt(session, dials, number + 1, until)
        else:
            self._fail(session, code, "sinks", "connecting to")

    # -- the end

    def _event(self, what: int, error: int, slot: int) -> None:
        session = self._live.get(slot)
        if session is None:
            return
        if what == core.OVER:
            self._over(session)
        elif what == core.NOT_CONNECTED:
            self._not_connected(session, error)

    def _over(self, session: Session) -> None:
        a, b = session.c.sides[0], session.c.sides[1]
        code_a, code_b = a.error, b.error
        if not (code_a or code_b):
            self._close(session, "", "source" if session.c.first == 1 else "sinks")
            return
        first = session.c.first
        ended_by = "source" if first == 1 else "sinks" if first == 2 else "source" if code_a else "sinks"
        who, address, code = ("source", session.peer, code_a) if code_a else ("sink", self._sink, code_b)
        reason = f"the {who} {address}: {os.strerror(code)} ({name_of(code)})"
        self._close(session, reason, ended_by, source_failed=bool(code_a))

    def _fail(self, session: Session, code: int, ended_by: str, operation: str, words: str = "") -> None:
        """It never came to be a session of two."""
        if not words:
            advice = hint(code)
            words = f"{os.strerror(code)} ({name_of(code)})" + (f"; {advice}" if advice else "")
        whom = self._sink if ended_by == "sinks" else session.peer
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
        to, back = Way.of(a), Way.of(b)
        lib.relay_duplex_close(self._engine.c, c, bool(reason))
        session.slot = -1
        del self._live[slot]
        if self._attempts:
            self._attempts.pop(slot, None)
        self._exchange.give_back(slot)
        seconds = self._engine.now - session.began
        result = "failed" if reason else "delivered"
        sink = SinkRecord(self._sink, self._sink, to.bytes, seconds, to.method, result, lost=to.lost)
        record = SessionRecord(
            route=self._name,
            id=str(session.id),
            source=self._source,
            peer=session.peer,
            bytes=to.bytes + to.lost,
            seconds=seconds,
            method=to.method,
            ended_by=ended_by,
            result=result,
            reason=reason,
            why_method=self._why if to.method == "copy" else "",
            sinks=[sink],
            source_failed=source_failed,
            back=back.bytes,
            back_lost=back.lost,
            back_method=back.method,
        )
        self._on_over(record, session.peer)

    def close(self) -> None:
        """Hears of nothing any more. Every session is over."""
        self._patrol.close()
        self._engine.forget_token(self._token)
