"""Keys that the configuration knows and this version does not act on yet: refused, never ignored.

The models and the schema keep them. One line a key; a line goes when what it names works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from relay.config.models import Config, Route
from relay.settings import FrozenModel, Place, Problem
from relay.stages.base import StageSettings


class Pending(NamedTuple):
    """`key` of `model`, given a value for which `when` holds; `words` say how things are without it."""

    model: type[FrozenModel]
    key: str
    words: str
    when: Callable[[Any], bool] = bool


PENDING = (Pending(Config, "admin", "leave it out; relay logs what it does"),)


def refusals(config: Config) -> Iterator[Problem]:
    """A problem for each key in `config` that nothing acts on, at its place in the document."""
    yield from _within(config, ())


def _duplex(route: Route) -> Iterator[Problem]:
    """What a duplex route cannot have so far, and what would mean nothing there."""
    later = "is not available on duplex routes in this version"
    if not route.source.listen:
        key = route.source.verb if route.source.connect else route.source.address.scheme
        yield Problem(f"'{key}' {later}; its source listens", ("source", key), at_key=True)
    if not route.sink.connect:
        yield Problem(f"'fd' {later}; its sink connects", ("sink", "fd"), at_key=True)
    none = "means nothing on a duplex route"
    if route.source.connections == "one":
        said = f"'connections: one' {none}: each connection has one to the sink of its own"
        yield Problem(said, ("source", "connections"), at_key=True)
    if route.sink.slow.policy != "block" or route.sink.slow.buffer:
        said = f"'on_slow' {none}: a side that takes nothing holds the other back, as over one connection"
        yield Problem(said, ("sink", "on_slow"), at_key=True)
    if route.wait_for_sinks is not None:
        said = f"'wait_for_sinks' {none}: nothing is read from a connection before its sink is there"
        yield Problem(said, ("wait_for_sinks",), at_key=True)


def _within(value: object, place: Place) -> Iterator[Problem]:
    if isinstance(value, Route) and value.duplex:
        yield from (problem.within(*place) for problem in _duplex(value))
    if isinstance(value, FrozenModel):
        for key in type(value).model_fields:
            if key not in value.model_fields_set:
                continue
            inner = getattr(value, key)
            pending = [p for p in PENDING if p.key == key and isinstance(value, p.model) and p.when(inner)]
            for found in pending:
                said = f"'{_written(key, inner)}' is not available in this version; {found.words}"
                yield Problem(said, (*place, key), at_key=True)
            if not pending:
                yield from _within(inner, (*place, key))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _within(inner, (*place, key))
    elif isinstance(value, tuple):
        for index, inner in enumerate(value):
            kind = (inner.kind,) if isinstance(inner, StageSettings) else ()
            yield from _within(inner, (*place, index, *kind))


def _written(key: str, value: object) -> str:
    """The key, with its value where only that value is refused."""
    return f"{key}: {value}" if key == "policy" else f"{key}: {value:g}s" if key == "fsync" else key
