"""tee: the stream a second time, into a sink of its own, through stages of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.settings import Place, Problem
from relay.stages.base import AnyStage, StageSettings
from relay.stages.stage import Branch, Stage


class Settings(StageSettings):
    """Branches the stream here: `stages` in order, then `to`. What the chain carries on is unchanged."""

    kind = "tee"

    to: SinkSettings = Field(description="the branch's sink: a mapping, or a plain address")
    stages: tuple[AnyStage, ...] = Field(default=(), description="stages of the branch alone")
    on_slow: OnSlow = Field(
        default=OnSlow(),
        description="what happens when the branch does not keep pace; covers the whole branch",
    )

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """A branch has one policy, beside `to` or inside it."""
        to = given.get("to")
        if "on_slow" in given and isinstance(to, Mapping) and "on_slow" in to:
            yield Problem(
                "'on_slow' is given inside 'to' as well; a branch has one policy", ("on_slow",), at_key=True
            )

    def check_made(self) -> Iterator[Problem]:
        """What the branch's sink cannot have, and stages that cannot stand behind a spill's log."""
        if "on_slow" in self.model_fields_set:
            yield from (problem.within("on_slow") for problem in self.to.cannot(self.on_slow))
        if self.slow.policy != "spill" or self.to.verb == "listen":
            return
        for index, stage in enumerate(self.stages):
            if stage.once:
                said = f"'{stage.kind}' cannot be in a branch that spills: {stage.once}"
                hint = "put it in front of the tee, or in a route of its own"
                yield Problem(f"{said}; {hint}", ("stages", index, stage.kind), at_key=True)

    @property
    def slow(self) -> OnSlow:
        """The branch's policy in force, wherever it was written, with its defaults filled in."""
        written = self.on_slow if "on_slow" in self.model_fields_set else self.to.on_slow
        return written.effective(listening=self.to.verb == "listen")

    def sinks(self) -> Iterator[tuple[Place, SinkSettings]]:
        """The branch's sinks: those of its stages in order, then its own."""
        for index, stage in enumerate(self.stages):
            for place, sink in stage.sinks():
                yield ("stages", index, stage.kind, *place), sink
        yield ("to",), self.to

    @property
    def once(self) -> str:
        """Behind a log its sink would get again what a broken connection had not acknowledged."""
        return "its sink would get again what a broken connection had not acknowledged"

    def make(self) -> Tee:
        """The stage at work for one pipeline."""
        return Tee(self)


class Tee(Stage):
    """The node that is teed onwards; what it owes goes into the branch."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.kind, settings.name or str(settings.to.address))
        self._branch = Branch(settings.stages, settings.to, settings.slow)

    @property
    def branch(self) -> Branch:
        """Where else the stream goes."""
        return self._branch
