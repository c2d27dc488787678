"""Sizes, rates, durations and paces as people write them: `64KiB`, `10MB/s`, `1.5s`, `100/s`.

`parse_size`, `parse_rate`, `parse_duration` and `parse_pace` need nothing but the standard library. `Size`, `Rate`,
`Duration` and `Pace` are the same four as types of a pydantic model's fields.

Units are written one way only (`MB` is 10^6 bytes, `MiB` 2^20, `Mbit` 10^6 bits), since `m`, `M`, `mb` and
`Mb` mean different things to different people and a wrong guess is off by a factor of eight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

_BYTES = {"B": 1}
_BITS = {"bit": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _BYTES[f"{_letter}B"] = 1000**_power
    _BYTES[f"{_letter}iB"] = 1024**_power
    _BITS[f"{_letter}bit"] = 1000**_power
    _BITS[f"{_letter}ibit"] = 1024**_power
_BYTES["kB"] = 1000  # the SI spelling of the same thing
_BITS["kbit"] = 1000
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_QUANTITY = re.compile(rf"({_NUMBER}) ?([A-Za-z]*)")
_PACE = re.compile(rf"({_NUMBER})(?: ?/ ?([smhd]))?")
_LARGEST = 2**63 - 1  # what off_t holds
_LONGEST = 3650 * 86400.0  # ten years: beyond it lie typing errors and overflowing timers


def parse_size(value: object) -> int:
    """Whole bytes, rounded down, of `64KiB`, `1.5GiB` or a plain number; ValueError in plain words."""
    if isinstance(value, str):
        matched = _QUANTITY.fullmatch(value.strip())
        if matched and matched[2] in ("", *_BYTES) and (matched[2] or "." not in matched[1]):
            return _bounded(_scaled(matched[1], _BYTES.get(matched[2], 1), 1), value)
        raise ValueError(_complaint("size", "64KiB", value, _BYTES, ""))
    if isinstance(value, int) and not isinstance(value, bool):
        return _bounded(value, value)
    raise ValueError(_complaint("size", "64KiB", value, _BYTES, ""))


def parse_rate(value: object) -> int:
    """Whole bytes a second of `10MB/s`, `8Mbit/s` or a plain number; ValueError in plain words."""
    if isinstance(value, str):
        text = value.strip()
        matched = _QUANTITY.fullmatch(text.removesuffix("/s"))
        if matched and text.endswith("/s"):
            if matched[2] in _BYTES:
                return _bounded(_scaled(matched[1], _BYTES[matched[2]], 1), value)
            if matched[2] in _BITS:
                return _bounded(_scaled(matched[1], _BITS[matched[2]], 8), value)
        elif matched and not matched[2] and "." not in matched[1]:
            return _bounded(int(matched[1]), value)
        raise ValueError(_complaint("rate", "10MB/s", value, {**_BYTES, **_BITS}, "/s"))
    if isinstance(value, int) and not isinstance(value, bool):
        return _bounded(value, value)
    raise ValueError(_complaint("rate", "10MB/s", value, {**_BYTES, **_BITS}, "/s"))


def parse_duration(value: object) -> float:
    """Seconds of `1.5s`, `200ms`, `2m`, `1h`, `1d` or a plain number; ValueError in plain words."""
    seconds = math.nan
    if isinstance(value, str):
        matched = _QUANTITY.fullmatch(value.strip())
        if matched and matched[2] in ("", *_SECONDS):
            seconds = float(matched[1]) * _SECONDS.get(matched[2], 1.0)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = math.inf if abs(value) > _LARGEST else float(value)
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(_complaint("duration", "1.5s", value, _SECONDS, ""))
    if seconds > _LONGEST:
        raise ValueError(f"{show(value)} is too long: the longest duration is 3650d")
    return seconds


def parse_pace(value: object) -> float:
    """Times a second of `100/s`, `30/m`, `1000/h` or a plain number; ValueError in plain words."""
    times = math.nan
    if isinstance(value, str):
        matched = _PACE.fullmatch(value.strip())
        if matched:
            times = float(matched[1]) / _SECONDS[matched[2] or "s"]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        times = float(value) if abs(value) < _LARGEST else math.inf
    if not 0 < times < 1e9:
        raise ValueError(f"expected a number for a time such as 100/s, got {show(value)}")
    return times


def show(value: object) -> str:
    """A value as an error message names it: text in quotes, YAML's own words for the rest."""
    match value:
        case str():
            return repr(value if len(value) <= 80 else value[:77] + "...")
        case bool():
            return "true" if value else "false"
        case None:
            return "nothing"
        case int() | float():
            digits = repr(value) if isinstance(value, float) or abs(value) < 10**30 else "a very large one"
            return f"the number {digits}"
        case list() | tuple():
            return "a list"
        case dict():
            return "a mapping"
    return repr(value)


