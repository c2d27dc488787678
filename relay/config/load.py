"""A configuration file, or its text, as a checked `Config`; or every problem in it, each with its place.

Nothing that the configuration names is opened here: files, sockets and directories are the business of
those who run it.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from errno import errorcode
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from relay.config.document import Document, Spot, Unreadable, parse
from relay.config.models import Config
from relay.config.pending import refusals
from relay.errors import ConfigError, ConfigErrors
from relay.journal import secrets
from relay.settings import Place, Problem, problems_of, said
from relay.units import show

LARGEST = 4 << 20  # bytes; a thousand routes take a tenth of it

_HINTS = {
    "ENOENT": "check the path",
    "EISDIR": "give the YAML file in it",
    "EACCES": "let the user that runs relay read it",
}
_DEFAULT = Path(__file__).parent.parent / "configs" / "default.yaml"  # a link to configs/ of the source tree


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where in its text things stand."""

    config: Config
    name: str
    document: Document

    def where(self, place: Place) -> str:
        """`file:line:column` of the key at `place`, or of the nearest thing around it."""
        line, column = self.document.spot(Problem("", place, at_key=True))
        return f"{self.name}:{line}:{column}"


def load_to_run(path: str | None) -> Config:
    """What `relay serve` runs and `check` and `plan` look at; ConfigErrors if it is wrong or cannot run yet.

    `path` is that of a file, "-" for stdin, None for the built-in default.
    """
    if path is None:
        return loads(default_text(), "default.yaml", to_run=True)
    return load(path, to_run=True)


def load(path: str | os.PathLike[str], *, to_run: bool = False) -> Config:
    """The configuration in the file at `path` ("-": stdin); ConfigErrors if there is none or it is wrong.

    `to_run` refuses what this version does not do yet as well (relay.config.pending).
    """
    return load_with_places(path, to_run=to_run).config


def load_with_places(path: str | os.PathLike[str], *, to_run: bool = False) -> Loaded:
    """As `load`, with the places of what it says."""
    name = os.fspath(path)
    place: str | int = name
    if name == "-":
        name, place = "<stdin>", 0
    try:
        with open(place, "rb", closefd=place != 0) as file:
            status = os.fstat(file.fileno())
            _trusted(name, status, to_run=to_run)
            size = status.st_size  # before a byte is read; 0 for a pipe, which is read up to the limit
            raw = file.read(LARGEST + 1) if size <= LARGEST else b""
            open_to_all = to_run and stat.S_ISREG(status.st_mode) and bool(status.st_mode & stat.S_IROTH)
    except OSError as error:
        code = errorcode.get(error.errno or 0, "error")
        raise _refusal(
            name, f"cannot read it: {error.strerror} ({code})", hint=_HINTS.get(code, "")
        ) from error
    except ValueError as error:
        raise _refusal(repr(name), f"cannot read it: {error}", hint="check the path") from error
    if size > LARGEST or len(raw) > LARGEST:
        mib = f"{size / (1 << 20):.0f} MiB" if size else "more than that"
        raise _refusal(name, f"larger than a configuration may be: the limit is 4 MiB, this is {mib}")
    text = _decoded(raw, name)
    loaded = _loaded(text, name, to_run=to_run)
    if open_to_all:
        _secretless(text, loaded)
    return loaded


def loads(text: str, name: str = "<text>", *, to_run: bool = False) -> Config:
    """The configuration that `text` says; ConfigErrors, which call the text `name`, if it is wrong."""
    return _loaded(text, name, to_run=to_run).config


def _loaded(text: str, name: str, *, to_run: bool) -> Loaded:
    if len(text) > LARGEST:
        raise _refusal(name, "larger than a configuration may be: the limit is 4 MiB")
    try:
        document = parse(text.removeprefix("\ufeff"))
    except Unreadable as error:
        raise ConfigErrors(
            [ConfigError(error.message, file=name, line=error.spot[0], column=error.spot[1])]
        ) from error
    if document.data is None and not document.problems:
        raise _refusal(
            name, "the configuration is empty", line=1, column=1, hint="it needs at least 'routes:'"
        )
    return Loaded(_built(document, name, to_run=to_run), name, document)


def _trusted(name: str, status: os.stat_result, *, to_run: bool) -> None:
    """A root that does what anybody wrote would be anybody's: refuses such a file."""
    if to_run and os.geteuid() == 0 and stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IWOTH:
        raise _refusal(name, "anybody may write it, and relay is root", hint=f"chmod o-w {shlex.quote(name)}")


class _Nothing(Mapping[str, str]):
    """An environment that has every variable, and nothing in it: what is left is what the file says itself."""

    def __getitem__(self, _name: str) -> str:
        return ""

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _secretless(text: str, loaded: Loaded) -> None:
    """What anybody may read holds no password: refuses such a file, at the check that says it. From the environment it
    may come."""
    if "send" not in text:
        return
    hint = f"chmod o-r {shlex.quote(loaded.name)}, or take it from the environment: ${{NAME}}"
    found = []
    for place, question in _said_by_checks(parse(text.removeprefix("\ufeff"), _Nothing()).data, ()):
        if secrets.has_credentials(question):
            line, column = loaded.document.spot(Problem("", place))
            message = said(place, Problem("a password, and anybody may read the file", place))
            found.append(ConfigError(message, file=loaded.name, line=line, column=column, hint=hint))
    if found:
        raise ConfigErrors(found)


def _said_by_checks(data: Any, place: Place) -> Iterator[tuple[Place, str]]:
    """Every `send` of a `health`, with its place."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        if key == "send" and place[-1:] == ("health",) and isinstance(value, str):
            yield (*place, key), value
        else:
            yield from _said_by_checks(value, (*place, key))


def default_text() -> str:
    """The text of the built-in default, comments and all."""
    return _DEFAULT.read_text(encoding="utf-8")


def load_default() -> Config:
    """The built-in default, checked like any other configuration."""
    return loads(default_text(), "default.yaml")


def _built(document: Document, name: str, *, to_run: bool) -> Config:
    """The models of `document`; ConfigErrors with the problems of text and meaning together."""
    found = list(document.problems)
    config = None
    if isinstance(document.data, dict):
        try:
            config = Config.model_validate(document.data)
        except ValidationError as error:
            for problem in problems_of(error):
                if not any(problem.place[: len(place)] == place for place in document.broken):
                    found.append((document.spot(problem), problem))
        else:
            if to_run:
                found += [(document.spot(problem), problem) for problem in refusals(config)]
    elif not found:
        problem = Problem(f"expected a mapping that begins with 'routes:', got {show(document.data)}")
        found.append((document.spot(problem), problem))
    if config is None or found:
        unique = dict.fromkeys(sorted(found, key=lambda item: item[0]))
        raise ConfigErrors(
            [_error(spot, document.written(problem.place), problem, name) for spot, problem in unique]
        )
    return config


def _error(spot: Spot, place: Place, problem: Problem, name: str) -> ConfigError:
    return ConfigError(said(place, problem), file=name, line=spot[0], column=spot[1])


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        line = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        said = f"not UTF-8: byte 0x{raw[error.start]:02x}"
        raise _refusal(name, said, line=line, column=column, hint="save the file as UTF-8") from error


def _refusal(name: str, message: str, *, line: int = 0, column: int = 0, hint: str = "") -> ConfigErrors:
    return ConfigErrors([ConfigError(message, file=name, line=line, column=column, hint=hint)])
