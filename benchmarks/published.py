"""What a page says, read back from its tables: its pictures, and the few figures that README shows.

    python -m benchmarks.published docs/benchmarks.md README.md

Both are of what is published, so they never say anything else than the tables beside them, whenever each was made.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plots
from .catalogue import catalogue
from .table import END, HEAD, aligned, put

PICTURES = "plots"  # the directory beside the page
JOBS = "both-ways"
SHOWN = (
    "tcp-4tcp",
    "tcp-16tcp",
    "file-tcp",
    "file-8tcp",
    "pipe-4pipes",
    "unix-4unix",
    "tcp-file",
    "tcp-3files",
)
SHOWN_JOBS = {
    "One bulk stream": "One bulk stream, both ways",
    "Ping-pong of 64 B over 1000 connections": "Ping-pong of 64 B over 1000 connections",
    "New connections, one question of 64 B each": "New connections, one question of 64 B each",
    "5,000 idle connections": "5,000 idle connections: memory",
}
HEADLINE = ["work", "speed, by the fastest other", "CPU, by the cheapest other"]


@dataclass(frozen=True)
class Job:
    """A row of the table of jobs both ways: relay by the best peer; `rate` is None where none was measured."""

    title: str
    cost: float
    rate: float | None


def part(page: str, name: str) -> str:
    """What stands in a table's place; empty where the page has none."""
    _before, _found, rest = page.partition(f"<!-- table: {name} -->")
    return rest.partition(END)[0]


def rows_of(page: str, name: str) -> list[list[str]]:
    """The cells of a page's table, its head first; empty where there is none."""
    rows = [line for line in part(page, name).splitlines() if line.startswith("|")]
    cut = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return [cells for cells in cut if not set("".join(cells)) <= {"-", ":"}]


def cells(page: str) -> Iterator[dict[str, Any]]:
    """Each cell that the page has contenders of, as plots.draw takes it."""
    head = [title.strip() for title in HEAD[0].strip("|").split("|")]
    for cell in catalogue():
        rows = rows_of(page, cell.name)
        if not rows or rows[0] != head:
            continue
        said = re.findall(
            r"^- (?:Speed|CPU): relay [a-z]+ ([\d.]+) times", part(page, cell.name), re.MULTILINE
        )
        yield {
            "cell": cell.name,
            "title": cell.title,
            "contenders": [_contender(row) for row in rows[1:]],
            **({"said": said} if len(said) == 2 else {}),
        }


def _contender(row: list[str]) -> dict[str, Any]:
    name = row[0].replace("\\|", "|").replace("*", "").replace("`", "")
    if not row[4]:  # absent, or failed
        return {"name": name}
    return {
        "name": name,
        "gib_s": _spread(row[2]),
        "cpu_s_gib": _spread(row[3]),
        "startup_cpu_s": float(row[4]),
        "net_cpu_s_gib": float(row[5]),
    }


def _spread(text: str) -> dict[str, float]:
    median, least, greatest = map(float, re.findall(r"[\d.]+", text))
    return {"median": median, "least": least, "greatest": greatest}


def jobs(page: str) -> list[Job]:
    """The jobs both ways."""
    found = []
    for row in rows_of(page, JOBS)[1:]:
        if re.fullmatch(r"[\d.]+", row[-2]):
            found.append(Job(row[0].partition(":")[0], float(row[-2]), float(row[-1]) if row[-1] else None))
    return found


def headline(page: str) -> str:
    """A table of what relay is beside the best of the others, as far as both were measured."""
    found = {cell["cell"]: cell for cell in cells(page)}
    rows = []
    for name in SHOWN:
        ratios = plots.beside(found[name]) if name in found else None
        if ratios is not None:
            rows.append([found[name]["title"], f"{ratios[0]:.2f} times", f"{ratios[1]:.2f}"])
    for job in jobs(page):
        if job.title in SHOWN_JOBS:
            rate = "" if job.rate is None else f"{job.rate:.2f} times"
            rows.append([SHOWN_JOBS[job.title], rate, f"{job.cost:.2f}"])
    return "\n".join(aligned(HEADLINE, rows))


def draw(page: str, directory: Path) -> list[Path]:
    """Draws the page's tables into `directory`; the paths."""
    directory.mkdir(exist_ok=True)
    drawn = plots.draw({"cells": list(cells(page))}, directory)
    found = jobs(page)
    if found:
        drawn.append(plots.draw_jobs([(job.title, job.cost, job.rate) for job in found], directory))
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Draws the pictures of a page, and writes its few figures into another."""
    parser = argparse.ArgumentParser("python -m benchmarks.published", description=main.__doc__)
    parser.add_argument("page", type=Path, help="the page with the tables; its pictures go beside it")
    parser.add_argument("readme", type=Path, help="the page that shows a few of its figures")
    options = parser.parse_args(arguments)
    text = options.page.read_text()
    written = put(options.readme.read_text(), "headline", headline(text))
    for path in draw(text, options.page.parent / PICTURES):
        print(path)
    options.readme.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
