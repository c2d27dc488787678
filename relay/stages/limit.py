"""limit: skip the first bytes of a stream, stop after so many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from relay.settings import Problem
from relay.stages.base import StageSettings
from relay.stages.stage import Stage, Turn
from relay.units import Size


class Settings(StageSettings):
    """Discards the first `skip` bytes, lets `stop` bytes through, then ends the stream at this point."""

    kind = "limit"

    skip: Size = Field(default=0, description="bytes discarded at the beginning")
    stop: Size | None = Field(
        default=None, description="bytes let through after those skipped; unlimited if left out"
    )

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """A limit without a limit is a slip."""
        if "skip" not in given and "stop" not in given:
            yield Problem("limit needs 'skip', 'stop' or both", at_key=True)

    @property
    def once(self) -> str:
        """Behind a log it would count anew with every new connection."""
        return "it would count anew with every new connection"

    def make(self) -> Limit:
        """The stage at work for one pipeline."""
        return Limit(self)


class Limit(Stage):
    """Counts down in the stage's node, anew for each stream."""

    of_a_stream = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.kind, settings.name or settings.kind)
        self._skip = settings.skip
        self._stop = settings.stop

    def begin(self, turn: Turn) -> None:
        """Sets the node's counters."""
        self.node.skip = self._skip
        self.node.left = -1 if self._stop is None else self._stop
