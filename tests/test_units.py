"""Sizes, rates and durations as people write them."""

from __future__ import annotations

import re

import pytest

from relay.units import parse_duration, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0), (4096, 4096), ("0", 0), ("17", 17), ("1B", 1), ("64KiB", 65536), ("10MB", 10_000_000), ("1kB", 1000),
        ("1KB", 1000), ("1GiB", 1 << 30), ("2TB", 2 * 10**12), ("1.5GiB", 3 << 29), ("0.1KB", 100), ("1.0001KiB", 1024),
        (" 10 MB ", 10_000_000), (2**63 - 1, 2**63 - 1), ("9007199254740993B", 9007199254740993),
    ],
)  # fmt: skip
def test_sizes(text: object, size: int) -> None:
    """A size is exact in bytes, rounded down where a fraction does not come out even."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        (125, 125), ("125", 125), ("10MB/s", 10_000_000), ("64KiB/s", 65536), ("8Mbit/s", 1_000_000), ("8kbit/s", 1000),
        ("1Gbit/s", 125_000_000), ("8Kibit/s", 1024), ("2.5MB/s", 2_500_000), ("12bit/s", 1),
    ],
)  # fmt: skip
def test_rates(text: object, rate: int) -> None:
    """A rate is in bytes a second, given in bytes or in bits."""
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(0, 0.0), (2, 2.0), (0.25, 0.25), ("1.5s", 1.5), ("200ms", 0.2), ("50us", 5e-5), ("2m", 120.0), ("1h", 3600.0),
     ("1d", 86400.0), ("3", 3.0), ("10 s", 10.0)],
)  # fmt: skip
def test_durations(text: object, seconds: float) -> None:
    """A duration is in seconds, whatever its unit."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abc", "expected a size such as 64KiB, got 'abc'"),
        ("", "expected a size"),
        ("10mb", "did you mean 10MB?"),
        ("64k", "did you mean 64KB or 64KiB?"),
        ("10MB/s", "did you mean 10MB?"),
        ("1.5", "expected a size"),
        ("-1", "expected a size"),
        ("1_000", "expected a size"),
        ("0x10", "expected a size"),
        ("\u0661", "expected a size"),
        (-1, "is negative"),
        (2**63, "is too large"),
        ("9" * 5000, "is too large"),
        ("8388608TiB", "is too large"),
        (1.5, "got the number 1.5"),
        (True, "got true"),
        (None, "got nothing"),
        ([], "got a list"),
    ],
)
def test_what_is_no_size_is_refused(text: object, said: str) -> None:
    """The message names the value, gives an example, and guesses at the unit that was meant."""
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10MB", "expected a rate such as 10MB/s, got '10MB'; did you mean 10MB/s?"),
        ("10Mbit", "did you mean 10Mbit/s?"),
        ("10mb/s", "did you mean 10MB/s?"),
        ("fast", "expected a rate"),
        ("/s", "expected a rate"),
        ({}, "got a mapping"),
        (False, "got false"),
    ],
)
def test_what_is_no_rate_is_refused(text: object, said: str) -> None:
    """The message names the value, gives an example, and guesses at what was meant."""
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abc", "expected a duration such as 1.5s, got 'abc'"),
        ("12:30", "expected a duration"),
        ("1S", "did you mean 1s?"),
        ("-1s", "expected a duration"),
        (-0.5, "expected a duration"),
        (float("nan"), "expected a duration"),
        (float("inf"), "is too long"),
        (10**400, "is too long"),
        ("4000d", "is too long"),
        (True, "got true"),
    ],
)
def test_what_is_no_duration_is_refused(text: object, said: str) -> None:
    """Neither text without meaning nor a number that no timer can hold becomes a duration."""
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_duration(text)
