"""Placeholders such as `{time}` in the paths of file sinks and in headers.

A placeholder is a word in braces. Braces around anything else are ordinary characters in a header (`{"a":
1}`), and a typing error in a path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from relay.errors import did_you_mean

PATH_NAMES = ("route", "time", "peer", "id", "name")
TEXT_NAMES = ("route", "time", "peer", "id")

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def placeholders(text: str) -> frozenset[str]:
    """The names that stand in braces in `text`, known or not."""
    return frozenset(_PLACEHOLDER.findall(text))


def check_path(path: str) -> str:
    """`path` itself if a file sink can take it; ValueError names what is wrong with its placeholders."""
    _check_names(path, PATH_NAMES)
    if set(_PLACEHOLDER.sub("", path)) & set("{}"):
        raise ValueError(
            f"{path!r} has a brace that belongs to no placeholder; known are {_listed(PATH_NAMES)}"
        )
    return path


def check_text(text: str) -> str:
    """`text` itself if a header can take it; ValueError names the placeholder that is unknown."""
    _check_names(text, TEXT_NAMES)
    return text


def fill_path(path: str, values: Mapping[str, str]) -> str:
    """`path` with every placeholder replaced by its value, reduced so that no value can climb out.

    Only `[A-Za-z0-9._-]` is kept: a run of other characters becomes one "-"; a value of dots alone, or of
    nothing, becomes "-" too.
    """
    return _PLACEHOLDER.sub(lambda found: _reduced(values[found[1]]), path)


def fill_text(text: str, values: Mapping[str, str]) -> str:
    """`text` with every placeholder replaced by its value as it is."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


def _reduced(value: str) -> str:
    safe = _UNSAFE.sub("-", value)
    return safe if safe.strip(".") else "-"


def _check_names(text: str, known: tuple[str, ...]) -> None:
    for name in _PLACEHOLDER.findall(text):
        if name not in known:
            guess = did_you_mean(name, known)
            raise ValueError(
                f"unknown placeholder '{{{name}}}' in {text!r}{guess or '; known are ' + _listed(known)}"
            )


def _listed(names: tuple[str, ...]) -> str:
    return " ".join(f"{{{name}}}" for name in names)
