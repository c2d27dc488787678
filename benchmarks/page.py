"""`python -m benchmarks.page docs/benchmarks.md`: makes all tables of the page anew and writes them into it.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; what is around it is left alone. Each is written as
soon as it is there, so a run that is broken off has done something. Then the page's pictures are drawn from its tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import auto, duplex, floors, machine, published, start, table
from .catalogue import catalogue
from .cell import GIB, MIB, Cell
from .load import BenchmarkError, compiled
from .proxies import PROXIES, TELLING, THREADS, Proxy
from .series import Result, measured
from .table import aligned, put
from .trial import Trial, room

CHECKED = (
    64 * MIB
)  # bytes that each contender delivers to receivers that compute a digest, before it is timed

# What each cell moves a run: as much as an hour and a half for everything allows.
PINNED = {
    "file-tcp": 12 * GIB,
    "tcp-4tcp": 2 * GIB,
    "pipe-4pipes": 4 * GIB,
    "pipe-4pipes-lent": 24 * GIB,
    "pipe-4pipes-64k": 2 * GIB,
    "tcp-file": 2 * GIB,
    "file-8tcp": 6 * GIB,
    "tcp-16tcp": 256 * MIB,
    "pipe-16pipes": 2 * GIB,
    "pipe-16pipes-lent": 16 * GIB,
    "pipe-16pipes-64k": GIB,
    "unix-4unix": 2 * GIB,
    "unix-4unix-64k": 2 * GIB,
    "tcp-3files": GIB,
}
UNPINNED = {
    "file-tcp-unpinned": 12 * GIB,
    "tcp-4tcp-unpinned": GIB,
    "pipe-4pipes-unpinned": 4 * GIB,
    "tcp-file-unpinned": 2 * GIB,
    "unix-4unix-unpinned": GIB,
}
JOBS = tuple(job for job in duplex.JOBS if job.name not in ("ping-1-4096", "ping-10-64", "ping-10-4096"))
JOBS_UNPINNED = tuple(
    job for job in duplex.JOBS if job.name in ("bulk", "ping-100-64", "ping-1000-64", "connects")
)


@dataclass
class Run:
    """What the tables of one run of everything share: the programs and the directory are borrowed."""

    load: Path
    talk: Path
    bare: Path
    directory: Path
    runs: int
    size: int | None  # for every cell, in place of its own
    milliseconds: int
    raw: dict[str, Any]
    failed: bool = False

    def cell(self, name: str, size: int) -> tuple[Cell, int, list[Result]]:
        """All contenders of one cell, in turn."""
        size = self.size or size
        cell = next(one for one in catalogue() if one.name == name)
        room(self.directory, cell, size)
        results = measured(cell, Trial(self.load, cell, self.directory), self.runs, size, say, CHECKED)
        self.raw[name] = table.raw(cell, size, self.runs, results)
        for result in results:
            if result.failure:
                self.failed = True
                say(f"{name}: {result.contender.name}: {result.failure}")
        return cell, size, results

    def jobs(
        self,
        jobs: tuple[duplex.Job, ...],
        *,
        pinned: bool,
        among: tuple[Proxy, ...] = PROXIES,
    ) -> Iterator[tuple[duplex.Job, Found]]:
        """All proxies of each job, in turn; `found` is by the proxy's name."""
        trials = duplex.Trials(self.load, self.talk, self.directory, self.milliseconds, pinned=pinned)
        here = [proxy for proxy in among if proxy.version() is not None]
        for job in jobs:
            size = min(job.size, self.size or job.size) if job.kind == "bulk" else job.size
            found: Found = {}
            for _number in range(self.runs):
                for proxy in here:
                    if not proxy.does(job.kind):
                        continue
                    try:
                        found.setdefault(proxy.name, []).append(trials.run(replace(job, size=size), proxy))
                    except BenchmarkError as error:
                        self.failed = True
                        say(f"{job.name}: {proxy.name}: {error}")
            say(f"{job.name}: done")
            kind = "" if among is PROXIES else "-in-all"
            self.raw[(job.name if pinned else f"{job.name}-unpinned") + kind] = found
            yield job, {name: runs for name, runs in found.items() if runs}


