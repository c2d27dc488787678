"""Changes of stages while their route is at work: which stage is meant, what may change, and where it is applied.

A stage at work remembers the settings it was made from. A change makes new settings; whoever is at work with the old
ones takes the new ones over, and whoever is made later is made from them. The configuration's text is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from relay.errors import RelayError, did_you_mean
from relay.pipeline.pipeline import Pipeline
from relay.settings import list_of, problems_of
from relay.stages.base import StageSettings
from relay.stages.tee import Settings as Tee

Stages = tuple[StageSettings, ...]


class NotChanged(RelayError):
    """A change that cannot be made; nothing was changed."""


class Named(NamedTuple):
    """A stage as people may call it: `throttle`, a name of its own, or `throttle#2` for the second of that name."""

    name: str
    settings: StageSettings

    @property
    def alike(self) -> str:
        """What others may be called, too."""
        return self.settings.name or self.settings.kind


def flat(stages: Stages) -> Iterator[StageSettings]:
    """All stages, those of a tee's branch behind it."""
    for stage in stages:
        yield stage
        if isinstance(stage, Tee):
            yield from flat(stage.stages)


def named(stages: Stages) -> list[Named]:
    """All stages by names that are each one's own."""
    found: list[Named] = []
    counts: dict[str, int] = {}
    for stage in flat(stages):
        name = stage.name or stage.kind
        counts[name] = counts.get(name, 0) + 1
        found.append(Named(f"{name}#{counts[name]}", stage))
    return [Named(each.name if counts[each.alike] > 1 else each.alike, each.settings) for each in found]


def find(route: str, stages: Stages, wanted: str) -> StageSettings:
    """The stage that is meant. Raises NotChanged when there is none, or more than one."""
    known = named(stages)
    for each in known:
        if wanted in (each.name, f"{each.name}#1"):
            return each.settings
    alike = [each.name for each in known if each.alike == wanted]
    if alike:
        which = list_of(alike)
        raise NotChanged(f"route '{route}' has {len(alike)} stages '{wanted}'", hint=f"say which: {which}")
    if not known:
        raise NotChanged(f"route '{route}' has no stages")
    names = [each.name for each in known]
    guess = did_you_mean(wanted, [each.alike for each in known]) or f"; it has {', '.join(names)}"
    raise NotChanged(f"route '{route}' has no stage '{wanted}'{guess}")


def changed(stage: StageSettings, values: Mapping[str, Any]) -> StageSettings:
    """The settings of `stage` with these values. Raises NotChanged for a key that cannot change while it runs."""
    if not values:
        raise NotChanged("nothing to change", hint="write KEY=VALUE, such as rate=5MB/s")
    if not stage.changeable:
        raise NotChanged(
            f"nothing of '{stage.kind}' can be changed while it runs", hint="change the configuration"
        )
    for key in values:
        if key not in stage.changeable:
            known = f"; what can be changed while it runs is {', '.join(stage.changeable)}"
            own = key in type(stage).model_fields
            guess = "" if own else did_you_mean(key, stage.changeable)
            raise NotChanged(f"'{key}' of '{stage.kind}' cannot be changed{guess or known}")
    given = {key: getattr(stage, key) for key in stage.model_fields_set}
    try:
        return type(stage).model_validate({**given, **values})
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, each.place))}: {each.message}" for each in problems_of(error))
        raise NotChanged(said) from None


def replaced(stages: Stages, old: StageSettings, new: StageSettings) -> Stages:
    """`stages` with `new` in the place of `old`; all others are the very same objects, but for the tees around it."""

    def walk(stage: StageSettings) -> StageSettings:
        if stage is old:
            return new
        if isinstance(stage, Tee) and any(each is old for each in flat(stage.stages)):
            return stage.model_copy(update={"stages": replaced(stage.stages, old, new)})
        return stage

    return tuple(walk(stage) for stage in stages)


def apply(pipeline: Pipeline, old: StageSettings, new: StageSettings) -> None:
    """On its engine: a stage of it has other settings from now on."""
    if not pipeline.closed:
        pipeline.chain.change(old, new)
        pipeline.engine.ready(pipeline.c)


def pairs(before: Stages, now: Stages) -> Iterator[tuple[StageSettings, StageSettings]]:
    """The stages that differ between two states of the same route, old and new."""
    for old, new in zip(flat(before), flat(now), strict=True):
        if old is not new and not isinstance(old, Tee):
            yield old, new
