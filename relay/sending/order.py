"""What `relay send` is asked for, read from words and checked before anything is opened."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

from pydantic import ValidationError

from relay.endpoints.options import OnSlow, Policy
from relay.endpoints.settings import Algorithm, SinkSettings
from relay.errors import RelayError, UsageError, did_you_mean
from relay.settings import problems_of
from relay.units import parse_duration, parse_rate, parse_size
from relay.ways import Forced

DEFAULT_ADDRESS = "tcp://127.0.0.1:9000"
METHODS = ("auto", "sendfile", "splice", "vmsplice", "copy")

_DIGITS = {"sha256": 64, "blake3": 64, "xxh3": 16, "crc32c": 8}  # of a digest in hexadecimal

_Amount = TypeVar("_Amount", int, float)


@dataclass(frozen=True)
class Order:
    """Which files (`-`: stdin) go to which sinks, and how. Sizes in bytes, `rate` in bytes a second (0:
    none), `wait` in seconds; `digest` is what the checksum must be, in lower case, or empty."""

    files: tuple[str, ...]
    to: tuple[SinkSettings, ...]
    method: Forced = "auto"
    rate: int = 0
    offset: int = 0
    length: int | None = None
    algorithm: Algorithm | None = None
    digest: str = ""
    wait: float = 0.0


def order(
    files: Sequence[str],
    to: Sequence[str],
    *,
    method: str,
    rate: str | int | None,
    offset: str | int,
    length: str | int | None,
    checksum: str,
    wait: str | float,
    on_slow: str,
) -> Order:
    """The order that these words give; UsageError names the option that makes no sense and why."""
    files = tuple(files) or ("-",)
    if files.count("-") > 1:
        raise UsageError("'-' is given more than once, but stdin can be read only once")
    if "" in files:
        raise UsageError("a FILE is empty", hint="write a path, or - for stdin")
    policy = cast(Policy, _one_of("--on-slow", on_slow, get_args(Policy)))
    sinks = tuple(_sink(text, policy) for text in to or (DEFAULT_ADDRESS,))
    _check_sinks(files, sinks)
    algorithm, digest = _checksum(checksum) if checksum else (None, "")
    if digest and len(files) > 1:
        raise UsageError(
            f"--checksum gives one digest, but there are {len(files)} files",
            hint="send that file alone, or give the algorithm without a digest",
        )
    bytes_a_second = _amount("--rate", rate, parse_rate) if rate is not None else 0
    if rate is not None and not bytes_a_second:
        raise UsageError("--rate: must be more than 0")
    return Order(
        files=files,
        to=sinks,
        method=cast(Forced, _one_of("--method", method, METHODS)),
        rate=bytes_a_second,
        offset=_amount("--offset", offset, parse_size),
        length=None if length is None else _amount("--length", length, parse_size),
        algorithm=algorithm,
        digest=digest,
        wait=_amount("--wait", wait, parse_duration),
    )


def _one_of(option: str, word: str, known: Sequence[str]) -> str:
    if word not in known:
        guess = did_you_mean(word, known) or f"; known are {', '.join(known)}"
        raise UsageError(f"{option}: unknown {word!r}{guess}")
    return word


def _amount(option: str, value: object, parse: Callable[[object], _Amount]) -> _Amount:
    try:
        return parse(value)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def _sink(text: str, policy: Policy) -> SinkSettings:
    try:
        settings: SinkSettings = SinkSettings.model_validate(text)
    except ValidationError as error:
        raise UsageError("; ".join(f"--to: {problem.message}" for problem in problems_of(error))) from error
    except RelayError as error:
        raise UsageError(f"--to: {error}") from error
    return settings.model_copy(update={"on_slow": OnSlow(policy=policy)})


def _check_sinks(files: Sequence[str], sinks: Sequence[SinkSettings]) -> None:
    """Several streams may not replace each other's file, nor run into each other at one end."""
    for sink in sinks:
        if len(files) > 1 and sink.address.scheme == "file" and not sink.placeholders & {"name", "id"}:
            raise UsageError(
                f"{len(files)} files would all be written to {sink.address}",
                hint=f"give each a name of its own: --to '{_with_name(sink.address.path)}'",
            )
    single = Counter(str(s.address) for s in sinks if _is_single(s))
    for address, count in single.items():
        if count > 1:
            raise UsageError(f"--to {address} is given {count} times", hint="give it once")


def _is_single(sink: SinkSettings) -> bool:
    return sink.address.scheme in ("file", "fifo", "fd", "stdio") and not sink.placeholders


def _with_name(path: str) -> str:
    folder, slash, _last = path.rpartition("/")
    return f"{folder}{slash}{{name}}"


def _checksum(text: str) -> tuple[Algorithm, str]:
    """`sha256` or `sha256=HEX`."""
    word, equals, digest = text.partition("=")
    algorithm: Any = _one_of("--checksum", word, get_args(Algorithm))
    digest = digest.lower()
    if equals and not re.fullmatch(f"[0-9a-f]{{{_DIGITS[algorithm]}}}", digest):
        digits = _DIGITS[algorithm]
        raise UsageError(f"--checksum: {algorithm} has {digits} hexadecimal digits, got {digest!r}")
    return algorithm, digest