Found = dict[str, list[dict[str, float]]]


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def _pinned(name: str, size: int) -> Callable[[Run], str]:
    def made(run: Run) -> str:
        cell, moved, results = run.cell(name, size)
        # the page has the headings
        return table.markdown(cell, moved, run.runs, results).split("\n", 2)[2]

    return made


def unpinned(run: Run) -> str:
    """A row a cell: relay, the fastest and the cheapest peer."""
    head = [
        "work, nothing pinned",
        "relay: GiB/s, CPU-s/GiB",
        "fastest peer",
        "cheapest peer",
        "GiB/s",
        "CPU",
    ]
    rows = []
    for name, size in UNPINNED.items():
        cell, _moved, results = run.cell(name, size)
        good = [result for result in results if result.measured]
        ours = next((result for result in good if result.contender.is_relay), None)
        peers = [result for result in good if not result.contender.is_relay]
        if ours is None or not peers:
            rows.append([cell.title, "failed", "", "", "", ""])
            continue
        fast = max(peers, key=lambda result: result.rate().median)
        cheap = min(peers, key=lambda result: result.cpu().median)
        rows.append(
            [
                cell.title.removesuffix(", not pinned"),
                f"{ours.rate().median:.2f}, {ours.cpu().median:.3f}",
                f"`{_escaped(fast)}` {fast.rate().median:.2f}",
                f"`{_escaped(cheap)}` {cheap.cpu().median:.3f}",
                f"{ours.rate().median / fast.rate().median:.2f}",
                f"{ours.cpu().median / cheap.cpu().median:.2f}",
            ]
        )
    return "\n".join(aligned(head, rows))


def _escaped(result: Result) -> str:
    return result.contender.name.replace("|", "\\|")


def _both_ways(jobs: tuple[duplex.Job, ...], *, pinned: bool) -> Callable[[Run], str]:
    def made(run: Run) -> str:
        versions = {proxy: proxy.version() for proxy in PROXIES}
        here = [proxy for proxy in PROXIES if versions[proxy] is not None]
        names = [f"{proxy.name} ({versions[proxy]})" if proxy.tool else proxy.name for proxy in here]
        rows = []
        for job, found in run.jobs(jobs, pinned=pinned):
            key, *more = job.columns
            columns = [*more[:1], key, *[c for c in more[1:] if c[0] == "p99"]]
            row = [f"{job.title}: {', '.join(title for _key, title, _show in columns)}"]
            medians = {
                name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for name, runs in found.items()
            }
            for proxy in here:
                mine = medians.get(proxy.name)
                row.append(", ".join(show(mine[key]) for key, _title, show in columns) if mine else "")
            peers = [medians[name] for name in medians if name != "relay"]
            row += _ratios(medians["relay"], peers) if "relay" in medians else ["failed", "failed"]
            rows.append(row)
        return "\n".join(aligned(["job", *names, "CPU (or memory) by the best", "rate by the best"], rows))

    return made


def _each(job: str, among: tuple[Proxy, ...], *, pinned: bool) -> Callable[[Run], str]:
    """One job, a row a contender."""

    def made(run: Run) -> str:
        wanted = tuple(one for one in duplex.JOBS if one.name == job)
        (found,) = (found for _job, found in run.jobs(wanted, pinned=pinned, among=among))
        return "\n".join(duplex.report(wanted[0], found, {}))

    return made


def _ratios(ours: dict[str, float], peers: list[dict[str, float]]) -> list[str]:
    if not peers:
        return ["", ""]
    least = "rss" if "rss" in ours else "cpu"
    cost = ours[least] / max(min(peer[least] for peer in peers), 1e-9)
    rate = f"{ours['rate'] / max(peer['rate'] for peer in peers):.2f}" if "rate" in ours else ""
    return [f"{cost:.2f}", rate]


