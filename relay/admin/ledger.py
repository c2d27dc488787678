"""What sessions that are over came to: sums for each route and sink, and the last of them.

There may be thousands of sessions a second: they are counted some dozens at once, or when somebody asks, which costs
half of what it does one by one, and nothing is formatted. What it keeps is bounded: reasons are put into few classes,
and nothing is kept by peer.
"""

from __future__ import annotations

import pickle
import re
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from relay.journal.record import SessionRecord, SinkRecord

if TYPE_CHECKING:
    from relay.admin.status import SessionStatus  # loaded when somebody asks

RECENT = 100  # sessions that are remembered
TOGETHER = 64  # sessions that are counted at once, if nobody asks before
SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, 86400.0)
CONNECTING = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Why a session did not end whole, by what its reason says; the first that fits counts.
CLASSES = (
    ("idle", re.compile(r"\(limits\.idle\)")),
    ("lifetime", re.compile(r"\(limits\.lifetime\)")),
    ("dead_peer", re.compile(r"\(dead_after\)|ETIMEDOUT")),
    ("slow", re.compile(r"backlog of .* full for")),
    ("drain", re.compile(r"drain deadline|a second SIG|relay ends|relay was told")),
    ("reload", re.compile(r"configuration of its route changed|reload was taken back")),
    ("reset", re.compile(r"ECONNRESET|EPIPE")),
    ("refused", re.compile(r"ECONNREFUSED|ENOENT")),
    ("unreachable", re.compile(r"EHOSTUNREACH|ENETUNREACH|looking up")),
    ("no_space", re.compile(r"ENOSPC|EDQUOT|EFBIG|EROFS|EIO")),
    ("shortage", re.compile(r"EMFILE|ENFILE|ENOMEM|ENOBUFS|EAGAIN")),
)
REASONS = ("none", *(name for name, _pattern in CLASSES), "other")


def reason_class(text: str) -> str:
    """One of REASONS for what a record says."""
    if not text:
        return "none"
    return next((name for name, pattern in CLASSES if pattern.search(text)), "other")


def reason_of(record: SessionRecord) -> str:
    """Why it did not end whole, or the first of its sinks did not; empty where all did."""
    return record.reason or next((sink.reason for sink in record.sinks if sink.reason), "")


def _class_of(record: SessionRecord) -> str:
    return "none" if record.result == "delivered" and not record.reason else reason_class(reason_of(record))


class Histogram:
    """Counts by upper bounds, and a sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, values: Iterable[float]) -> None:
        """Some more."""
        for value in values:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.sum += value

    def copy(self) -> Histogram:
        """As it is now."""
        made = Histogram(self.bounds)
        made.counts, made.sum = list(self.counts), self.sum
        return made


@dataclass
class SinkTotals:
    """Of one sink of a route."""

    bytes: int = 0
    dropped: int = 0
    lost: int = 0
    twice: int = 0
    reconnects: int = 0
    blocked_seconds: float = 0.0
    connects: Histogram = field(default_factory=lambda: Histogram(CONNECTING))

    def add(self, records: list[SinkRecord]) -> None:
        """Its part of some sessions."""
        self.bytes += sum([record.bytes for record in records])
        self.dropped += sum([record.dropped for record in records])
        self.lost += sum([record.lost for record in records])
        self.twice += sum([record.twice for record in records])
        self.reconnects += sum([record.reconnects for record in records])
        self.blocked_seconds += sum([record.blocked_seconds for record in records])
        self.connects.add([seconds for record in records for seconds in record.connects])

    def copy(self) -> SinkTotals:
        """As it is now."""
        return replace(self, connects=self.connects.copy())


@dataclass
class RouteTotals:
    """Of one route. `ends` counts sessions by result, by whom they were ended, and class of reason."""

    bytes: int = 0
    back: int = 0
    back_lost: int = 0
    ends: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    durations: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    sinks: dict[str, SinkTotals] = field(default_factory=dict)

    def add(self, records: list[SessionRecord]) -> None:
        """Some sessions that are over."""
        self.bytes += sum([record.bytes for record in records])
        self.back += sum([record.back or 0 for record in records])
        self.back_lost += sum([record.back_lost for record in records])
        self.ends.update([(record.result, record.ended_by, _class_of(record)) for record in records])
        self.durations.add([record.seconds for record in records])
        of_sinks: dict[str, list[SinkRecord]] = {}
        for record in records:
            for sink in record.sinks:
                of_sinks.setdefault(sink.sink, []).append(sink)
        for name, those in of_sinks.items():
            self.sinks.setdefault(name, SinkTotals()).add(those)

    def copy(self) -> RouteTotals:
        """As it is now."""
        return RouteTotals(
            self.bytes,
            self.back,
            self.back_lost,
            Counter(self.ends),
            self.durations.copy(),
            {name: totals.copy() for name, totals in self.sinks.items()},
        )


class Ledger:
    """Hears of every session that is over, on any thread, and can be read on any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fresh: deque[tuple[float, SessionRecord]] = deque()  # over, and not part of the sums yet
        self._routes: dict[str, RouteTotals] = {}
        self._recent: deque[tuple[float, SessionRecord]] = deque(maxlen=RECENT)

    def add(self, record: SessionRecord) -> None:
        """A session is over."""
        self._fresh.append((time.time(), record))
        if len(self._fresh) >= TOGETHER:
            with self._lock:
                self._count()

    def _count(self) -> None:
        """Under the lock: those that are over since the last time become part of the sums."""
        fresh = [self._fresh.popleft() for _ in range(len(self._fresh))]
        self._recent.extend(fresh)
        of_routes: dict[str, list[SessionRecord]] = {}
        for _at, record in fresh:
            of_routes.setdefault(record.route, []).append(record)
        for name, records in of_routes.items():
            self._routes.setdefault(name, RouteTotals()).add(records)

    def compact(self) -> None:
        """Makes what is kept of the last sessions anew, side by side.

        Each was made among what its session left behind, and keeps the memory around it from being given back.
        """
        with self._lock:
            self._count()
            self._recent = deque(pickle.loads(pickle.dumps(list(self._recent))), maxlen=RECENT)

    def totals(self, routes: Iterable[str]) -> dict[str, RouteTotals]:
        """Those of the routes of these names, as they are now."""
        with self._lock:
            self._count()
            return {name: self._routes[name].copy() for name in set(routes) if name in self._routes}

    def recent(self) -> tuple[SessionStatus, ...]:
        """The last sessions, the latest first."""
        with self._lock:
            self._count()
            kept = list(self._recent)
        return tuple(_told(at, record) for at, record in reversed(kept))


def _told(at: float, record: SessionRecord) -> SessionStatus:
    from relay.admin.status import SessionStatus

    return SessionStatus(
        at=at,
        route=record.route,
        id=record.id,
        peer=record.peer or record.source,
        bytes=record.bytes,
        bytes_back=record.back,
        seconds=record.seconds,
        method=record.method,
        result=record.result,
        ended_by=record.ended_by,
        reason=reason_of(record),
        text=record.as_text(),
    )
