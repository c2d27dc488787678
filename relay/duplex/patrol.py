"""Limits of time of duplex sessions, looked at for all of them together.

What this means here: a timer for each of thousands of sessions would cost more than what it watches. One timer for
the sessions of a route on an engine looks at every session now and then: a limit is kept to within a tenth of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from relay.config.models import Route
from relay.endpoints.liveness import LOOKS, TcpState
from relay.engine import Engine, Timer
from relay.kernel import core

STEPS = 10  # looks within a limit
LONGEST = 5.0  # seconds between two looks


class Watched(Protocol):
    """A session as the patrol sees it."""

    c: core.Struct
    began: float


One = TypeVar("One", bound=Watched)


class Patrol(Generic[One]):
    """Calls `expired(session, reason)` for sessions that reached a limit, or whose peer left bytes unanswered for
    too long. `live` is the owner's own account of its sessions, which may lose some during a look.
    """

    def __init__(
        self,
        engine: Engine,
        route: Route,
        live: Mapping[int, One],
        expired: Callable[[One, str], None],
    ) -> None:
        self._engine = engine
        self._live = live
        self._expired = expired
        self._idle = route.source.limits.idle
        self._lifetime = route.source.limits.lifetime
        self._half_closed = route.source.limits.half_closed
        schemes = ({route.source.address.scheme}, {address.scheme for address in route.sink.addresses})
        ends = zip((route.source, route.sink), schemes, strict=True)
        tcp = [end.dead_after for end, found in ends if "tcp" in found]
        self._dead_after = (route.source.dead_after, route.sink.dead_after)
        self._asked: dict[tuple[int, int], float] = {}
        # seconds after which whatever was sent is known to be answered
        self._quiet = 2 * max(tcp, default=0.0)
        limits = (self._idle, self._lifetime, self._half_closed)
        steps = [limit / STEPS for limit in limits if limit is not None]
        steps += [after / LOOKS for after in tcp]
        self._step = max(0.01, min([*steps, LONGEST]))
        self._timed = bool(steps)
        self._timer: Timer | None = None

    def look_soon(self) -> None:
        """There are sessions: they are looked at from now on until there are none."""
        if self._timer is None and self._timed:
            self._timer = self._engine.later(self._step, self._look)

    def close(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = self._engine.now
        asked: dict[tuple[int, int], float] = {}
        for slot, session in list(self._live.items()):
            reason = self._limit(session, now)
            outstanding = 0
            if not reason and self._may_wait(slot, session, now):
                outstanding = core.lib.relay_duplex_outstanding(session.c)
            for which in (0, 1):
                if not reason and outstanding & 1 << which:
                    since = self._asked.get((slot, which), now)
                    asked[slot, which] = since
                    reason = self._silent(session, which, asked, slot, now)
            if reason:
                self._expired(session, reason)
        self._asked = asked
        if self._live:
            self.look_soon()

    def _may_wait(self, slot: int, session: One, now: float) -> bool:
        """Whether a peer of it may owe an answer: thousands that are idle are not asked about."""
        if now - session.c.last_ns / 1e9 < self._quiet:
            return True
        return (slot, 0) in self._asked or (slot, 1) in self._asked

    def _limit(self, session: One, now: float) -> str:
        if self._lifetime is not None and now - session.began >= self._lifetime:
            return f"it lived for {self._lifetime:g} s (limits.lifetime)"
        if self._idle is not None and now - max(session.began, session.c.last_ns / 1e9) >= self._idle:
            return f"nothing moved for {self._idle:g} s (limits.idle)"
        half = self._half_closed
        if half is not None and session.c.first and now - session.c.last_ns / 1e9 >= half:
            first, other = ("source", "sink") if session.c.first == 1 else ("sink", "source")
            said = f"the {first} had ended its stream, the {other} had not, and nothing moved"
            return f"{said} for {half:g} s (limits.half_closed)"
        return ""

    def _silent(
        self, session: One, which: int, asked: dict[tuple[int, int], float], slot: int, now: float
    ) -> str:
        """Why the peer of that side counts as dead; empty while it does not (see endpoints/liveness.py)."""
        try:
            state = TcpState.of(session.c.sides[which].fd)
        except OSError:
            return ""  # it has failed already, which C is about to find
        answered_at = now - state.heard
        if not state.asking():
            last = session.c.last_ns / 1e9
            asked[slot, which] = max(answered_at, last) if state.unacked else now
        silent = now - max(asked[slot, which], answered_at)
        limit = self._dead_after[which]
        if silent < limit or not state.asking() or not state.unanswered(silent):
            return ""
        who = ("source", "sink")[which]
        return f"the {who} left what was sent to it unanswered for {silent:.3g} s (dead_after)"
