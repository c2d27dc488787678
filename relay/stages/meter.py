"""meter: bytes and rate at this point of the chain, logged at an interval."""

from __future__ import annotations

from pydantic import Field

from relay.stages.base import StageSettings
from relay.units import PositiveDuration


class Settings(StageSettings):
    """Counts what passes and logs bytes and rate; changes nothing."""

    kind = "meter"

    every: PositiveDuration = Field(default=10.0, description="time between two lines in the log")
