"""What the settings of all stages share, and how a stage is read from a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError
from pydantic_core import core_schema

from relay.endpoints.settings import SinkSettings
from relay.errors import did_you_mean
from relay.settings import FrozenModel, Place, Problem, failure, problems_of
from relay.stages import catalogue
from relay.stages.stage import Stage
from relay.units import show


class StageSettings(FrozenModel):
    """One stage as the configuration says it; `kind` is its name in YAML and the name of its module."""

    kind: ClassVar[str]
    changeable: ClassVar[tuple[str, ...]] = ()  # keys that can be changed while it runs (Stage.change)

    name: str | None = Field(default=None, min_length=1, description="what logs and metrics call this stage")

    def make(self) -> Stage:
        """The stage at work for one pipeline."""
        return Stage(self.kind, self.name or self.kind)

    def holds(self) -> str:
        """How this stage itself holds the stream back, to follow "holds the source"; empty if it does not."""
        return ""

    @property
    def once(self) -> str:
        """Why it must see its stream once from its beginning, and so cannot stand behind a log, where a broken
        connection makes it begin again; empty if that does not matter to it."""
        return ""

    def sinks(self) -> Iterator[tuple[Place, SinkSettings]]:
        """Every sink this stage feeds, with its place below the stage's settings; most stages feed none."""
        yield from ()


def _read_stage(value: object) -> StageSettings:
    """A stage from `{kind: settings}` or from its bare kind; the error carries every problem in it."""
    if isinstance(value, StageSettings):
        return value
    known = catalogue()
    if isinstance(value, str):
        kind, settings = value, None
    elif isinstance(value, Mapping) and len(value) == 1:
        ((kind, settings),) = value.items()
    elif isinstance(value, Mapping) and value:
        first, second, *_ = value
        hint = (
            f"indent the settings of '{first}' under it" if value[first] is None else "begin each with a dash"
        )
        raise failure(
            [Problem(f"a stage is one name with its settings, here are '{first}' and '{second}'; {hint}")]
        )
    else:
        raise failure(
            [Problem(f"expected a stage such as 'meter' or 'throttle: {{rate: 10MB/s}}', got {show(value)}")]
        )
    if kind not in known:
        guess = did_you_mean(str(kind), known) or f"; known are {', '.join(known)}"
        raise failure([Problem(f"unknown stage '{kind}'{guess}", (kind,), at_key=True)])
    try:
        return known[kind].model_validate({} if settings is None else settings)
    except ValidationError as error:
        raise failure(problem.within(kind) for problem in problems_of(error)) from None


class _StageReader:
    """Reads a field as a stage of the catalogue; looked up late, since a tee holds stages itself."""

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            _read_stage, serialization=core_schema.plain_serializer_function_ser_schema(_written)
        )

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        return {"x-relay-stage": True}  # relay.config.schema puts a reference to all stages in its place


def _written(stage: StageSettings) -> dict[str, Any]:
    return {stage.kind: stage.model_dump(mode="json", exclude_unset=True)}


AnyStage = Annotated[StageSettings, _StageReader()]