def _scaled(number: str, multiplier: int, divisor: int) -> int:
    """`number * multiplier / divisor` rounded down, exactly: a float would lose bytes above 2^53."""
    whole, _, fraction = number.partition(".")
    kept = fraction[:30]  # beyond it no byte changes
    return int((whole + kept)[:400]) * multiplier // (int("1" + "0" * len(kept)) * divisor)


def _bounded(amount: int, value: object) -> int:
    if amount < 0:
        raise ValueError(f"{show(value)} is negative")
    if amount > _LARGEST:
        raise ValueError(f"{show(value)} is too large: the limit is 2^63 - 1 bytes")
    return amount


def _complaint(noun: str, example: str, value: object, units: dict[str, Any], suffix: str) -> str:
    text = f"expected a {noun} such as {example}, got {show(value)}"
    if not isinstance(value, str):
        return text
    matched = _QUANTITY.fullmatch(value.strip().removesuffix("/s"))
    if matched is None:
        return text
    number, unit = matched[1], matched[2]
    if unit in units and suffix:
        return f"{text}; did you mean {number}{unit}{suffix}?"
    if value.strip().endswith("/s") and not suffix and unit in units:
        return f"{text}; did you mean {number}{unit}?"
    known = [
        name for name in units if name.lower() in (unit.lower(), f"{unit}b".lower(), f"{unit}ib".lower())
    ]
    if unit and known:
        return f"{text}; did you mean {' or '.join(f'{number}{name}{suffix}' for name in known[:2])}?"
    return text


@dataclass(frozen=True)
class Unit:
    """What makes a field of a pydantic model take a size, a rate or a duration; put it into `Annotated`.

    pydantic is imported only when a model is built, so parsing alone stays cheap to import.
    """

    parse: Callable[[object], float]
    number: str  # the JSON type of the plain number
    pattern: str
    example: str
    positive: bool = False  # whether zero is refused

    def read(self, value: object) -> float:
        """The amount that `value` says; ValueError in plain words."""
        amount = self.parse(value)
        if self.positive and not amount:
            raise ValueError(f"must be more than 0, got {show(value)}")
        return amount

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        text = {"type": "string", "pattern": self.pattern, "examples": [self.example]}
        least = "exclusiveMinimum" if self.positive else "minimum"
        return {"anyOf": [{"type": self.number, least: 0}, text]}


def _pattern(units: str, suffix: str = "") -> str:
    return rf"^{_NUMBER} ?({units}){suffix}$|^[0-9]+$|\$\{{"


_BYTE_UNITS = "B|kB|[KMGT]i?B"
_RATE_UNITS = f"{_BYTE_UNITS}|bit|kbit|[KMGT]i?bit"
_SIZE = Unit(parse_size, "integer", _pattern(_BYTE_UNITS), "64KiB")
_RATE = Unit(parse_rate, "integer", _pattern(_RATE_UNITS, "/s"), "10MB/s")
_PER = Unit(parse_pace, "number", rf"^{_NUMBER}( ?/ ?[smhd])?$|\$\{{", "100/s", positive=True)
_DURATION = Unit(parse_duration, "number", _pattern("us|ms|s|m|h|d") + rf"|^{_NUMBER}$", "1.5s")

Size = Annotated[int, _SIZE]
Rate = Annotated[int, _RATE]
Duration = Annotated[float, _DURATION]
PositiveSize = Annotated[int, replace(_SIZE, positive=True)]
PositiveRate = Annotated[int, replace(_RATE, positive=True)]
Pace = Annotated[float, _PER]
PositiveDuration = Annotated[float, replace(_DURATION, positive=True)]


def show_size(amount: float) -> str:
    """Bytes as people read them: `512 B`, `1.5 MiB`, `20.0 GiB`."""
    if abs(amount) < 1024:
        return f"{amount:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        if abs(amount) < 1024:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} PiB"
