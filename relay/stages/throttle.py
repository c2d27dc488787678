"""throttle: no more than a rate, with a burst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from relay.engine import Engine
from relay.kernel import core
from relay.stages.base import StageSettings
from relay.stages.stage import Stage
from relay.units import PositiveRate, PositiveSize, show_size


class Settings(StageSettings):
    """Lets through at most `rate` bytes a second on average; what is above it waits, nothing is dropped."""

    kind = "throttle"
    changeable = ("rate", "burst")
    short_schema: ClassVar[dict[str, Any] | None] = {"type": ["string", "integer"], "description": "the rate"}

    rate: PositiveRate = Field(description="bytes a second, such as 10MB/s or 8Mbit/s")
    burst: PositiveSize | None = Field(
        default=None,
        description="bytes that may pass at once after a pause; relay picks if left out",
    )

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """`throttle: 10MB/s`."""
        return {"rate": value} if isinstance(value, str | int) else super().from_short(value)

    def holds(self) -> str:
        """To its rate."""
        return f"to {show_size(self.rate)}/s"

    def make(self) -> Throttle:
        """The stage at work for one pipeline."""
        return Throttle(self)


class Throttle(Stage):
    """A token bucket in the stage's node: `burst` bytes at once, `rate` bytes a second on average."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.kind, settings.name or settings.kind)
        self._take(settings)

    def _take(self, settings: Settings) -> None:
        self._rate = settings.rate
        # a tenth of a second's worth: smooth to the eye, and long against the loop's latency
        self._burst = settings.burst or max(settings.rate // 10, 1)

    def wire(self, engine: Engine, node: core.Struct) -> None:
        """Sets the node's gate."""
        super().wire(engine, node)
        node.rate = self._rate
        node.burst = self._burst

    def change(self, settings: StageSettings) -> None:
        """Another rate or burst; what has been saved up goes no further than the burst."""
        assert isinstance(settings, Settings)
        self._take(settings)
        self.node.rate = self._rate
        self.node.burst = self._burst
