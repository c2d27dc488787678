"""A stream that waits for its sinks: nothing is read while one of them is still opening, for so long at most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from relay.endpoints.base import nothing
from relay.engine import Engine, Timer
from relay.pipeline.outlet import Outlet

log = logging.getLogger("relay.pipeline")


class SinkWait:
    """Calls `go_on` once for each `begin` that said to wait. `seconds` of 0 never waits."""

    def __init__(
        self, engine: Engine, route: str, outlets: Sequence[Outlet], seconds: float, go_on: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._route = route
        self._outlets = outlets
        self._seconds = seconds
        self._go_on = go_on
        self._timer: Timer | None = None

    def begin(self) -> bool:
        """Whether there is something to wait for."""
        if not self._seconds or not self._late():
            return False
        self._timer = self._engine.later(self._seconds, self._enough)
        return True

    def _late(self) -> list[str]:
        return [outlet.name for outlet in self._outlets if outlet.opening or outlet.absent]

    def look(self) -> None:
        """A sink opened or failed."""
        if self._timer is not None and not self._late():
            self._end(self._timer)

    def _enough(self) -> None:
        if self._timer is not None:
            late = ", ".join(self._late())
            log.warning("%s: goes on without %s after %.1f s", self._route, late, self._seconds)
            self._end(self._timer)

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._go_on = nothing

    def _end(self, timer: Timer) -> None:
        timer.cancel()
        self._timer = None
        self._go_on()
