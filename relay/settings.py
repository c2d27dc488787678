"""What all settings share: frozen models that report every problem at once, each at its place and in plain
words.

pydantic reports all wrong fields of a model, but skips the checks across fields when a field is wrong, does
not say which key an unknown one was meant to be, and words its errors for programmers. `FrozenModel` closes
these gaps: reading one gathers unknown keys, wrong fields and cross checks as `Problem`s, and hands them up
in a single pydantic error, from which `problems_of` takes them out again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

# no plugin has any business in a relay's configuration, and looking for them costs a tenth of the start-up
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from relay.errors import ConfigError, ConfigErrors, did_you_mean
from relay.units import show

Place = tuple[str | int, ...]
"""Where a value stands in a document: the keys and list indices that lead to it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: `message` is about what is at `place`, to be shown at its key or at its value."""

    message: str
    place: Place = ()
    at_key: bool = False

    def within(self, *outer: str | int) -> Problem:
        """The same problem seen from further out."""
        return Problem(self.message, (*outer, *self.place), self.at_key)


class FrozenModel(BaseModel):
    """Settings that cannot change once read. Unknown keys are problems; lists become tuples.

    A subclass may override `from_short` to take something shorter than a mapping, and two checks: `check`
    sees the mapping as it was written, even if fields are wrong, `check_made` the finished model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    hidden: ClassVar[frozenset[str]] = frozenset()
    """Fields that only `from_short` sets: in a mapping they are unknown keys."""

    short_schema: ClassVar[dict[str, Any] | None] = None
    """JSON Schema of what `from_short` takes, or None if there is no short form."""

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """The mapping that `value`, which is none, stands for; ValueError if it stands for nothing."""
        raise ValueError(f"expected a mapping with {list_of(cls.keys())}, got {show(value)}")

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:  # noqa: ARG003 - for subclasses
        """Problems between the keys as written; runs whether or not their values are right."""
        yield from ()

    def check_made(self) -> Iterator[Problem]:
        """Problems between values that are each right."""
        yield from ()

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that a mapping may have, in the order they are declared."""
        return [name for name in cls.model_fields if name not in cls.hidden]

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls):
            return value
        found: list[Problem] = []
        if isinstance(value, Mapping):
            given = cls._known(value, found)
            found += cls.check(given)
        else:
            given = dict(cls.from_short(value))
        try:
            made = handler(given)
        except ValidationError as error:
            raise failure([*found, *problems_of(error)]) from None
        if not found:
            found += made.check_made()
        if found:
            raise failure(found)
        return made

    @classmethod
    def _known(cls, value: Mapping[Any, Any], found: list[Problem]) -> dict[str, Any]:
        """The keys that are fields, lists as tuples; an empty value that means no key is left out."""
        keys = cls.keys()
        given: dict[str, Any] = {}
        for key, item in value.items():
            if key not in keys:
                known = f"; known here: {', '.join(keys)}"
                found.append(
                    Problem(
                        f"unknown key '{key}'{did_you_mean(str(key), keys) or known}", (key,), at_key=True
                    )
                )
            elif item is None and cls.model_fields[key].default is None:
                continue
            else:
                given[key] = tuple(item) if isinstance(item, list) else item
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        made: dict[str, Any] = handler(schema)
        inner: dict[str, Any] = handler.resolve_ref_schema(made)
        for name in cls.hidden:
            inner["properties"].pop(name)
        if cls.short_schema is not None:
            whole = dict(inner)
            inner.clear()
            inner.update({"anyOf": [cls.short_schema, whole]})
        return made


def failure(problems: Iterable[Problem]) -> PydanticCustomError:
    """The error that carries `problems` through pydantic; a validator raises it."""
    kept = tuple(problems)
    text = "; ".join(".".join(map(str, item.place)) + ": " * bool(item.place) + item.message for item in kept)
    return PydanticCustomError("problems", "{text}", {"text": text, "problems": kept})


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """Every problem a pydantic error carries, in plain words and with its place."""
    for detail in error.errors(include_url=False):
        if detail["type"] == "problems":
            for problem in detail["ctx"]["problems"]:
                yield problem.within(*detail["loc"])
        elif detail["type"] == "missing":
            yield Problem(f"missing key '{detail['loc'][-1]}'", tuple(detail["loc"][:-1]), at_key=True)
        else:
            yield Problem(_in_words(detail), tuple(detail["loc"]))


def said(place: Place, problem: Problem) -> str:
    """The message behind the path of what it is about, such as `routes.camera.stages[0].tee`."""
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            word = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else repr(part)
            path += f".{word}" if path else word
    return f"{path}: {problem.message}" if path else problem.message


def refusal(error: ValidationError, name: str) -> ConfigErrors:
    """What a pydantic error says of data that has no lines, each problem behind `name` and its path."""
    return ConfigErrors([ConfigError(said(each.place, each), file=name) for each in problems_of(error)])


def list_of(words: Iterable[str], last: str = "or") -> str:
    """`a, b or c`."""
    *most, end = list(words)
    return f"{', '.join(most)} {last} {end}" if most else end


_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
}


def _in_words(detail: ErrorDetails) -> str:
    """pydantic's error as an operator would say it."""
    kind, value, facts = detail["type"], detail["input"], detail.get("ctx", {})
    got = f"got {show(value)}"
    if kind in _EXPECTED:
        quote = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
        return f"expected {_EXPECTED[kind]}, {got}{quote}"
    match kind:
        case "value_error":
            return str(facts["error"])
        case "literal_error":
            options = facts["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            guess = did_you_mean(value, options) if isinstance(value, str) else ""
            return f"expected {list_of(options)}, {got}{guess}"
        case "greater_than":
            return f"must be more than {facts['gt']:g}, {got}"
        case "greater_than_equal":
            return f"must be at least {facts['ge']:g}, {got}"
        case "less_than_equal":
            return f"must be at most {facts['le']:g}, {got}"
        case "string_too_short":
            return f"must not be empty, {got}"
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, {got}"