def bare(run: Run) -> str:
    """The floors."""
    rows = list(floors.rows(run.bare, run.load, run.directory, run.runs, run.size, say))
    rows += floors.pings(run.bare, run.load, run.talk, run.directory, run.runs, run.milliseconds)
    return "\n".join(aligned(floors.HEAD, rows))


def starts(run: Run) -> str:
    """What starting costs."""
    return start.table(max(run.runs, start.LEAST_RUNS) if run.size is None else run.runs)


def circumstances(run: Run) -> str:
    """The machine, before anything runs."""
    about = machine.description(run.directory)
    run.raw["machine"] = about
    return f"Machine: {machine.line(about)} {time.strftime('%Y-%m-%d', time.gmtime())}, medians of {run.runs} runs."


def chosen(run: Run) -> str:
    """auto beside the best fixed method; of a run that moves next to nothing, two rounds of next to nothing."""
    runs = auto.spans(auto.SECONDS, auto.LONG) if run.size is None else auto.spans(0.001, 0.001, run.size)
    most = auto.MOST if run.size is None else run.runs
    cells = auto.measured(run.directory, auto.HOPS, *runs, run.runs, most, say)
    run.raw["auto"] = [cell.raw() for cell in cells]
    run.failed |= any(cell.failure for cell in cells)
    return auto.table(cells, runs[0])


TABLES: dict[str, Callable[[Run], str]] = {
    "machine": circumstances,
    **{name: _pinned(name, size) for name, size in PINNED.items()},
    "both-ways": _both_ways(JOBS, pinned=True),
    "floors": bare,
    "start": starts,
    "auto": chosen,
    "unpinned": unpinned,
    "both-ways-unpinned": _both_ways(JOBS_UNPINNED, pinned=False),
    "connects-told": _each("connects", TELLING, pinned=True),
    "threads-1": _each("ping-1-64", THREADS, pinned=False),
    "threads-100": _each("ping-100-64", THREADS, pinned=False),
    "threads-1000": _each("ping-1000-64", THREADS, pinned=False),
}


def main(arguments: list[str] | None = None) -> int:
    """Makes the tables; 0, 1 if a contender failed (which is in the table), or 2 when nothing could be made."""
    parser = argparse.ArgumentParser("python -m benchmarks.page", description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, nargs="?", default=Path("docs/benchmarks.md"))
    parser.add_argument("--only", action="append", default=[], choices=list(TABLES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (5)")
    parser.add_argument("--mib", type=int, help="MiB a run for every cell, to try it out")
    parser.add_argument("--milliseconds", type=int, default=1000, help="how long a run of messages lasts")
    parser.add_argument("--directory", type=Path, help="where files and fifos are made")
    parser.add_argument("--json", type=Path, help="every run there")
    parser.add_argument("--list", action="store_true", help="name the tables and stop")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(TABLES))
        return 0
    wanted = [name for name in TABLES if not options.only or name in options.only]
    try:
        page = options.page.read_text()
        for name in wanted:
            put(page, name, "")  # all have a place: to find out later would be late
        with (
            compiled() as load,
            compiled(duplex.TALK) as talk,
            compiled(floors.BARE) as loops,
            tempfile.TemporaryDirectory(prefix="relay-bench-", dir=options.directory) as own,
        ):
            size = None if options.mib is None else options.mib * MIB
            run = Run(load, talk, loops, Path(own), options.runs, size, options.milliseconds, {})
            for name in wanted:
                began = time.monotonic()
                try:
                    made = TABLES[name](run)
                except BenchmarkError as error:
                    run.failed = True
                    say(f"== {name}: {error}")
                    continue
                options.page.write_text(put(options.page.read_text(), name, made))
                say(f"== {name}: written after {time.monotonic() - began:.0f} s")
                if options.json is not None:
                    options.json.write_text(json.dumps(run.raw, indent=1) + "\n")
            published.draw(options.page.read_text(), options.page.parent / published.PICTURES)
    except (BenchmarkError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
