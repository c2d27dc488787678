"""`python -m benchmarks`: every cell, or those asked for, as Markdown on stdout; progress on stderr."""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from . import machine, plots, table
from .catalogue import catalogue
from .cell import MIB, Cell
from .load import BenchmarkError, compiled
from .series import measured
from .trial import Trial, room

LEAST_RUNS = 5  # below that a median says little


def main(arguments: list[str] | None = None) -> int:
    """Runs the cells; 0 if all present delivered, 1 if a contender failed, 2 if nothing was measured."""
    options = _parser().parse_args(arguments)
    cells = _chosen(options.only)
    if options.receivers:
        cells = [replace(cell, receivers=options.receivers) for cell in cells]
    if not cells:
        names = ", ".join(cell.name for cell in catalogue())
        print(f"benchmarks: no cell is called {', '.join(options.only)}; there are: {names}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{cell.name:28}{cell.title}" for cell in cells))
        return 0
    if options.plot is not None:
        options.plot.mkdir(parents=True, exist_ok=True)
    try:
        return _report(options, cells)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _report(options: argparse.Namespace, cells: list[Cell]) -> int:
    parts, raws, failed = [], [], False
    with (
        compiled() as load,
        tempfile.TemporaryDirectory(prefix="relay-bench-", dir=options.directory) as name,
    ):
        directory = Path(name)
        about = machine.description(directory)
        for cell in cells:
            size = options.size or cell.size
            room(directory, cell, size)
            trial = Trial(load, cell, directory)
            results = measured(cell, trial, options.runs, size, _say)
            failed = failed or any(result.failure for result in results)
            parts.append(table.markdown(cell, size, options.runs, results))
            raws.append(table.raw(cell, size, options.runs, results))
    command = _command(options)
    header = f"Machine: {machine.line(about)}\n\nRepeat with `{command}`.\n"
    document = {"machine": about, "command": command, "cells": raws}
    drawn = plots.draw(document, options.plot) if options.plot is not None else []
    text = "\n".join([header, *plots.pictures(drawn, options.markdown, parts)])
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


def _command(options: argparse.Namespace) -> str:
    """What repeats this run on any machine: nothing of where files went here."""
    words = ["python", "-m", "benchmarks", "--runs", str(options.runs)]
    for pattern in options.only:
        words += ["--only", pattern]
    if options.size:
        words += ["--size", f"{options.size // MIB}MiB" if options.size % MIB == 0 else str(options.size)]
    if options.receivers:
        words += ["--receivers", options.receivers]
    return shlex.join(words)


def _chosen(patterns: list[str]) -> list[Cell]:
    return [c for c in catalogue() if not patterns or any(fnmatch.fnmatch(c.name, p) for p in patterns)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bytes(text: str) -> int:
    """Bytes from `256MiB`, `1GiB`, `65536`."""
    found = re.fullmatch(r"(\d+)(KiB|MiB|GiB)?", text)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 256MiB, 1GiB or a number of bytes")
    return int(found[1]) * {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[found[2]]


def _runs(text: str) -> int:
    if not text.isdecimal() or int(text) < LEAST_RUNS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs of at least {LEAST_RUNS}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="relay against its peers, in turn")
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NAME", help="a cell or a pattern (tcp*); repeatable")
    add("--runs", type=_runs, default=LEAST_RUNS, help=f"timed runs each (default and least: {LEAST_RUNS})")
    add("--size", type=_bytes, help="bytes a run for every cell (default: what suits the cell)")
    add(
        "--receivers",
        choices=["discard", "read"],
        help="drop in the kernel, or copy first",
    )
    add("--directory", type=Path, help="where files and fifos are made (default: the temporary directory)")
    add("--json", type=Path, metavar="FILE", help="write every run there")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    add("--plot", type=Path, metavar="DIR", help="draw the bars of each cell, and of all ratios, there (SVG)")
    add("--list", action="store_true", help="name the cells and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
