"""All runs of one cell: contenders in turn, round after round, so that whatever the machine does hits all of them alike."""

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


def measured(cell: Cell, trial: Trial, runs: int, size: int, say: Callable[[str], None]) -> list[Result]:
    """Runs the cell: one verification and one warm-up each, then `runs` timed rounds. A failure drops its contender."""
    results = [Result(contender) for contender in cell.contenders]
    for result in results:
        try:
            result.version = result.contender.version()
        except LookupError as error:
            result.absent = str(error)
            say(f"{cell.name}: {result.contender.name} is left out: {error}")
    checked = min(size, VERIFIED) + ODD
    digest = trial.digest(checked)

    def attempt(result: Result, what: str, action: Callable[[], None]) -> None:
        if result.absent or result.failure:
            return
        try:
            action()
        except BenchmarkError as error:
            result.failure = f"{what}: {error}"
            say(f"{cell.name}: {result.contender.name} failed, {result.failure}")

    for result in results:
        contender = result.contender
        attempt(result, "verification", lambda c=contender: trial.verify(c, checked, digest))  # type: ignore[misc]
    say(f"{cell.name}: {sum(not (r.absent or r.failure) for r in results)} contenders deliver what was sent")
    for number in range(runs + 1):
        for result in results:
            contender = result.contender

            def timed(
                result: Result = result, contender: Contender = contender, number: int = number
            ) -> None:
                run = trial.run(contender, size)
                if number > 0:  # round 0 warms caches and branch predictors
                    result.runs.append(run)

            attempt(result, f"round {number}", timed)
        say(f"{cell.name}: round {number} of {runs} done" + (" (warm-up)" if number == 0 else ""))
    for _ in range(runs):
        for result in results:
            contender = result.contender
            attempt(result, "empty stream", lambda r=result, c=contender: r.empty.append(trial.run(c, 0)))  # type: ignore[misc]
    return results
