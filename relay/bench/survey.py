"""All cells in turn, then what they came to: what the command runs. See the package's own words for the others."""

from __future__ import annotations

import json
import logging
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from relay import __version__, charts
from relay.bench import circumstances, report
from relay.bench.cell import Denied, Failed, Figures, Method, Outcome, Place, Row, catalogue, hops
from relay.bench.trial import Bench, Interrupted
from relay.errors import RelayError, UsageError, did_you_mean
from relay.kernel.probe import machine

log = logging.getLogger("relay.bench")

SECONDS = 0.016  # each cell is measured so long, after a quarter of that: all of them fit in a minute
ROUNDS = 2  # of which the second is left out wherever the first took too long
SPAN = 45.0  # seconds for all that is asked for, unless rounds are


class Signals:
    """SIGINT and SIGTERM are noted in `number` instead of acted on, from `with` to its end."""

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def survey(
    only: Sequence[str] = (),
    *,
    quick: bool = False,
    seconds: float = SECONDS,
    rounds: int | None = None,
    as_json: bool = False,
    plot: Path | None = None,
    directory: Path | None = None,
) -> int:
    """Measures every place, or those of the hops in `only` (such as tcp-pipe), and prints what came out.

    `seconds` is for how long each cell is measured, `rounds` how often (the median counts, of two the cheaper; None:
    twice where a minute allows), `directory` where files and fifos are made. 0: all went well; 1: a cell failed; 128
    and the number of a signal that ended it. Raises UsageError for a hop or a plot that cannot be, before anything is
    measured. Call it on the main thread.
    """
    places = _chosen(only, quick)
    if plot is not None:
        charts.check(plot)
    with Signals() as signals:
        try:
            with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=directory) as name:
                about = circumstances.description(Path(name))
                rows, pinned = _measured(places, Path(name), seconds, rounds, lambda: bool(signals.number))
        except Interrupted:
            return 128 + signals.number
        except OSError as error:
            raise RelayError(
                f"making files to measure with: {error}", hint="try another --directory"
            ) from error
    refused = {
        call: why for call in ("splice", "tee", "vmsplice", "sendfile") if (why := machine().refused(call))
    }
    told: dict[str, Any] = {
        **about,
        "relay": __version__,
        "pinned": pinned,
        "seconds": seconds,
        "rounds": rounds,
    }
    if as_json:
        print(json.dumps(report.document({**told, "refused": refused}, rows), indent=1))
    else:
        where = "It ran on one CPU, its load on the others." if pinned else "One CPU for relay and its load."
        report.show(f"relay {__version__}; {circumstances.line(about)} {where}", rows)
    if plot is not None:
        try:
            charts.write(
                plot,
                f"relay {__version__}: CPU seconds a GiB, by hop and method",
                report.charts(rows),
                columns=3,
            )
        except OSError as error:
            raise RelayError(f"writing {plot}: {error.strerror}", hint="choose another place") from error
    return 1 if any(row.failed for row in rows) else 0


def _chosen(only: Sequence[str], quick: bool) -> list[Place]:
    for name in only:
        if name not in hops():
            meant = did_you_mean(name, hops()) or f"; there are {', '.join(hops())}"
            raise UsageError(f"no hop is called {name!r}{meant}")
    return catalogue(only, quick=quick)


def _measured(
    places: Sequence[Place], directory: Path, seconds: float, rounds: int | None, stopped: Callable[[], bool]
) -> tuple[list[Row], bool]:
    """Every place in turn; at each, all methods and auto, `rounds` times. And whether relay had a CPU of its own."""
    bench = Bench(directory, seconds, stopped)
    shown = sys.stderr.isatty()
    try:
        rows = []
        began = time.monotonic()
        for number, place in enumerate(places, start=1):
            late = time.monotonic() - began > SPAN * (number - 1) / len(places)
            if shown:
                print(f"\r{number} of {len(places)}: {place.hop:16}", end="", file=sys.stderr, flush=True)
            rows.append(_place(bench, place, rounds or (1 if late else ROUNDS), stopped))
        return rows, bench.pinned
    finally:
        if shown:
            print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
        bench.close()


def _place(bench: Bench, place: Place, rounds: int, stopped: Callable[[], bool]) -> Row:
    runs: dict[Method, list[Outcome]] = {method: [] for method in (*place.methods, "auto")}
    for _ in range(rounds):
        for method, outcomes in runs.items():
            if stopped():
                raise Interrupted
            if not outcomes or isinstance(outcomes[-1], Figures):
                outcomes.append(_outcome(bench, place, method))
    return Row(place, {method: _median(outcomes) for method, outcomes in runs.items()})


def _outcome(bench: Bench, place: Place, method: Method) -> Outcome:
    try:
        return bench.run(place, method)
    except RelayError as error:
        log.warning("%s", error)
        return Failed(str(error))


def _median(outcomes: Sequence[Outcome]) -> Outcome:
    """The run whose CPU is the median; what went wrong goes before it."""
    for outcome in outcomes:
        if isinstance(outcome, Denied | Failed):
            return outcome
    figures = [outcome for outcome in outcomes if isinstance(outcome, Figures)]
    middle = statistics.median_low([one.cpu for one in figures])
    return next(replace(one) for one in figures if one.cpu == middle)
