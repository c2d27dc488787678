"""The JSON Schema for editors agrees with the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from route_texts import CONTRACT

from relay.config.schema import schema
from relay.stages import catalogue

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    """A validator of the schema, which is itself a valid schema."""
    made = schema()
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


@pytest.mark.parametrize(
    "text", [CONTRACT, *(path.read_text() for path in CONFIGS)], ids=["contract", *(p.stem for p in CONFIGS)]
)
def test_it_accepts_what_the_loader_accepts(validator: Draft202012Validator, text: str) -> None:
    """The contract's example and every configuration that is shipped pass without a complaint."""
    assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []


def _route(**changes: Any) -> dict[str, Any]:
    return {"routes": {"a": {"source": "-", "sink": "null:", **changes}}}


@pytest.mark.parametrize(
    "data",
    [
        _route(
            stages=[
                "meter",
                {"meter": None},
                {"throttle": "10MB/s"},
                {"throttle": 1000},
                {"checksum": "blake3"},
            ]
        ),
        _route(stages=[{"tee": {"to": "x", "stages": [{"tee": {"to": "-", "on_slow": "drop"}}]}}]),
        _route(sink={"file": "x", "rotate": "1h", "fsync": "never", "sidecar": True}),
        _route(sink={"file": "x", "rotate": {"size": 10, "every": "1h"}, "append": "${APPEND:-false}"}),
        _route(source={"listen": "unix:///x", "mode": "0660"}, method="${METHOD:-auto}"),
        _route(wait_for_sinks="10s"),
        {**_route(), "engines": "${ENGINES:-2}", "drain": 5},
    ],
)
def test_it_accepts_short_forms_and_variables(validator: Draft202012Validator, data: Any) -> None:
    """Short forms pass, and so does a variable where a number, a boolean or a word of a list is expected."""
    assert [error.message for error in validator.iter_errors(data)] == []


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"routes": {"a": {"source": "-"}}},
        {**_route(), "engine": 2},
        {**_route(), "engines": 0},
        {**_route(), "engines": "two"},
        _route(method="fast"),
        _route(duplex="yes"),
        _route(stages=["throttle"]),
        _route(stages=["metre"]),
        _route(stages=[{"throttle": {"rate": "10MB"}}]),
        _route(stages=[{"meter": {}, "limit": {"stop": 1}}]),
        _route(stages=[{"tee": {"to": {"file": "x", "on_slow": "wait"}}}]),
        _route(sink={"listen": "tcp://:1", "connect": "tcp://a:1"}),
        _route(sink={"connect": "http://a:1"}),
        _route(sink={"plain": "-"}),
        _route(sink={}),
    ],
)
def test_it_refuses_what_the_loader_refuses(validator: Draft202012Validator, data: Any) -> None:
    """An editor marks unknown keys, wrong types, wrong words and missing ends."""
    assert not validator.is_valid(data)


def test_every_stage_of_the_folder_is_in_it() -> None:
    """A new stage is in the schema by being in the folder."""
    assert set(schema()["$defs"]["Stage"]["anyOf"][0]["properties"]) == set(catalogue())


def test_every_key_is_described() -> None:
    """An editor can show what each key means."""
    bare = [
        f"{name}.{key}"
        for name, part in schema()["$defs"].items()
        if name != "Stage"
        for whole in (part, *part.get("anyOf", ()))
        for key, value in whole.get("properties", {}).items()
        if "description" not in value
    ]
    assert bare == []
