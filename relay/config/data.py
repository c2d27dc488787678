"""A configuration from data in place of a text: what `relay run` makes of its addresses, without a YAML parser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from relay.config.models import Config
from relay.settings import refusal


def from_data(data: Mapping[str, Any], name: str = "relay") -> Config:
    """The configuration in `data`, shaped as the YAML is; ConfigErrors, without lines, if it is wrong."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise refusal(error, name) from error
