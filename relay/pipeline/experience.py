"""What the streams of one route found out about its two ways, for those that come after them.

Theory of operation. A trial needs some hundred MiB before it, so a route whose connections are short would never try
anything if each began anew. Streams of one route between ends of the same kinds share one balance instead: the way in
force, what each way cost, and what may be spent on trying, for which the bytes of all count. One of them at a time
tries the other way, and while it does nobody else's samples count: a pair compares a stream with itself. Only where a
stream is too short for a pair it is compared with the one before it. An engine keeps it for its own pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from relay.engine import Engine
from relay.pipeline.balance import COPY, LEAST, MIB, OWN, Balance, Way

WAITS: Final = 256 * MIB  # bytes of a route without a word from the one that tries: it is not waited for
COUNTS: Final = MIB  # bytes of a sample that its stream's end cut short: with fewer it says nothing


@dataclass
class Experience:
    """`fed` bytes came in all. `trier` is the stream that tries the other way, or compares it with its own."""

    balance: Balance
    fed: int = 0
    trier: object = None
    seen: bool = False  # how large the first pieces were
    _since: int = 0  # fed when it was heard of last
    _last: object = None  # whose sample of the way in force was the last

    @classmethod
    def of(
        cls, engine: Engine, route: str, source: str, sinks: Sequence[str], way: Way, expected: float
    ) -> Experience:
        """What is known on `engine` of streams of that route from and to ends of those schemes; at first only that
        they begin by `way`, and that the other one is `expected` to cost so many times as much."""
        key = (Experience, route, source, tuple(sinks))
        # the threads that write files tell by whole loads, of which it takes some
        least = OWN if "file" in sinks else LEAST
        usual = COPY * (1 + len(sinks)) if way == "chain" else math.inf
        found: Experience = engine.shared.setdefault(key, cls(Balance(way, expected, least, usual)))
        return found

    def begins(self, who: object) -> Way:
        """The way on which the stream `who` begins."""
        way, _size = self.balance.next(self.fed)
        if way == self.balance.way or not self._may(who):
            return self.balance.way
        self._tries(who)
        return way

    def next(self, who: object) -> tuple[Way, int]:
        """The way that `who` measures next, and over how many bytes."""
        way, size = self.balance.next(self.fed)
        if way == self.balance.way:
            return way, size
        if not self._may(who):
            return self.balance.way, self.balance.own
        self._tries(who)
        return (way, size) if self._last is who else (self.balance.way, self.balance.own)

    def came(self, size: int, *, tried: bool) -> None:
        """So many bytes more, and whether they went the other way to try that."""
        self.fed += size
        if tried:
            self.balance.spent(size)

    def measured(self, who: object, way: Way, cost: float) -> None:
        """`who` measured, in CPU nanoseconds a byte."""
        own = way == self.balance.way
        if own:
            if not self._may(who):
                return
            self._last = who
        elif self.trier is not who:
            return  # the others changed their mind, and it did not hear of that so far
        self._since = self.fed
        self.balance.measured(way, cost)
        if not own and not self.balance.trying:
            self.trier = None

    def gave_up(self, who: object) -> None:
        """`who` could not change its way."""
        if self._may(who):
            self.balance.gave_up(self.fed)
            self.trier = None

    def leaves(self, who: object) -> None:
        """The stream `who` is over."""
        if self._last is who:
            self._last = None
        if self.trier is who:  # whoever comes next goes on where it stopped
            self.trier = None

    def _may(self, who: object) -> bool:
        if self.trier is not who and self.fed - self._since >= WAITS:
            self.trier = None
        return self.trier in (None, who)

    def _tries(self, who: object) -> None:
        self.trier, self._since = who, self.fed
