"""The pipelines of one route that are at work: what all of them are told, and whether any of them holds up an end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from relay.pipeline.pipeline import Pipeline
from relay.serving.changes import Stages, apply, pairs


class Pipelines:
    """On the route's home engine; each pipeline is told on its own."""

    def __init__(self) -> None:
        self._at_work: set[Pipeline] = set()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._at_work)

    def __iter__(self) -> Iterator[Pipeline]:
        """Those at work now, whatever comes and goes meanwhile."""
        return iter(tuple(self._at_work))

    def add(self, pipeline: Pipeline, before: Stages, now: Stages) -> None:
        """One more, made by the stages as they were `before`."""
        self._at_work.add(pipeline)
        _restage(pipeline, before, now)

    def discard(self, pipeline: Pipeline) -> None:
        """It is closed."""
        self._at_work.discard(pipeline)

    def change(self, before: Stages, now: Stages) -> None:
        """Some stages have other settings from now on; what is under way goes on by them."""
        for pipeline in self._at_work:
            _restage(pipeline, before, now)

    def reopen(self) -> None:
        """Files that were moved away are opened anew, by every stream that writes one."""
        for pipeline in self._at_work:
            pipeline.engine.post(pipeline.chain.reopen)

    @property
    def busy(self) -> bool:
        """Whether a stream is under way in any, or bytes wait."""
        return any(pipeline.busy for pipeline in self._at_work if not pipeline.closed)

    @property
    def watched(self) -> bool:
        """Whether any has a subscriber who has not ended its own stream."""
        groups = [group for pipeline in self._at_work for group in pipeline.subscribers]
        return any(not member.sink.c.peer_ended for group in groups for member in group.members.values())


def _restage(pipeline: Pipeline, before: Stages, now: Stages) -> None:
    for old, new in pairs(before, now):
        pipeline.engine.post(partial(apply, pipeline, old, new))
