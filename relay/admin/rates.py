"""Rates: what two looks at a running relay differ by."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import replace

from relay.admin.status import EngineStatus, RouteStatus, SinkStatus, Status, StreamStatus

Sums = dict[Hashable, float]


class Rates:
    """Remembers the looks of the last seconds; `rated` fills in what can be compared. Used by one thread at a time."""

    LEAST = 0.2  # seconds between two looks that are compared
    LONGEST = 10.0  # seconds that a rate is the mean of, where somebody looks that often
    STALE = 60.0  # seconds after which an earlier look tells nothing

    def __init__(self) -> None:
        self._looks: list[tuple[float, Sums]] = []
        self._seconds = 0.0
        self._then: Sums = {}
        self._now: Sums = {}

    def stale(self, now: float) -> bool:
        """Whether there is nothing to compare with."""
        return not self._looks or now - self._looks[-1][0] > self.STALE

    def rated(self, status: Status) -> Status:
        """With the rates since the look that is LONGEST ago, or the one before that."""
        now = time.monotonic()
        old = [look for look in self._looks if now - look[0] >= self.LEAST]
        while len(old) > 1 and now - old[1][0] >= self.LONGEST:
            old.pop(0)
        self._looks = [look for look in self._looks if not old or look[0] >= old[0][0]]
        comparable = bool(old) and now - old[0][0] <= max(self.STALE, 2 * self.LONGEST)
        self._seconds, self._then = (now - old[0][0], old[0][1]) if comparable else (0.0, {})
        self._now = {}
        made = replace(
            status,
            routes=tuple(self._route(route) for route in status.routes),
            engines=tuple(self._engine(engine) for engine in status.engines),
        )
        if not self._looks or now - self._looks[-1][0] >= self.LEAST:
            self._looks.append((now, self._now))
        return made

    def _rate(self, key: Hashable, count: float) -> float | None:
        self._now[key] = count
        if not self._seconds or key not in self._then:
            return None
        return max(0.0, count - self._then[key]) / self._seconds

    def _route(self, route: RouteStatus) -> RouteStatus:
        key = (route.name, route.state in ("draining", "done"))
        back = None if route.bytes_back is None else self._rate((key, "back"), route.bytes_back)
        return replace(
            route,
            rate=self._rate((key, "in"), route.bytes),
            rate_back=back,
            sinks=tuple(self._sink(key, sink) for sink in route.sinks),
            details=tuple(self._stream(key, stream) for stream in route.details),
        )

    def _sink(self, key: Hashable, sink: SinkStatus) -> SinkStatus:
        return replace(sink, rate=self._rate((key, "out", sink.sink), sink.bytes))

    def _stream(self, key: Hashable, stream: StreamStatus) -> StreamStatus:
        if not stream.id:
            return stream
        own = (key, "stream", stream.id)
        return replace(
            stream,
            rate=self._rate(own, stream.bytes),
            sinks=tuple(self._sink(own, sink) for sink in stream.sinks),
        )

    def _engine(self, engine: EngineStatus) -> EngineStatus:
        return replace(engine, busy=self._rate(("cpu", engine.name), engine.cpu_seconds))
