"""How long a source may be idle, and how long it may live."""

from __future__ import annotations

import time
from collections.abc import Callable

from relay.endpoints.base import Source
from relay.endpoints.options import Limits
from relay.engine import Engine, Timer


class SourceClock:
    """Calls `expired(reason)` once when a limit of the source is reached; looks only when that may be so.

    Lives on the source's engine.
    """

    def __init__(
        self, engine: Engine, source: Source, limits: Limits, expired: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._source = source
        self._limits = limits
        self._expired = expired
        self._began = time.monotonic()
        self._timer: Timer | None = None
        self._look()

    def cancel(self) -> None:
        """The source has ended of itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        limits, now = self._limits, time.monotonic()
        due = []
        if limits.lifetime is not None:
            due.append(
                (self._began + limits.lifetime, f"it lived for {limits.lifetime:g} s (limits.lifetime)")
            )
        if limits.idle is not None:
            last = max(self._began, self._source.c.last_ns / 1e9)
            due.append((last + limits.idle, f"nothing moved for {limits.idle:g} s (limits.idle)"))
        if not due:
            return
        when, reason = min(due)
        if now >= when:
            self._expired(reason)
        else:
            self._timer = self._engine.later(when - now, self._look)
