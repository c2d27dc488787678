"""meter: bytes and rate at this point of the chain, logged at an interval."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pydantic import Field

from relay.engine import Timer
from relay.stages.base import StageSettings
from relay.stages.stage import Stage, Turn
from relay.units import PositiveDuration, show_size

log = logging.getLogger("relay.meter")


class Settings(StageSettings):
    """Counts what passes and logs bytes and rate; changes nothing."""

    kind = "meter"
    changeable = ("every",)

    every: PositiveDuration = Field(default=10.0, description="time between two lines in the log")

    def make(self) -> Meter:
        """The stage at work for one pipeline."""
        return Meter(self)


class Meter(Stage):
    """Reads its node's counter every so often and logs what passed since."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.kind, settings.name or settings.kind)
        self._every = settings.every
        self._timer: Timer | None = None
        self._turn: Turn | None = None
        self._began = 0.0
        self._first = self._last = 0
        self._last_at = 0.0

    def begin(self, turn: Turn) -> None:
        """Counts from here."""
        assert self.engine is not None
        self._turn = turn
        self._first = self._last = int(self.node.passed)
        self._began = self._last_at = self.engine.now
        self._timer = self.engine.later(self._every, self._tell)

    def _tell(self) -> None:
        assert self.engine is not None
        assert self._turn is not None
        now, passed = self.engine.now, int(self.node.passed)
        rate = (passed - self._last) / max(now - self._last_at, 1e-9)
        log.info(
            "%s of route %s: %s so far, %s/s",
            self.name,
            self._turn.route,
            show_size(passed - self._first),
            show_size(rate),
            extra={
                "route": self._turn.route,
                "stage": self.name,
                "bytes": passed - self._first,
                "bytes_per_second": round(rate),
            },
        )
        self._last, self._last_at = passed, now
        self._timer = self.engine.later(self._every, self._tell)

    def end(self) -> Mapping[str, int | float]:
        """Bytes that passed, and bytes a second over the whole stream."""
        assert self.engine is not None
        self.close()
        passed = int(self.node.passed) - self._first
        seconds = max(self.engine.now - self._began, 1e-9)
        return {"bytes": passed, "bytes_per_second": round(passed / seconds)}

    def change(self, settings: StageSettings) -> None:
        """Another interval, from the next line on."""
        assert isinstance(settings, Settings)
        self._every = settings.every
        if self._timer is not None and self.engine is not None:
            self._timer.cancel()
            self._timer = self.engine.later(self._every, self._tell)

    def close(self) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
