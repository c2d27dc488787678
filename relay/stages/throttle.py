"""throttle: no more than a rate, with a burst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from relay.stages.base import StageSettings
from relay.units import PositiveRate, PositiveSize


class Settings(StageSettings):
    """Lets through at most `rate` bytes a second on average; what is above it waits, nothing is dropped."""

    kind = "throttle"
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
