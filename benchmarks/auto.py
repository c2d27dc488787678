"""`python -m benchmarks.auto`: what `auto` costs beside the best fixed method, cell by cell of `relay bench`.

In a cell auto and every fixed method run in turn, round after round, each time beginning with another of them. All
runs of a cell last equally long; each run of auto is a route of its own that knows nothing, and is counted from its
first bytes on, so what it learns and how is in its figure. Methods that take half as much again as the cheapest in
the first two rounds are left out of the others. The best fixed method is the one with the least median; auto's cost is
divided by its cost in the same round, and the median of these ratios is what counts. Beside it stands the interval
that holds the true median in nine of ten cells. Where that reaches from one side of 1.05 to the other, rounds are
added. After that one long stream shows whether auto changes its mind and what it spends on trying.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from relay.bench.cell import GIB, MIB, Failed, Figures, Method, Outcome, Place, catalogue, hops
from relay.bench.report import size_name
from relay.bench.trial import Bench, Span
from relay.errors import RelayError

from . import machine
from .load import BenchmarkError
from .table import aligned, put

SECONDS: Final = 0.12  # of a run
LONG: Final = 0.5  # of the stream that shows what auto does in the long run
ROUNDS: Final = 5
MOST: Final = 9  # rounds, where the interval reaches across
MORE: Final = 4  # rounds at a time
LEARNS: Final = 400 * MIB  # bytes of the long stream at the least, if two seconds do for them
FILED: Final = GIB // 2  # bytes that a run writes to files at most, all of them together
WARM: Final = 0.005  # seconds before counting begins: until everything is connected
DEAR: Final = 1.05  # what auto may cost of the best fixed method
OUT: Final = 1.5  # of the cheapest: whoever takes more in LOOKS rounds is not the best, and left out
LOOKS: Final = 2
SURE: Final = 0.9  # of the intervals hold the true median
HOPS: Final[tuple[str, ...]] = ()  # of the page's table: all
WAYS: Final = {"zero-copy": "splice", "copy": "copy"}  # a session record's words, and the methods'
HEAD: Final = [
    "hop, sinks, pieces",
    "best fixed",
    "CPU-s/GiB",
    "auto took",
    "CPU-s/GiB",
    "auto by the best (interval)",
    "rounds",
    "GiB a run",
    "in a long stream: GiB",
    "changes",
    "went another way",
]


@dataclass
class Compared:
    """One cell's runs: `rounds` have the figures by method, with auto in each; `long` is the long stream."""

    place: Place
    rounds: list[dict[Method, Figures]] = field(default_factory=list)
    long: Figures | None = None
    failure: str = ""

    @property
    def name(self) -> str:
        """As its row is called."""
        return f"{self.place.hop}, {self.place.sinks}, {size_name(self.place.size)}"

    def costs(self, method: Method) -> list[float]:
        """CPU-seconds per GiB of the rounds in which it ran."""
        return [found[method].cpu for found in self.rounds if method in found]

    @property
    def fixed(self) -> list[Method]:
        """The methods that ran in every round."""
        first = [m for m in self.rounds[0] if m != "auto"] if self.rounds else []
        return [m for m in first if all(m in found for found in self.rounds)]

    @property
    def judged(self) -> bool:
        """Whether there is something to compare."""
        return not self.failure and bool(self.fixed)

    @property
    def best(self) -> Method:
        """The fixed method with the least median."""
        return min(self.fixed, key=lambda m: statistics.median(self.costs(m)))

    @property
    def ratios(self) -> list[float]:
        """auto by the best, round by round."""
        best = self.best
        return [found["auto"].cpu / found[best].cpu for found in self.rounds]

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true median is."""
        return interval(self.ratios)

    @property
    def straddles(self) -> bool:
        """Whether the interval reaches from one side of what is allowed to the other."""
        low, high = self.interval
        return low <= DEAR < high

    @property
    def dropped(self) -> list[Method]:
        """The methods that are dear beyond doubt."""
        if len(self.rounds) < LOOKS:
            return []
        least = {m: min(self.costs(m)) for m in self.fixed}
        return [m for m, cost in least.items() if cost > OUT * min(least.values())]

    @property
    def measures(self) -> bool:
        """Whether auto may change its mind here."""
        return any(found["auto"].measured for found in self.rounds)

    def took(self) -> str:
        """What auto began with, and ended with where that differs, in most of the runs."""
        return statistics.mode(
            _took(each) for each in [*(found["auto"] for found in self.rounds), *filter(None, [self.long])]
        )

    def why(self) -> str:
        """Where it is too dear: what the cause may be."""
        best, took = self.best, self.took()
        if took == best:
            tried = statistics.median(other_share(found["auto"]) for found in self.rounds)
            return f"the same method, {tried:.1%} of the bytes of these runs went another way"
        if self.measures and best in WAYS.values():
            return f"auto took {took}, {best} is cheaper, which so short a stream does not find out"
        if self.measures:
            return f"auto took {took}, {best} is cheaper, and none of the two ways that it weighs"
        return f"auto took {took}, {best} is cheaper, and it measures nothing there"

    def row(self) -> list[str]:
        """Of the table."""
        if not self.judged:
            return [self.name, self.failure or "nothing to compare with", *[""] * (len(HEAD) - 2)]
        low, high = self.interval
        long = [""] * 3
        if self.long is not None:
            changes = self.long.measured.get("changes", 0)
            long = [f"{self.long.moved / GIB:.2f}", str(changes), f"{other_share(self.long):.2%}"]
        ratio = f"{self.ratio:.2f} ({low:.2f} to {high:.2f})"
        return [
            self.name,
            self.best,
            f"{statistics.median(self.costs(self.best)):.3f}",
            self.took(),
            f"{statistics.median(self.costs('auto')):.3f}",
            ratio if self.ratio <= DEAR else f"**{ratio}**",
            str(len(self.rounds)),
            f"{statistics.median(found['auto'].bytes for found in self.rounds) / GIB:.2f}",
            *long,
        ]

    def raw(self) -> dict[str, Any]:
        """For JSON: every run."""
        return {
            "cell": self.name,
            "failure": self.failure,
            "rounds": [{m: _told(figures) for m, figures in found.items()} for found in self.rounds],
            "long": None if self.long is None else _told(self.long),
        }


def _took(figures: Figures) -> str:
    found = figures.measured
    began, ended = (WAYS.get(found.get(key, ""), figures.used) for key in ("began", "way"))
    return began if began == ended else f"{began}, then {ended}"


def _told(figures: Figures) -> dict[str, Any]:
    return {
        "cpu_s_per_gib": figures.cpu,
        "gib_s": figures.gib_s,
        "bytes": figures.bytes,
        "used": figures.used,
        "measured": figures.measured,
    }


def other_share(figures: Figures) -> float:
    """How much of a stream went another way than the one chosen in the end: samples, and what was before a change."""
    went = figures.measured.get("bytes", {})
    total = sum(went.values())
    return 1 - went.get(figures.measured.get("way"), 0) / total if total else 0.0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The innermost pair of values between which the true median is with SURE probability, whatever its distribution;
    least and greatest where there are too few for that."""
    found, count = sorted(values), len(values)
    inner, outside = 0, 0.0
    for at in range(count // 2):
        outside += 2 * math.comb(count, at) / 2**count
        if 1 - outside < SURE:
            break
        inner = at
    return found[inner], found[-1 - inner]


Run = Callable[[Place, Method, Span], Outcome]


def asked_for(place: Place) -> list[Method]:
    """The methods that one can choose there: a file is lent by `relay send` alone, which has one sink a stream."""
    lent_to_many = place.source == "file" and place.sinks > 1
    return [method for method in place.methods if not (lent_to_many and method == "vmsplice")]


def compared(place: Place, run: Run, span: Span, long: Span, rounds: int, most: int) -> Compared:
    """All of one cell, at least `rounds` and at most `most`; `run` is that of a Bench."""
    cell = Compared(place)
    methods: list[Method] = ["auto", *asked_for(place)]
    while len(cell.rounds) < rounds or (cell.straddles and len(cell.rounds) + MORE <= most):
        for _ in range(rounds if len(cell.rounds) < rounds else MORE):
            methods = _round(cell, methods, run, span)
            if cell.failure or len(methods) == 1:
                return cell
    if cell.measures:
        outcome = _tried(run, place, "auto", long)
        cell.long = outcome if isinstance(outcome, Figures) else None
    return cell


def _round(cell: Compared, methods: list[Method], run: Run, span: Span) -> list[Method]:
    """All methods once, beginning with another one than the last round; those that the next one is for."""
    turn = len(cell.rounds) % len(methods)
    found: dict[Method, Figures] = {}
    for method in [*methods[turn:], *methods[:turn]]:
        outcome = _tried(run, cell.place, method, span)
        if isinstance(outcome, Figures):
            found[method] = outcome
        elif isinstance(outcome, Failed):
            cell.failure = f"failed: {method}: {outcome.reason}"
            return methods
    cell.rounds.append({method: found[method] for method in methods if method in found})
    dropped = cell.dropped
    return [method for method in cell.rounds[-1] if method not in dropped]


def _tried(run: Run, place: Place, method: Method, span: Span) -> Outcome:
    """One run; once more where it failed, which a connection on a busy machine does now and then."""
    try:
        return run(place, method, span)
    except RelayError:
        pass
    try:
        return run(place, method, span)
    except RelayError as error:
        return Failed(str(error))


def table(cells: Sequence[Compared], span: Span) -> str:
    """Markdown: how it was run, a row a cell, and what they say."""
    lines = [
        f"Runs of {span.seconds:g} s in turn (files: {span.filed // MIB} MiB at most), each of auto on a route of its "
        "own and counted from its first bytes on; relay on one CPU, its load on another. Bold: more than 5 % dearer.",
        "",
        *aligned(HEAD, [cell.row() for cell in cells]),
        "",
        *(f"- {said}" for said in sentences(cells)),
    ]
    return "\n".join(lines) + "\n"


def sentences(cells: Sequence[Compared]) -> Iterator[str]:
    """What the table says: how many are within 5 %, how far the figures can be trusted, every loss, the samples."""
    judged = [cell for cell in cells if cell.judged]
    for cell in cells:
        if not cell.judged:
            yield f"{cell.name}: {cell.failure or 'nothing to compare with'}"
    if not judged:
        return
    over = sorted((cell for cell in judged if cell.ratio > DEAR), key=lambda cell: -cell.ratio)
    sure = sum(cell.interval[0] > DEAR for cell in over)
    below = sum(cell.interval[1] <= DEAR for cell in judged)
    same = [cell.ratio for cell in judged if not cell.measures and cell.took() == cell.best]
    if same:
        yield (
            f"In {len(same)} cells auto is the best fixed method from the first byte to the last, and measures "
            f"nothing. Their ratios, {min(same):.2f} to {max(same):.2f}, are those of one thing with itself."
        )
    streams = [cell for cell in judged if cell.long is not None]
    if streams:
        changes = [int(cell.long.measured.get("changes", 0)) for cell in streams if cell.long is not None]
        shares = [other_share(cell.long) for cell in streams if cell.long is not None]
        yield (
            f"Of {len(streams)} long streams {changes.count(0)} never changed their way, {changes.count(1)} once, "
            f"{sum(count > 1 for count in changes)} more often; of their bytes {statistics.median(shares):.2%} "
            f"(median) to {max(shares):.2%} went another way than the one chosen in the end."
        )
    for cell in over:
        doubt = "" if cell.interval[0] > DEAR else ", within the noise"
        yield f"{cell.name}: {cell.ratio:.2f} times the best{doubt}: {cell.why()}."
    worst = max(judged, key=lambda cell: cell.ratio)
    yield (
        f"**{len(judged)} cells: auto is within 5 % of the best fixed method in {len(judged) - len(over)} ({below} "
        f"of them beyond doubt) and dearer in {len(over)} ({sure} beyond doubt). The worst is {worst.name}, "
        f"{worst.ratio:.2f} times: {worst.why()}.**"
    )


def measured(
    directory: Path,
    only: Sequence[str],
    span: Span,
    long: Span,
    rounds: int,
    most: int,
    say: Callable[[str], None],
) -> list[Compared]:
    """All cells of the hops in `only`, or of all; `say` is told of each."""
    places = catalogue(only)
    bench = Bench(directory, span.seconds, lambda: False)
    try:
        cells = []
        for number, place in enumerate(places, start=1):
            cells.append(cell := compared(place, bench.run, span, long, rounds, most))
            said = f"{cell.ratio:.2f} of {cell.best}" if cell.judged else cell.failure
            say(f"auto: {number} of {len(places)}: {cell.name}: {said}")
        return cells
    finally:
        bench.close()


def spans(seconds: float, long: float, filed: int = FILED) -> tuple[Span, Span]:
    """Of the runs and of the long stream."""
    learns = LEARNS if long >= LONG else MIB
    return Span(seconds, WARM, filed, alone=True), Span(long, WARM, 8 * filed, learns, alone=True)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0, 1 if a method failed, 2 for wrong usage."""
    parser = argparse.ArgumentParser("python -m benchmarks.auto", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", choices=hops(), action="append", default=[], metavar="FROM-TO", help="a hop"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a run ({SECONDS})")
    parser.add_argument("--long", type=float, default=LONG, help=f"seconds of the long stream ({LONG})")
    parser.add_argument("--runs", type=int, default=ROUNDS, help=f"rounds at the least ({ROUNDS})")
    parser.add_argument("--most", type=int, default=MOST, help=f"and at the most ({MOST})")
    parser.add_argument("--directory", type=Path, help="where files and fifos are made")
    parser.add_argument("--json", type=Path, help="every run there")
    parser.add_argument("--page", type=Path, help="a page of Markdown that the table is put into")
    options = parser.parse_args(arguments)
    span, long = spans(options.seconds, options.long)
    try:
        if options.page is not None:
            put(options.page.read_text(), "auto", "")  # to find out later that it has no place would be late
        with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=options.directory) as own:
            print(f"Machine: {machine.line(machine.description(Path(own)))}\n", flush=True)
            cells = measured(
                Path(own), options.only, span, long, options.runs, options.most,
                lambda text: print(text, file=sys.stderr, flush=True),
            )  # fmt: skip
        text = table(cells, span)
        print(text)
        if options.page is not None:
            options.page.write_text(put(options.page.read_text(), "auto", text))
        if options.json is not None:
            options.json.write_text(json.dumps([cell.raw() for cell in cells], indent=1) + "\n")
    except (BenchmarkError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return int(any(cell.failure for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
