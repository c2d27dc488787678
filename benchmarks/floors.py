"""`python -m benchmarks.floors`: what the bare system calls of each job cost on this machine, as one table.

The loops of floors.c run in the cells of the other benchmarks, in place of a contender: the same load, pins, clock and
account, every byte verified. What relay takes beyond that is its own; by these calls nobody gets below them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import duplex, machine
from .catalogue import catalogue
from .cell import GIB, MIB, Cell
from .contender import Contender, Place, Tool, one
from .load import SOURCE, BenchmarkError, compiled
from .proxies import Proxy
from .series import Result, measured
from .table import aligned
from .trial import Trial, room

CHECKED = 64 * MIB  # bytes that each loop delivers to receivers that compute a digest, before it is timed
BARE = SOURCE.with_name("floors.c")
OWN = Tool("floors.c", "gcc libc6-dev", ("true",), r"^()")  # a contender without tools would be relay


@dataclass(frozen=True)
class Floor:
    """One row: the cell it runs in, by which calls, and the words for floors.c at a place."""

    cell: str
    calls: str
    words: Callable[[Place], list[str]]
    size: int = GIB


def _to(kind: str, ends: tuple[object, ...]) -> list[str]:
    return [f"{kind}:{end}" for end in ends]


def _files(how: str) -> Callable[[Place], list[str]]:
    return lambda p: [how, f"tcp:{p.listen}", *map(str, p.paths)]


def _pipes(place: Place) -> list[str]:
    return ["chain", "-", *_to("fifo", place.fifos)]


def _sendfile(place: Place) -> list[str]:
    return ["sendfile", str(place.file), *_to("tcp", place.ports)]


def _tcp(place: Place) -> list[str]:
    return ["chain", f"tcp:{place.listen}", *_to("tcp", place.ports)]


def _unix(place: Place) -> list[str]:
    return ["chain", f"unix:{place.listen_path}", *_to("unix", place.paths)]


FLOORS = (
    Floor("file-tcp", "sendfile", _sendfile, 2 * GIB),
    Floor("file-8tcp", "sendfile to each", _sendfile, GIB // 2),
    Floor("tcp-4tcp", "splice, tee, splice", _tcp),
    Floor("tcp-16tcp", "splice, tee, splice", _tcp, GIB // 4),
    Floor("pipe-4pipes", "tee, splice", _pipes, 4 * GIB),
    Floor("pipe-4pipes-lent", "tee, splice", _pipes, 4 * GIB),
    Floor("pipe-16pipes", "tee, splice", _pipes, 2 * GIB),
    Floor("pipe-16pipes-lent", "tee, splice", _pipes, 2 * GIB),
    Floor("unix-4unix", "splice, tee, splice", _unix),
    Floor("tcp-file", "recv, write", _files("files")),
    Floor("tcp-file", "recv, write past the page cache", _files("direct")),
    Floor("tcp-3files", "recv, write to each", _files("files"), GIB // 2),
)
HEAD = ["work", "calls", "CPU-s/GiB, or CPU a round trip (min to max)", "GiB/s, or rate"]
PINGS = ("ping-1-64", "ping-100-64", "ping-100-4096", "ping-1000-64")


def rows(
    bare: Path, load: Path, directory: Path, runs: int, size: int | None, say: Callable[[str], None]
) -> Iterator[list[str]]:
    """The rows of streams; the programs are borrowed. Raises BenchmarkError."""
    cells = {cell.name: cell for cell in catalogue()}
    for floor in FLOORS:
        yield _row(floor, cells[floor.cell], Trial(load, cells[floor.cell], directory), bare, runs, size, say)


def _row(
    floor: Floor,
    cell: Cell,
    trial: Trial,
    bare: Path,
    runs: int,
    size: int | None,
    say: Callable[[str], None],
) -> list[str]:
    bytes_a_run = size or floor.size
    room(trial.directory, cell, bytes_a_run)
    loop = Contender(floor.calls, (OWN,), lambda p: one(bare, *floor.words(p)))
    (result,) = measured(replace(cell, contenders=(loop,)), trial, runs, bytes_a_run, say, CHECKED)
    if not result.measured:
        raise BenchmarkError(f"{cell.name}: {result.absent or result.failure}")
    return [cell.title, floor.calls, _net(result), f"{result.rate().median:.2f}"]


def _net(result: Result) -> str:
    """CPU-seconds a GiB, the milliseconds of starting up taken off: median, least and greatest."""
    cpu, off = result.cpu(), result.cpu().median - result.net_cpu()
    return f"{cpu.median - off:.3f} ({cpu.least - off:.3f} to {cpu.greatest - off:.3f})"


def pings(
    bare: Path, load: Path, talk: Path, directory: Path, runs: int, milliseconds: int
) -> Iterator[list[str]]:
    """The rows of conversations."""
    proxy = Proxy("bare", None, lambda _own, listen, to: [str(bare), "proxy", f"tcp:{listen}", f"tcp:{to}"])
    trials = duplex.Trials(load, talk, directory, milliseconds)
    for job in duplex.JOBS:
        if job.name not in PINGS:
            continue
        found = [trials.run(job, proxy) for _ in range(runs)]
        cpu = [run["cpu"] for run in found]
        rate = statistics.median(run["rate"] for run in found)
        spread = f"{statistics.median(cpu):.1f} us ({min(cpu):.1f} to {max(cpu):.1f})"
        yield [job.title, "epoll_wait, recv, send", spread, f"{rate:.0f} round trips/s"]


def report(runs: int, size: int | None, milliseconds: int, directory: Path | None) -> str:
    """The whole table as Markdown. Raises BenchmarkError."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with (
        compiled() as load,
        compiled(BARE) as bare,
        compiled(duplex.TALK) as talk,
        tempfile.TemporaryDirectory(prefix="relay-bench-", dir=directory) as name,
    ):
        about = machine.line(machine.description(Path(name)))
        found = list(rows(bare, load, Path(name), runs, size, say))
        found += pings(bare, load, talk, Path(name), runs, milliseconds)
    return "\n".join([f"Machine: {about}", "", *aligned(HEAD, found), ""])


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 0, or 2 when something could not be measured."""
    parser = argparse.ArgumentParser("python -m benchmarks.floors", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (5)")
    parser.add_argument("--mib", type=int, help="MiB a run, for every job (default: what suits it)")
    parser.add_argument("--milliseconds", type=int, default=1000, help="how long a run of messages lasts")
    parser.add_argument("--directory", type=Path, help="where files are made")
    options = parser.parse_args(arguments)
    try:
        size = None if options.mib is None else options.mib * MIB
        print(report(options.runs, size, options.milliseconds, options.directory))
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
