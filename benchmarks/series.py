"""All runs of one cell: contenders in turn, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from .cell import GIB, MIB, Cell
from .contender import Contender
from .load import BenchmarkError
from .trial import Measure, Trial

# Not a multiple of a page, nor of a chunk: the tail of a stream is where bytes get lost.
ODD = 12_345
VERIFIED = 256 * MIB


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the runs."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def overlaps(self, other: Spread) -> bool:
        """Whether some run of the one lies within the runs of the other."""
        return self.least <= other.greatest and other.least <= self.greatest


@dataclass
class Result:
    """What one contender did in one cell: its runs, its runs on nothing, or why there are none."""

    contender: Contender
    version: str = ""
    runs: list[Measure] = field(default_factory=list)
    empty: list[Measure] = field(default_factory=list)
    absent: str = ""
    failure: str = ""

    @property
    def measured(self) -> bool:
        """Whether every run went well."""
        return bool(self.runs) and not self.failure

    def rate(self) -> Spread:
        """GiB of the source stream a second."""
        return Spread.of([run.size / GIB / run.seconds for run in self.runs])

    def cpu(self) -> Spread:
        """CPU seconds for each GiB of the source stream, starting up included."""
        return Spread.of([run.cpu / (run.size / GIB) for run in self.runs])

    def startup(self) -> float:
        """Median CPU seconds of a run on an empty stream."""
        return statistics.median(run.cpu for run in self.empty)

    def net_cpu(self) -> float:
        """CPU seconds a GiB without what starting up takes."""
        return self.cpu().median - self.startup() / (self.runs[0].size / GIB)

    def rss_mib(self) -> float:
        """Largest resident size of any one process, in MiB, over all runs."""
        return max(run.rss_kib for run in self.runs) / 1024

    def foreign(self) -> float:
        """The greatest number of CPUs that other work took during a run."""
        return max(run.foreign / run.elapsed for run in self.runs)


def measured(
    cell: Cell, trial: Trial, runs: int, size: int, say: Callable[[str], None], verified: int = VERIFIED
) -> list[Result]:
    """One verification, of at most `verified` bytes and some, and one warm-up each, then `runs` timed rounds. A failure
    drops its contender."""
    results = [Result(contender) for contender in cell.contenders]
    for result in results:
        try:
            result.version = result.contender.version()
        except LookupError as error:
            result.absent = str(error)
            say(f"{cell.name}: {result.contender.name} is left out: {error}")
    checked = min(size, verified) + ODD
    digest = trial.digest(checked)

    def all_present(what: str, action: Callable[[Result], object]) -> None:
        for result in results:
            if result.absent or result.failure:
                continue
            try:
                action(result)
            except BenchmarkError as error:
                result.failure = f"{what}: {error}"
                say(f"{cell.name}: {result.contender.name} failed, {result.failure}")
        say(f"{cell.name}: {what} done")

    all_present("verification", lambda result: trial.verify(result.contender, checked, digest))
    all_present("warm-up", lambda result: trial.run(result.contender, size))
    for number in range(1, runs + 1):
        all_present(f"round {number} of {runs}", lambda r: r.runs.append(trial.run(r.contender, size)))
    for number in range(1, runs + 1):
        all_present(f"empty round {number} of {runs}", lambda r: r.empty.append(trial.run(r.contender, 0)))
    return results
