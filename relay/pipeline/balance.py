"""Which of two ways is cheaper, by measuring while both are at work.

    chain       references: splice and tee
    ring        one copy into memory, one out of it a sink

Theory of operation. A stream begins the way that is expected to be cheaper. From time to time a piece of it goes the
other way, and the CPU time of a byte is compared. The other way is taken when it was cheaper by a margin TAKES
times in a row, each time than the sample just before it: what else the machine does weighs on both. Each change
makes the next one need a larger margin, so two ways that cost the same do not take turns for ever. What may be
spent on trying is a share of the stream: SHARE at first, half of it after each trial that did not pay, and never more
than RARE of it for a way that costs, or is expected to cost, twice as much. When what the way in force costs has
changed a good deal, sizes or sinks have: it is looked at again as at the beginning. Nor is anything expected of a
stream whose references cost more than copies would: its messages are small, and cost much the same either way. So
more of it may be tried, UNKNOWN, by samples that are shorter: it has found out after some 60 MiB.

Pure: what is measured is told to it, it answers what to do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Way = Literal["chain", "ring"]
NAMES: Final[Mapping[Way, str]] = {"chain": "zero-copy", "ring": "copy"}

MIB: Final = 1 << 20
GIB: Final = 1 << 30
OWN: Final = 16 * MIB  # bytes of a sample of the way in force
REST: Final = 7 * OWN  # between two of them, once there are enough: measuring costs, too
TRIAL: Final = 8 * MIB  # bytes of a sample of the other one,
TRIAL_DEAR: Final = MIB  # of one that costs at least
DEAR: Final = 2.0  # times as much,
STAYS: Final = 1.7  # and is dear until it costs less than that: one sample is not like another
COPY: Final = 0.15  # CPU nanoseconds that a copy of a byte takes, more or less
TELLING: Final = 20e6  # CPU nanoseconds of the way in force that tell as much as OWN bytes,
LEAST: Final = 2 * MIB  # though not of fewer: a stream is not from its first bytes on as it will be
SETTLES: Final = MIB // 2  # bytes after a change that are not measured: they fill pipes, windows and caches
OVER: Final = 2 * MIB  # by so much a trial is longer than it was meant to be: until nothing is under way
SHARE: Final = 0.02  # of a stream may go the other way for samples
UNKNOWN: Final = 0.05  # where nothing is expected of the other way
RARE: Final = 0.001  # at the least, and for a dear way at the most
ALIKE: Final = 1.2  # times as much may be what nothing is known of
MARGIN: Final = 0.07  # by so much the other way must be cheaper,
WIDEST: Final = 0.25  # and after some changes by so much,
TAKES: Final = 3  # so many times in a row
ENOUGH: Final = 3  # samples of the way in force before anything is tried
CHANGED: Final = 1.5  # times what it cost: sizes or sinks have changed


def median(samples: deque[float]) -> float:
    """The one in the middle, or the upper of two: the standard library's takes as long to load as a pipeline."""
    return sorted(samples)[len(samples) // 2]


def other(way: Way) -> Way:
    """The one that it is not."""
    return "ring" if way == "chain" else "chain"


@dataclass
class Balance:
    """`way` is in force; `expected` is what the other way is thought to cost, as a multiple of it."""

    way: Way
    expected: float
    least: int = LEAST  # bytes of a sample, however much CPU they take
    usual: float = math.inf  # CPU nanoseconds a byte; what costs more is not what `expected` was thought of
    changes: int = 0
    tried: int = 0
    dear: bool = field(init=False)  # the other way costs much more, as far as is known
    samples: dict[Way, int] = field(default_factory=lambda: {"chain": 0, "ring": 0})
    _costs: dict[Way, deque[float]] = field(
        default_factory=lambda: {"chain": deque(maxlen=5), "ring": deque(maxlen=5)}
    )
    _telling: float = TELLING
    _share: float = field(default_factory=lambda: SHARE)
    _streak: int = 0
    _last: Way | None = None
    _margin: float = MARGIN
    _not_before: int = 0  # bytes that must have come before the next trial
    _then: float = 0.0  # what the way in force cost at the last trial

    def __post_init__(self) -> None:
        self._expect(self.expected, DEAR)

    def _expect(self, expected: float, dear: float) -> None:
        self.expected, self.dear = expected, expected >= dear

    def next(self, fed: int) -> tuple[Way, int]:
        """The way to measure next, and over how many bytes; `fed` have come so far."""
        own = self._costs[self.way]
        if fed < self._not_before:
            return self.way, self.own
        if self._last == other(self.way):  # in pairs: what else the machine does weighs on both alike
            return self.way, self.own
        if self._streak:
            return other(self.way), self.trial
        size = self.trial
        share = min(self._share, RARE) if self.dear else self._share
        if len(own) >= ENOUGH and self.tried + size + SETTLES + OVER * self.dear <= share * fed:
            return other(self.way), size
        return self.way, self.own

    @property
    def pause(self) -> int:
        """Bytes that need not be measured before the next sample of the way in force."""
        if self._streak or len(self._costs[self.way]) < ENOUGH:
            return SETTLES
        return REST * self.own // OWN

    @property
    def trying(self) -> bool:
        """Whether the other way was cheaper the last time, so that it is looked at again."""
        return self._streak > 0

    @property
    def own(self) -> int:
        """Bytes of a sample of the way in force."""
        return max(self._less(OWN), min(self.least, OWN))

    @property
    def trial(self) -> int:
        """Bytes of a sample of the other way."""
        return TRIAL_DEAR if self.dear else max(self._less(TRIAL), min(self.least, TRIAL))

    def _less(self, size: int) -> int:
        """So many bytes, or fewer where they cost so much that fewer tell as much."""
        found = self._costs[self.way]
        cost = median(found) if found else 0.0
        return min(size, int(size * self._telling / (OWN * cost))) if cost else size

    def spent(self, size: int) -> None:
        """So many bytes went the other way that is not in force."""
        self.tried += size

    def measured(self, way: Way, cost: float) -> None:
        """A sample: CPU nanoseconds a byte. One of the other way that follows another such says nothing."""
        if way != self.way and self._last == way:
            return
        self._costs[way].append(cost)
        self.samples[way] += 1
        self._last = way
        if way == self.way:
            own = median(self._costs[way])
            if own > self.usual and not self.samples[other(way)]:
                self._expect(min(self.expected, ALIKE), DEAR)
                self._telling = TELLING / 4
                self._share = max(self._share, UNKNOWN)
            if self._then and not self._then / CHANGED < own < self._then * CHANGED:
                self._share, self._then = SHARE, 0.0
                self._expect(min(self.expected, DEAR - 0.1), DEAR)
            return
        own = self._costs[self.way][-1] if self._costs[self.way] else cost  # measured just before
        if own:
            self._expect(cost / own, STAYS if self.dear else DEAR)
        if cost < own * (1 - self._margin):
            self._streak += 1
            if self._streak >= TAKES:
                self._take()
            return
        self._streak = 0
        self._share = max(self._share / 2, RARE)
        self._then = median(self._costs[self.way]) if self._costs[self.way] else 0.0

    def take(self, way: Way, expected: float) -> None:
        """What is known by now says that `way` is the cheaper one, though nothing was measured; see `expected`."""
        self.way, self.usual = way, math.inf
        self._expect(expected, DEAR)
        self.changes += 1
        self._streak, self._last = 0, None

    def _take(self) -> None:
        before = self.way
        self.way = other(before)
        self.changes += 1
        self._streak = 0
        self._share, self._margin = SHARE / 2, min(self._margin * 2, WIDEST)
        own = median(self._costs[self.way])
        self._expect(median(self._costs[before]) / own, DEAR)
        self._then = own

    def gave_up(self, fed: int) -> None:
        """The other way could not be tried when `fed` bytes had come: nor is it before a good part more has."""
        self._streak = 0
        self._not_before = max(fed + TRIAL, fed * 5 // 4)

    def costs(self) -> dict[str, float]:
        """What each way cost when it was last measured, by its name: CPU-seconds per GiB."""
        return {NAMES[way]: round(median(cost) * GIB / 1e9, 4) for way, cost in self._costs.items() if cost}
