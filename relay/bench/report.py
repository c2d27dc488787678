"""What was measured, for people (tables), for programs (JSON) and for the eye (bars)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

from relay.bench.cell import KIB, MIB, Denied, Failed, Figures, Kind, Method, Outcome, Row
from relay.charts import Bar, Chart, Group

METHODS: Final[tuple[Method, ...]] = ("splice", "sendfile", "vmsplice", "copy")
DEAR: Final = 1.05  # auto may cost this much of the best fixed method before it is worth a word


@dataclass(frozen=True)
class Table:
    """Cells of text under heads, most of them figures; `bold` are the places (row, column) to be stressed."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()
    left: int = 0  # so many columns are words, not figures

    def plain(self) -> str:
        """Aligned text."""
        lines = [self.heads, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.heads))]
        made = [
            "  ".join(
                word.ljust(wide) if i < self.left else word.rjust(wide)
                for i, (word, wide) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *made]) + "\n"


def size_name(size: int) -> str:
    """512 B, 64 KiB, 1 MiB."""
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB" if size >= KIB else f"{size} B"


def figure(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def _three(outcome: Outcome | None) -> tuple[str, str, str]:
    if isinstance(outcome, Figures):
        return figure(outcome.gib_s), figure(outcome.cpu), f"{outcome.calls:.0f}"
    return ("", {Denied: "denied", Failed: "failed"}.get(type(outcome), ""), "")


def by_hop(rows: Sequence[Row]) -> dict[tuple[Kind, Kind], list[Row]]:
    """Rows of each hop, in their order."""
    found: dict[tuple[Kind, Kind], list[Row]] = {}
    for row in rows:
        found.setdefault((row.place.source, row.place.to), []).append(row)
    return found


def hop_table(source: Kind, to: Kind, rows: Sequence[Row]) -> Table:
    """One hop: a row for each number of sinks and each size, three columns a method; the least CPU is bold."""
    methods = [m for m in METHODS if any(m in row.outcomes for row in rows)]
    heads = ["sinks", "pieces"]
    for method in methods:
        heads += [f"{method} GiB/s", "CPU-s/GiB", "calls/GiB"]
    lines: list[tuple[str, ...]] = []
    bold: set[tuple[int, int]] = set()
    for number, row in enumerate(rows):
        cells = [str(row.place.sinks), size_name(row.place.size)]
        for method in methods:
            cells += _three(row.outcomes.get(method))
        fixed = row.fixed()
        if fixed:
            least = min(fixed, key=lambda m: fixed[m].cpu)
            bold.add((number, 3 + 3 * methods.index(least)))
        lines.append(tuple(cells))
    return Table(f"{source} to {to}", tuple(heads), tuple(lines), frozenset(bold))


def auto_table(rows: Sequence[Row]) -> Table:
    """What auto chose at each place, and the CPU of every other method by that of the choice."""
    methods = [m for m in METHODS if any(m in row.outcomes for row in rows)]
    lines = []
    for row in rows:
        auto = row.figures("auto")
        if auto is None:
            continue
        wrong = row.wrong()
        place = row.place
        lines.append(
            (
                f"{place.source} to {place.to}", str(place.sinks), size_name(place.size), auto.used,
                *_three(auto),
                *(f"{wrong[m]:.2f} x" if m in wrong else "chosen" if m == auto.used else "" for m in methods),
            )
        )  # fmt: skip
    heads = (
        "hop",
        "sinks",
        "pieces",
        "chose",
        "GiB/s",
        "CPU-s/GiB",
        "calls/GiB",
        *(f"{m} costs" for m in methods),
    )
    return Table(
        "What auto chose, and the CPU that each other method would have cost", heads, tuple(lines), left=4
    )


def sentences(rows: Sequence[Row]) -> list[str]:
    """What went wrong, what is denied, and where auto's choice was not the cheapest."""
    said: dict[str, None] = {}
    for row in rows:
        for tried, outcome in row.outcomes.items():
            if isinstance(outcome, Denied):
                said[f"{tried} is denied on {row.place.source} to {row.place.to}: {outcome.reason}"] = None
            elif isinstance(outcome, Failed):
                said[f"failed: {outcome.reason}"] = None
    judged = [row for row in rows if row.figures("auto") and row.fixed()]
    bad: list[tuple[float, Row, Method, str]] = []
    for row in judged:
        auto, fixed = row.figures("auto"), row.fixed()
        best = min(fixed, key=lambda m: fixed[m].cpu)
        if auto is not None and auto.used != best and auto.cpu > DEAR * fixed[best].cpu:
            bad.append((auto.cpu / fixed[best].cpu, row, best, auto.used))
    bad.sort(key=lambda item: -item[0])
    if judged:
        said[
            f"auto chose another method than the cheapest, at more than {DEAR - 1:.0%} above it, in {len(bad)} of "
            f"{len(judged)} places"
        ] = None
    for ratio, row, best, used in bad[:5]:
        place = row.place
        said[
            f"  {place.source} to {place.sinks} {place.to}, {size_name(place.size)}: {used} costs {ratio:.2f} times "
            f"what {best} does"
        ] = None
    return list(said)


def document(machine: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """For JSON."""
    return {
        "machine": machine,
        "cells": [cell for row in rows for cell in row.cells()],
        "auto": [told for row in rows if (told := row.auto()) is not None],
    }


def charts(rows: Sequence[Row]) -> list[Chart]:
    """A panel a hop: CPU of each method and of auto, group by group."""
    made = []
    for (source, to), of_hop in by_hop(rows).items():
        groups = []
        for row in of_hop:
            bars = tuple(
                Bar(method, f.cpu, f"{figure(f.cpu)} ({figure(f.gib_s)})")
                for method in (*METHODS, "auto")
                if (f := row.figures(method)) is not None
            )
            if bars:
                place = row.place
                groups.append(Group(f"{place.sinks} x {size_name(place.size)}", bars))
        if groups:
            made.append(
                Chart(
                    f"{source} to {to}",
                    tuple(groups),
                    "CPU-s/GiB (GiB/s); each group to its own scale",
                    "group",
                )
            )
    return made


def show(about: str, rows: Sequence[Row], out: IO[str] | None = None) -> None:
    """Prints it all: with colour and lines on a terminal, as aligned text elsewhere."""
    out = out or sys.stdout
    tables = [hop_table(source, to, of_hop) for (source, to), of_hop in by_hop(rows).items()]
    tables.append(auto_table(rows))
    said = sentences(rows)
    if not out.isatty():
        print("\n".join([about, "", *(table.plain() for table in tables), *said]), file=out)
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(file=out, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    console.print(about, markup=False)
    for table in tables:
        made = RichTable(title=table.title, title_justify="left")
        for number, head in enumerate(table.heads):
            made.add_column(head, justify="left" if number < table.left else "right")
        for y, line in enumerate(table.rows):
            made.add_row(
                *(f"[bold]{word}[/bold]" if (y, x) in table.bold else word for x, word in enumerate(line))
            )
        console.print(made)
    for sentence in said:
        console.print(sentence, markup=False)
