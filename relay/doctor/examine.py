"""The whole examination, for people and for programs."""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

from relay import __version__
from relay.bench import circumstances
from relay.doctor import path
from relay.doctor.ability import Ability, abilities, sandbox
from relay.doctor.path import Found
from relay.errors import RelayError

SECONDS: Final = 0.02  # for how long each row of the matrix is timed
AT_ONCE: Final = 8  # rows whose references are counted
ENDS: Final = {"pipe", "unix socket", "tcp on loopback"}  # without them there is no path to try
MARKS: Final = {"yes": "ok  ", "less": "less", "no": "no  "}


def doctor(*, as_json: bool = False, seconds: float = SECONDS, out: IO[str] | None = None) -> int:
    """Examines, prints, and returns 0, or 1 when something that relay needs is missing.

    Call it while the process has no threads: it forks. RelayError where nothing can be written to.
    """
    out = out or sys.stdout
    able = abilities()
    matrix: list[Found] = []
    failures: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="relay-doctor-") as name:
            about = circumstances.description(Path(name))
            for source, to, way in path.cells():
                if ENDS.intersection(missing(able)):
                    break
                try:
                    matrix.append(path.examine(source, to, way, Path(name), seconds))
                except (RelayError, OSError) as error:
                    failures.append(f"{source} to {to} by {way}: {error}")
            if "seals" not in [one.name for one in able if one.state == "no"]:
                matrix = _with_references(matrix, Path(name), failures)
    except OSError as error:
        raise RelayError(f"making files to try things with: {error}", hint="set TMPDIR") from error
    if as_json:
        document: dict[str, Any] = {
            "machine": {**about, "relay": __version__, "sandbox": sandbox()},
            "abilities": [one.as_dict() for one in able],
            "matrix": [row.as_dict() for row in matrix],
            "failures": failures,
        }
        print(json.dumps(document, indent=1), file=out)
    else:
        print(as_text(about, able, matrix, failures), file=out)
    return 1 if missing(able) else 0


def _with_references(matrix: list[Found], directory: Path, failures: list[str]) -> list[Found]:
    """The second evidence of each row, all at once: what it takes is waiting. No child is made from here on."""

    def second(row: Found) -> Found | str:
        try:
            return path.references(row, directory)
        except (RelayError, OSError) as error:
            return f"{row.source} to {row.to} by {row.way}: {error}"

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(second, matrix))
    except RuntimeError:  # no thread is to be had, which is a line of its own
        return matrix
    failures += [said for said in found if isinstance(said, str)]
    return [row for row in found if isinstance(row, Found)]


def missing(able: list[Ability]) -> list[str]:
    """What relay cannot do without and does not have."""
    return [one.name for one in able if one.needed and one.state == "no"]


def as_text(about: dict[str, str], able: list[Ability], matrix: list[Found], failures: list[str]) -> str:
    """For people: what works, the matrix, what went wrong."""
    filters = sandbox()
    lines = [f"relay {__version__}; {circumstances.line(about)}" + f" Within {filters}." * bool(filters), ""]
    wide = max(len(one.name) for one in able)
    for one in able:
        tail = f"; {one.hint}" if one.hint and one.state != "yes" else ""
        must = " (needed)" if one.needed and one.state == "no" else ""
        lines.append(f"{MARKS[one.state]}  {one.name:{wide}}  {one.said}{must}{tail}")
    lines += ["", "from    to       way                result  refs    GB/s  CPU-s/GB"]
    for row in matrix:
        figures = row.why if row.gb_s is None else f"{row.gb_s:6.2f}  {row.cpu_s_per_gb:8.3f}"
        lines.append(
            f"{row.source:7} {row.to:8} {row.way:18} {row.result:7} {row.references or '-':5} {figures}".rstrip()
        )
    lines += [
        "",
        "shared: what arrives are the same pages, a later change shows through. copied: it does not.",
        "refs: whether the kernel counts references to the origin's pages when they have arrived (held) or not (none).",
    ]
    lines += [f"failed: {failure}" for failure in failures]
    if lacking := missing(able):
        lines.append(f"relay cannot run here without: {', '.join(lacking)}")
    return "\n".join(lines)
