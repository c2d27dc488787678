"""The reference pages, made from what relay itself reads and writes, so that they cannot drift.

    python docs/generate.py            writes them anew
    python docs/generate.py --check    exits with 1 and names those that are not what would be written

docs/reference/configuration.md    from the models (relay.config), by way of their JSON Schema
docs/reference/commands.md         from the commands' own signatures (relay.cli)
docs/reference/record.md           from a record with every field (relay.journal.record); the words are here
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from relay import cli
from relay.config.models import Admin, Config, Confine, Route
from relay.config.schema import schema
from relay.endpoints import address
from relay.endpoints.options import Health, Limits, OnSlow, Rotate, Trust
from relay.endpoints.settings import SinkSettings, SourceSettings
from relay.journal.record import SessionRecord, SinkRecord
from relay.settings import FrozenModel
from relay.stages import catalogue
from relay.units import show_size

HERE = Path(__file__).parent / "reference"
NOTE = "<!-- Made by docs/generate.py from relay itself: change it there. -->"

# -- configuration

# The models that a section is about, by their names in the schema; where each may stand, and what says more.
SECTIONS: tuple[tuple[str, type[FrozenModel], str], ...] = (
    (
        "The file",
        Config,
        "`relay check FILE` reports all that is wrong with one; examples are in `configs/`.",
    ),
    ("Route", Route, "Stands under `routes`, by its name. [Both ways](../duplex.md) with `duplex: true`."),
    ("Source", SourceSettings, "Exactly one of the first six keys, or the [address](#addresses) alone."),
    (
        "Sink",
        SinkSettings,
        "Exactly one of the first six keys, or the [address](#addresses) alone. In a route, and as `to` of a [tee](#tee).",
    ),
    (
        "on_slow",
        OnSlow,
        "Of a sink, or of a tee for its whole branch: [slow, dead and late sinks](../slow-sinks.md).",
    ),
    ("limits", Limits, "Of a source: [limits](../operations.md#limits)."),
    (
        "proxy_protocol",
        Trust,
        "Of a source: [real addresses](../duplex.md#real-addresses). A sink has only the version to send, `v1` or `v2`.",
    ),
    ("health", Health, "Of the sink of a duplex route: [upstreams](../duplex.md#upstreams)."),
    ("rotate", Rotate, "Of a file sink: [files](../operations.md#files)."),
    ("admin", Admin, "At the top of the file: [asking a running relay](../admin.md)."),
    ("confine", Confine, "At the top of the file: [least privilege](../security.md)."),
)
SHORT: Mapping[type[FrozenModel], str] = {
    Trust: "the networks, one or a list; `true` on a unix socket",
    Health: "`every` alone, such as `health: 5s`",
}
LINKS = {model.__name__: title for title, model, _more in SECTIONS}

UNITS = """\
| written as | means | examples |
|---|---|---|
| size | bytes: a number, or a number with `B`, `kB` `MB` `GB` `TB` (powers of 1000), `KiB` `MiB` `GiB` `TiB` (of 1024) | `64KiB`, `1.5GiB`, `4096` |
| rate | bytes a second: as a size with `/s`; or bits: `bit`, `kbit`, `Mbit`, `Mibit` and so on with `/s` | `10MB/s`, `8Mbit/s` |
| duration | seconds, or `us`, `ms`, `s`, `m`, `h`, `d` | `200ms`, `1.5s`, `1h` |
| pace | times a second, or by `s`, `m`, `h`, `d` | `100/s`, `30/m` |"""


def configuration() -> str:
    """The page of all keys."""
    made = schema()
    parts = [
        "# Configuration",
        NOTE,
        "Every key: what it takes, its default, what it does. A key that is unknown, or that stands where it means "
        "nothing, is an error with file, line and column. `${NAME}` and `${NAME:-default}` are filled in from the "
        "environment, in any value. `relay schema` prints the JSON Schema of all this for editors.",
        "## How amounts are written",
        UNITS,
        "## Addresses",
        "| scheme | is written |\n|---|---|\n"
        + "\n".join(f"| {scheme} | {_coded(form)} |" for scheme, form in address._FORMS.items()),
    ]
    for title, model, more in SECTIONS:
        part = made if model is Config else made["$defs"][model.__name__]
        parts += [f"## {title}", *_section(part, model, more)]
    parts += [
        "## Stages",
        "What `stages` and `replies` of a route, and `stages` of a tee, hold in order: each is one of these names with its "
        "keys, or the name alone where no key is needed. Each may have a `name`, by which logs, metrics and `relay set` "
        "call it.",
    ]
    for kind, settings in catalogue().items():
        parts += [f"### {kind}", *_section(made["$defs"][f"stage-{kind}"], settings, "")]
    return "\n\n".join(parts) + "\n"


def _section(part: Mapping[str, Any], model: type[FrozenModel], more: str) -> Iterator[str]:
    """What it is, its short form, and a row for each key."""
    words = re.split(r"(?<=\.)\s", inspect.cleandoc(model.__doc__ or ""))[0].replace("\n", " ")
    whole, short = part, None
    if "properties" not in part:
        short, whole = part["anyOf"]
    yield " ".join(text for text in (words, more) if text)
    if short is not None and model not in (SourceSettings, SinkSettings):
        yield f"Short form: {SHORT.get(model) or short.get('description') or _type(short)}."
    allowed = _allowed(model)
    rows = ["| key | takes | default | does |", "|---|---|---|---|"]
    for key, value in whole["properties"].items():
        words = value.get("description", "")
        if key in allowed:
            words += f" (only: {allowed[key]})"
        default = "needed" if key in whole.get("required", ()) else _default(value, model, key)
        rows.append(f"| `{key}` | {_type(value)} | {default} | {_piped(words)} |")
    yield "\n".join(rows)
    if (stage := getattr(model, "changeable", ())) and hasattr(model, "kind"):
        yield f"`relay set` changes {_listed(stage)} while streams pass."


def _allowed(model: type[FrozenModel]) -> dict[str, str]:
    """For which kinds of end a key is, in the words of the error that it gets elsewhere."""
    if model is Limits:
        given: dict[str, Any] = {"listen": "", "limits": dict.fromkeys(Limits.keys())}
        return {p[1]: scope.words for p, scope in SourceSettings._scoped(given) if len(p) == 2}
    if not issubclass(model, SourceSettings | SinkSettings):
        return {}
    return {place[0]: scope.words for place, scope in model._scoped(dict.fromkeys(model.keys()))}


_KINDS = {"64KiB": "size", "10MB/s": "rate", "1.5s": "duration", "100/s": "pace"}


def _type(part: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    found = list(dict.fromkeys(_kinds(part)))
    if {"size", "rate", "duration", "pace"} & set(found):  # each is a number, too
        found = [word for word in found if not word.startswith(("number", "whole number"))]
    return " or ".join(found)


def _kinds(part: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        if name in LINKS:
            yield f"[{LINKS[name]}](#{_slug(LINKS[name])})"
        elif name != "Variable":
            yield f"[{name.lower()}](#{name.lower()}s)"
    elif "anyOf" in part:
        for one in part["anyOf"]:
            yield from _kinds(one)
    elif "enum" in part:
        yield ", ".join(f"`{word}`" for word in part["enum"])
    elif "const" in part:
        yield f"`{part['const']}`"
    else:
        types = part.get("type", "string")
        for kind in [types] if isinstance(types, str) else types:
            yield from _plain(kind, part)


def _plain(kind: str, part: Mapping[str, Any]) -> Iterator[str]:
    least, most = part.get("minimum"), part.get("maximum")
    span = f", {least} to {most}" if most is not None else f", at least {least}" if least else ""
    match kind:
        case "boolean":
            yield "`true`, `false`"
        case "integer":
            yield f"whole number{span}"
        case "number":
            yield f"number{span}"
        case "array":
            inner = _type(part["items"])
            yield f"list of {inner}" if inner != "text" else "list"
        case "object":
            yield f"mapping of names to {_type(part['additionalProperties'])}"
        case "string":
            pattern = str(part.get("pattern", ""))
            if examples := part.get("examples"):
                yield _KINDS[examples[0]]
            elif "://" in pattern:
                schemes = re.findall("tcp|unix|shared|systemd|fd", pattern.partition("://")[0])
                yield " or ".join(f"`{scheme}://`" for scheme in schemes) + " address"
            else:
                yield "octal digits" if "0-7" in pattern else "text"


def _default(value: Mapping[str, Any], model: type[FrozenModel], key: str) -> str:
    """The default as one would write it; nothing where it is that the key is left out."""
    default = value.get("default", model.model_fields[key].default)
    kind = _type(value)
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, FrozenModel) or default is None or default in ([], (), ""):
        return ""
    if isinstance(default, int | float) and kind.startswith("duration"):
        return f"`{default:g}s`"
    if isinstance(default, int) and kind.startswith("size") and default >= 1024:
        return f"`{show_size(default).replace(' ', '')}`"
    return f"`{default}`"


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _coded(form: str) -> str:
    """Address forms as code, the words between them not."""
    return re.sub(r"[a-z]+://\S*|^-$|null:", lambda found: f"`{found[0]}`", form)


def _piped(text: str) -> str:
    return text.replace("|", "\\|")


def _listed(words: tuple[str, ...]) -> str:
    return " and ".join(f"`{word}`" for word in words)


# -- commands


def commands() -> str:
    """The page of all commands and their options."""
    parts = [
        "# Commands",
        NOTE,
        "`relay --version` says which one it is, `relay COMMAND --help` what stands here. What the exit codes mean is in "
        "[Operating relay](../operations.md#exit-codes) and, for the commands that ask a running relay, in "
        "[What can be asked](../admin.md#what-can-be-asked).",
    ]
    for info in cli.app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__
        parts += [f"## relay {name}", *_command(name, info.callback)]
    return "\n\n".join(parts) + "\n"


def _command(name: str, callback: Callable[..., Any]) -> Iterator[str]:
    hints = get_type_hints(callback, include_extras=True)
    arguments, options = [], []
    rows = []
    for key, parameter in inspect.signature(callback).parameters.items():
        kind, info = _parameter(hints[key])
        words = _piped((info.help or "").partition("  [default:")[0])
        told = re.search(r"\[default: (.*)\]", info.help or "")
        default = told[1] if told else _given(parameter.default)
        if isinstance(info, ArgumentInfo):
            many = list in (kind, getattr(kind, "__origin__", None))
            shown = info.metavar or (key.upper() + "..." * many)
            needed = parameter.default is inspect.Parameter.empty
            arguments.append(shown if needed or shown.startswith("[") else f"[{shown}]")
            rows.append(f"| `{_piped(shown)}` | | {'needed' if needed else default} | {words} |")
        else:
            told_names = [info.default, *(info.param_decls or ())]  # the first of several stands as a default
            names = [name for name in told_names if isinstance(name, str) and name.startswith("--")]
            option = names[0] if names else f"--{key.replace('_', '-')}"
            options.append(option)
            rows.append(f"| `{option}` | {_piped(_takes(kind, info))} | {default} | {words} |")
    yield "```text\n" + " ".join(["relay", name, *arguments, *(["[OPTIONS]"] if options else [])]) + "\n```"
    yield "\n\n".join(
        text.replace("\n", " ") for text in inspect.cleandoc(callback.__doc__ or "").split("\n\n")
    )
    if rows:
        yield "\n".join(["| | takes | default | |", "|---|---|---|---|", *rows])


def _parameter(hint: Any) -> tuple[Any, ArgumentInfo | OptionInfo]:
    """The plain type of a parameter, without None, and what typer was told of it."""
    kind, info = get_args(hint)[:2]
    kinds = [one for one in get_args(kind) if one is not type(None)]
    return (kinds[0] if type(None) in get_args(kind) else kind), info


def _takes(kind: Any, info: OptionInfo) -> str:
    if info.metavar:
        return info.metavar
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{one.value}`" for one in kind)
    if kind is bool:
        return ""
    words = {int: "whole number", float: "number", Path: "path"}.get(kind, "text")
    return (
        f"{words}, {info.min:g} to {info.max:g}" if info.min is not None and info.max is not None else words
    )


def _given(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, Enum):
        return f"`{default.value}`"
    return "" if default is None or default is False or default == "" else f"`{default}`"


# -- the record

SESSION = {
    "route": "the route, by its name",
    "id": "a number; unique among the sessions of a run",
    "source": "the address of the source, as configured",
    "peer": "who was connected there; empty for a file",
    "via": "the proxy whose PROXY header named the peer",
    "bytes": "that came from the source; of a duplex session those that the sink's kernel took",
    "seconds": "from the first to the last",
    "method": "how most of them crossed at the source: `splice`, `tee`, `sendfile`, `vmsplice` or `copy`",
    "ended_by": "`source`, `sinks` or `relay`",
    "result": "`delivered`, or `failed` when a sink or the source failed",
    "sinks": "one mapping a sink, below",
    "bytes_back": "duplex: bytes from the sink that the source's kernel took",
    "lost_back": "duplex: of those bytes the ones that had nowhere to go",
    "method_back": "duplex: how most of them crossed",
    "reason": "why, when it did not end by the stream's own end",
    "why_method": "why that method",
    "stages": "what stages have to say: `digest` of a checksum, `bytes` and `bytes_per_second` of a meter",
    "measured": "what each way across cost and which was taken, where `auto` tried both",
}
SINK = {
    "sink": "its name, or its address as configured",
    "address": "where the bytes went",
    "bytes": "that went to it, those in `lost` included",
    "lost": "of these known not to have arrived",
    "dropped": "left out by its policy, or come after it had ended",
    "reconnects": "how often it was connected again",
    "seconds": "until its last byte",
    "method": "how its bytes crossed into it",
    "result": "`delivered` or `failed`",
    "way": "`back` when it took what came back on a duplex route",
    "reason": "why it ended, when not by the stream's end",
    "backlog": "bytes that wait in its log, or for its next turn",
    "twice": "bytes sent again after a connection broke",
    "path": "the file that was written; `.part` when it is not whole",
    "why_method": "why that method",
    "upstream": "duplex: the address in figures that the session was with",
    "tries": "duplex: how many upstreams were tried",
    "passed_over": "duplex: those that were not taken, each with `upstream` and `why`",
    "connect_seconds": "how long the last connect took that went well",
    "blocked_seconds": "for how long its way was full",
}


def record() -> str:
    """The page of a finished session's record."""
    sink = SinkRecord("s", "a", 1, 1.0, "tee", "failed", "r", 1, 1, 1.0, "p", "w", 1, 1, 1, "u", 1, (("u", "w"),), (1.0,), "back")  # fmt: skip
    session = SessionRecord("r", "1", "s", "p", 1, 1.0, "tee", "sinks", "failed", "r", "w", [sink], [{"stage": "s"}],
                            measured={"chose": "w"}, back=1, back_lost=1, back_method="copy", via="p")  # fmt: skip
    return (
        "\n\n".join(
            [
                "# The session record",
                NOTE,
                'Each stream that is over, and each duplex session, is one line of the log with `"event": "session"`: `info` '
                "when it was delivered, `warning` when not. As JSON it has these fields beside `time`, `level`, `event` and "
                "`message`; `relay status --json` has the last ones of each route. "
                "[Figures in the record](../slow-sinks.md#figures-in-the-record) and, for duplex routes, "
                "[The record](../duplex.md#the-record) say how they are counted. Fields are only ever added.",
                _fields(session.as_dict(), SESSION),
                "## Each of `sinks`",
                _fields(sink.as_dict(), SINK),
            ]
        )
        + "\n"
    )


def _fields(full: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """A row for each field of a record that has all of them; KeyError for one without words, or words without one."""
    if odd := full.keys() ^ words.keys():
        raise KeyError(
            f"fields of the record and their words in docs/generate.py differ: {', '.join(sorted(odd))}"
        )
    names = {int: "number", float: "number", str: "text", list: "list", dict: "mapping"}
    rows = ["| field | is a | says |", "|---|---|---|"]
    rows += [f"| `{key}` | {names[type(value)]} | {words[key]} |" for key, value in full.items()]
    return "\n".join(rows)


PAGES: Mapping[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "commands.md": commands,
    "record.md": record,
}


def main(check: bool) -> int:
    """Writes the pages, or says which of them differ; the exit code."""
    stale = []
    for name, make in PAGES.items():
        path, text = HERE / name, make()
        if check and (not path.exists() or path.read_text() != text):
            stale.append(name)
        elif not check:
            path.write_text(text)
    for name in stale:
        print(f"docs/reference/{name} is not what relay says: run python docs/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
