"""A configuration from data in place of a text: what `relay run` makes of its addresses, without a YAML parser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from relay.config.models import Config
from relay.errors import ConfigError, ConfigErrors
from relay.settings import Place, Problem, problems_of


def from_data(data: Mapping[str, Any], name: str = "relay") -> Config:
    """The configuration in `data`, shaped as the YAML is; ConfigErrors, without lines, if it is wrong."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        found = [ConfigError(said(problem.place, problem), file=name) for problem in problems_of(error)]
        raise ConfigErrors(found) from error


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
