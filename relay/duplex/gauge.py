"""Which method a route's bulk crosses by, measured while its sessions are at work.

Theory of operation. Each engine has one gauge in C (struct relay_gauge), which is at one direction of one session at a
time: whoever has bulk takes it when it is free. It tells what a number of bytes took of the engine's thread's CPU
time; what follows from that is balance.py's to say, and all sessions of the route on this engine share it
(experience.py). A direction changes its method between two reads, and nothing has to be still for it: what waits in a
pipe or a buffer goes out first in any case. `chain` stands for splice through a pipe, `ring` for a copy through one
large buffer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from relay.engine import Engine
from relay.kernel import core
from relay.pipeline.balance import NAMES, OWN, SETTLES, Way
from relay.pipeline.experience import Experience
from relay.ways import Ways

METHODS: dict[Way, int] = {"chain": core.SPLICE, "ring": core.COPY}
SIDES = ("to_sink", "back")


class Gauged(Protocol):
    """A session: its struct, and the scheme of its sink."""

    c: core.Struct

    @property
    def scheme(self) -> str:
        """Of the sink that it has."""
        ...


class _Direction:
    """The direction that the gauge is at: who tries, in the words of experience.py."""

    def __init__(self, session: Gauged, which: int, found: Experience) -> None:
        self.session, self.which, self.found = session, which, found


class Gauge:
    """Of one route's sessions on one engine, on whose thread all runs. `measures`: whether anything is."""

    def __init__(self, engine: Engine, route: str, ways: Ways, source: str, sinks: Iterable[str]) -> None:
        self.measures = ways.duplex_measured
        self._engine = engine
        self._found: dict[tuple[int, str], Experience] = {}
        self._fixed: dict[tuple[int, str], int] = {}
        for which, scheme in [(1, source), *((0, scheme) for scheme in sinks)]:
            way: Way = "chain" if ways.duplex(scheme).method == "splice" else "ring"
            self._fixed[which, scheme] = METHODS[way]
            if self.measures:
                name = f"{SIDES[which]} of {route}"
                odds = ways.duplex_odds(scheme, way)
                self._found[which, scheme] = Experience.of(engine, name, source, [scheme], way, odds)
        self._source = source
        self._at: _Direction | None = None
        self._seen: dict[Any, set[int]] = {}  # sessions that were measured, and of which sides
        exchange = engine.exchange()
        exchange.c.gauge.first_skip, exchange.c.gauge.first_size = SETTLES, OWN
        self._c = exchange.c.gauge

    def method(self, which: int, scheme: str) -> int:
        """How bulk crosses now, to a sink of that scheme (0) or back to a source of that scheme (1)."""
        found = self._found.get((which, scheme))
        return METHODS[found.balance.way] if found is not None else self._fixed[which, scheme]

    def heard(self, session: Gauged, which: int, live: Iterable[Gauged]) -> None:
        """The gauge is full: what it says is noted, and what comes next is set up."""
        side = session.c.sides[which]
        if self._c.side != core.ffi.addressof(side):
            return  # it has moved on meanwhile
        at = self._at
        if at is None or at.session is not session or at.which != which:
            self._left()
            scheme = self._source if which else session.scheme
            at = self._at = _Direction(session, which, self._found[which, scheme])
            self._seen.setdefault(session, set()).add(which)
        found, way = at.found, self._way(side)
        self._count(at)
        changes = found.balance.changes
        found.measured(at, way, self._c.cpu_ns / self._c.gauged)
        wanted, size = found.next(at)
        if found.balance.changes != changes:
            for each in live:
                self._set(each, which, found)
        side.method = METHODS[wanted]
        pause = found.balance.pause if wanted == found.balance.way else 0
        self._c.skip = pause if wanted == way else SETTLES
        self._c.size = size
        self._c.gauged = self._c.cpu_ns = 0
        self._c.method = METHODS[found.balance.way]

    def _count(self, at: _Direction) -> None:
        """The bytes that came since it was set up, tried or not."""
        found = at.found
        tried = found.trier is at and self._way(at.session.c.sides[at.which]) != found.balance.way
        found.came(int(self._c.came), tried=tried)
        self._c.came = 0

    @staticmethod
    def _way(side: core.Struct) -> Way:
        return "chain" if side.method == core.SPLICE else "ring"

    def _set(self, session: Gauged, which: int, found: Experience) -> None:
        scheme = self._source if which else session.scheme
        if self._found.get((which, scheme)) is found:
            session.c.sides[which].method = METHODS[found.balance.way]

    def _left(self) -> None:
        """The gauge went on to another one."""
        at, self._at = self._at, None
        if at is not None:
            at.found.leaves(at)
            at.session.c.sides[at.which].method = METHODS[at.found.balance.way]

    def over(self, session: Gauged) -> dict[str, Any]:
        """A session is over: what was measured of each of its directions, for its record; nothing where nothing was."""
        at = self._at
        if at is not None and at.session is session:
            if self._c.side == core.ffi.addressof(session.c.sides[at.which]):
                self._count(at)  # of a sample that its end cut short
            self._left()
        told = {}
        for which in sorted(self._seen.pop(session, ())):
            scheme = self._source if which else session.scheme
            balance = self._found[which, scheme].balance
            told[SIDES[which]] = {"way": NAMES[balance.way], "cpu_seconds_per_gib": balance.costs()}
        return told
