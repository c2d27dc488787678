"""What a sending shows while it runs and when each sink has ended: bars, plain lines, JSON lines, or nothing.

Progress is told how far things are (`Standing`) by whoever asks for it on a timer; it never touches the data
path. Progress goes to stderr; result lines go to `results`, which is stdout unless that is a sink.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from relay.units import show_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

KINDS = ("auto", "bar", "plain", "json", "none")

_SETTLING = 3.0  # seconds over which a rate is averaged


@dataclass(frozen=True)
class Standing:
    """How far one address is: the stream it is given now, and all it is to get. None: not known.

    `bytes` of `total` of the stream `number` of `streams`, begun `seconds` ago; `sent` of `whole` in all.
    """

    address: str
    stream: str
    number: int
    streams: int
    bytes: int
    total: int | None
    sent: int
    whole: int | None
    seconds: float


class Rates:
    """Bytes a second of each address, averaged over the last few seconds."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, int, float]] = {}

    def of(self, key: int, sent: int) -> float:
        """The rate now that `sent` bytes have gone to the address `key`."""
        now = time.monotonic()
        at, before, rate = self._seen.get(key, (now, sent, 0.0))
        gone = now - at
        if gone > 0:
            latest = (sent - before) / gone
            weight = min(1.0, gone / _SETTLING) if rate else 1.0
            rate += (latest - rate) * weight
        self._seen[key] = (now, sent, rate)
        return rate


def seconds_left(standing: Standing, rate: float) -> float | None:
    """How long the rest takes at `rate`; None where that cannot be known."""
    if standing.whole is None or rate <= 0:
        return None
    return max(0.0, (standing.whole - standing.sent) / rate)


def show_seconds(seconds: float) -> str:
    """`4 s`, `3:07`, `1:02:33`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


class Progress:
    """Shows nothing on the way; the others override what they show. Used on one thread."""

    interval: float | None = None  # seconds between two calls of `show`; None: it need not be called

    def __init__(self, results: IO[str]) -> None:
        self._results = results

    def start(self) -> None:
        """Before the first byte."""

    def show(self, standings: Sequence[Standing], *, last: bool = False) -> None:
        """How far every address is; the first call is at the start, the `last` one at the end."""

    def result(self, line: str, fields: Mapping[str, Any]) -> None:
        """A stream has ended at one address: `line` for people, `fields` for programs."""
        del fields
        self.print(line)

    def print(self, line: str) -> None:
        """A line of the results. A reader who went away is no reason to stop sending."""
        try:
            self._results.write(
                f"{line}\n"
            )  # one write: other processes' lines share the terminal or the pipe
            self._results.flush()
        except OSError:
            # what is buffered would fail once more at exit: it goes where nobody minds
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._results.fileno())
                os.close(nowhere)

    def stop(self) -> None:
        """After the last result. Safe to call again."""


class Reported(Progress):
    """A report now and then of each address that is not done."""

    interval: float

    def __init__(self, results: IO[str]) -> None:
        super().__init__(results)
        self._rates = Rates()

    def _moving(self, standings: Sequence[Standing], *, last: bool) -> Iterator[tuple[Standing, float]]:
        """Those worth a report, each with its rate in bytes a second; every rate is looked at all the same."""
        for key, standing in enumerate(standings):
            rate = self._rates.of(key, standing.sent)
            if not last and standing.stream and standing.seconds >= self.interval:
                yield standing, rate


class Lines(Reported):
    """A line a second for each address that is not done."""

    interval = 1.0

    def show(self, standings: Sequence[Standing], *, last: bool = False) -> None:
        """`big.iso -> tcp://...: 120.0 MiB of 1.0 GiB (12%), 60.0 MiB/s, 15 s left`."""
        for standing, rate in self._moving(standings, last=last):
            text = f"{standing.stream} -> {standing.address}: {show_size(standing.bytes)}"
            if standing.total:
                text += f" of {show_size(standing.total)} ({100 * standing.bytes // standing.total}%)"
            text += f", {show_size(rate)}/s"
            left = seconds_left(standing, rate)
            if left is not None:
                text += f", {show_seconds(left)} left"
            if standing.streams > 1:
                text += f", {standing.number} of {standing.streams}"
            say(text)


class JsonLines(Reported):
    """JSON lines on stderr: `progress` for each address every half second, `result` for each stream's end."""

    interval = 0.5

    def show(self, standings: Sequence[Standing], *, last: bool = False) -> None:
        """Sizes in bytes, times in seconds; what is not known is null."""
        for standing, rate in self._moving(standings, last=last):
            left = seconds_left(standing, rate)
            self._say(
                {
                    "event": "progress",
                    "file": standing.stream,
                    "address": standing.address,
                    "bytes": standing.bytes,
                    "total": standing.total,
                    "seconds": round(standing.seconds, 3),
                    "bytes_per_second": round(rate),
                    "seconds_left": None if left is None else round(left, 1),
                    "number": standing.number,
                    "of": standing.streams,
                }
            )

    def result(self, line: str, fields: Mapping[str, Any]) -> None:
        """The result for programs on stderr, for people on stdout if that is no sink."""
        self._say({"event": "result", **fields})
        if self._results is not sys.stderr:
            self.print(line)

    def _say(self, fields: Mapping[str, Any]) -> None:
        say(json.dumps(fields, ensure_ascii=False))


def say(line: str) -> None:
    """A line on stderr, if anybody is there to read it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class Bars(Progress):
    """One bar an address on the terminal, kept at its foot; log lines pass above it.

    Results wait until the bars have stopped if they go to a terminal too: they would tear the bars apart.
    """

    interval = 0.1

    def __init__(self, results: IO[str]) -> None:
        super().__init__(results)
        self._bars: RichProgress | None = None
        self._tasks: list[Any] = []
        self._held: list[str] = []
        self._hold = results.isatty()
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self) -> None:
        """Takes the foot of the terminal."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(file=sys.stderr, force_terminal=True, no_color=bool(os.environ.get("NO_COLOR")))
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            expand=False,
        )
        self._bars.start()
        for handler in logging.getLogger("relay").handlers:
            if isinstance(handler, logging.StreamHandler):
                self._streams.append((handler, handler.setStream(sys.stderr)))  # rich's own by now

    def show(self, standings: Sequence[Standing], *, last: bool = False) -> None:
        """Moves the bars."""
        del last
        bars = self._bars
        if bars is None:
            return
        for standing in standings[len(self._tasks) :]:
            self._tasks.append(bars.add_task(standing.address, total=standing.whole))
        for task, standing in zip(self._tasks, standings, strict=False):
            text = standing.address
            if standing.streams > 1:
                text += f" ({standing.number} of {standing.streams})"
            bars.update(task, description=text, completed=standing.sent, total=standing.whole)
        bars.refresh()

    def result(self, line: str, fields: Mapping[str, Any]) -> None:
        """Holds it back until the bars have stopped, or prints it where the bars are not."""
        if self._hold and self._bars is not None:
            self._held.append(line)
        else:
            super().result(line, fields)

    def stop(self) -> None:
        """Leaves the bars as they are and prints what was held back."""
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams.clear()
        for line in self._held:
            self.print(line)
        self._held.clear()


def make_progress(kind: str, results: IO[str]) -> Progress:
    """What shows progress as `kind` says; auto is bars on a terminal that can move its cursor, else lines."""
    terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    match "bar" if kind == "auto" and terminal else kind:
        case "bar":
            return Bars(results)
        case "json":
            return JsonLines(results)
        case "none":
            return Progress(results)
    return Lines(results)
