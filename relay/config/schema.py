"""The configuration's JSON Schema for editors, made from the models that read it.

It accepts whatever the loader accepts, and the text before variables are filled in: `engines:
"${ENGINES:-2}"` is text to an editor and a number to relay.
"""

from __future__ import annotations

from typing import Any

from relay.config.models import Config
from relay.settings import FrozenModel
from relay.stages import catalogue

_VARIABLE = {"$ref": "#/$defs/Variable"}
_TYPED = {"integer", "number", "boolean"}


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a whole configuration file."""
    root = _of(Config)
    defs: dict[str, Any] = root.pop("$defs")
    stages: dict[str, Any] = {}
    bare = []
    for kind, settings in catalogue().items():
        made = _of(settings)
        defs.update(made.pop("$defs", {}))
        defs[f"stage-{kind}"] = made | {"title": kind}
        required = [name for name, field in settings.model_fields.items() if field.is_required()]
        stages[kind] = {"$ref": f"#/$defs/stage-{kind}"}
        if not required:
            bare.append(kind)
            stages[kind] = {"anyOf": [stages[kind], {"type": "null"}]}
    one = {"type": "object", "properties": stages, "additionalProperties": False}
    defs["Stage"] = {"anyOf": [one | {"minProperties": 1, "maxProperties": 1}, {"enum": bare}]}
    defs["Variable"] = {
        "type": "string",
        "pattern": r"^\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^{}]*)?\}$",
        "description": "filled in from the environment",
    }
    filled = _filled(
        {"title": "relay", **root, "$defs": {name: defs[name] for name in sorted(defs) if name != "Variable"}}
    )
    filled["$defs"]["Variable"] = defs["Variable"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **filled}


def _of(model: type[FrozenModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template="#/$defs/{model}")


def _filled(part: Any) -> Any:
    """The same schema with stages in place of their marks, and variables wherever a typed value may be."""
    if isinstance(part, list):
        return [_filled(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("x-relay-stage"):
        return {"$ref": "#/$defs/Stage"}
    made = {key: _filled(item) for key, item in part.items() if key not in ("default", "enum", "examples")}
    made |= {
        key: part[key]
        for key in ("default", "enum", "examples")
        if key in part and not isinstance(part[key], dict)
    }
    types = part.get("type")
    names = {types} if isinstance(types, str) else set(types) if isinstance(types, list) else set()
    if (names and names <= _TYPED) or "enum" in part:
        said = {key: made.pop(key) for key in ("title", "description", "default") if key in made}
        return {"anyOf": [made, _VARIABLE], **said}
    return made
