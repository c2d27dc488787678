"""What the streams of one route share about its two ways: short ones learn, concurrent ones do not mislead."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from relay.engine import Engine
from relay.pipeline.balance import MIB, OWN, SETTLES, Balance, Way, other
from relay.pipeline.experience import COUNTS, WAITS, Experience

Cost = Callable[[Way], float]


class Stream:
    """One stream of a route, as crossing.py has it cross: it reports when what was to be measured has come."""

    def __init__(self, found: Experience, cost: Cost) -> None:
        self.found, self.cost = found, cost
        self.way = found.begins(self)
        self._trial = self.way != found.balance.way
        self.by: dict[Way, int] = {"chain": 0, "ring": 0}
        self._come = self._untold = 0
        self._sample()

    def _sample(self) -> None:
        own = self.way == self.found.balance.way
        self._until = SETTLES + (OWN if own else self.found.balance.trial)

    def flow(self, size: int) -> None:
        """So many bytes come."""
        while size:
            step = min(size, self._until - self._come)
            self._come += step
            self.by[self.way] += step
            self._untold += step
            size -= step
            if self._come < self._until:
                continue
            self._tell()
            self.found.measured(self, self.way, self.cost(self.way))
            self._come = 0
            way, wanted = self.found.next(self)
            if way == self.way:
                self._until = wanted + (self.found.balance.pause if way == self.found.balance.way else 0)
            else:
                self.way = way
                self._trial = way != self.found.balance.way and self.found.trier is self
                self._sample()

    def _tell(self) -> None:
        self.found.came(self._untold, tried=self._trial and self.way != self.found.balance.way)
        self._untold = 0

    def end(self) -> None:
        """It is over, and what was measured of it counts."""
        self._tell()
        if self._come - SETTLES >= COUNTS:
            self.found.measured(self, self.way, self.cost(self.way))
        self.found.leaves(self)


@pytest.mark.parametrize("size", [4 * MIB, 20 * MIB, 100 * MIB])
@pytest.mark.parametrize("ring", [0.5, 2.0])
def test_short_streams_learn_from_each_other(size: int, ring: float) -> None:
    """None is long enough to try anything by itself: together they find the cheaper way, and try little after that."""
    chance = random.Random(size)
    found = Experience(Balance("chain", 1.5))
    by: dict[Way, int] = {"chain": 0, "ring": 0}
    for _ in range(16 * 1024 * MIB // size):
        stream = Stream(found, lambda way: (ring if way == "ring" else 1.0) * chance.uniform(0.95, 1.05))
        stream.flow(size)
        stream.end()
        for way, count in stream.by.items():
            by[way] += count
    best: Way = "ring" if ring < 1 else "chain"
    assert found.balance.way == best
    assert found.balance.changes == (1 if ring < 1 else 0)
    assert by[other(best)] < (0.15 if ring < 1 else 0.03) * sum(by.values())


@pytest.mark.parametrize("seed", range(8))
def test_streams_at_once_are_not_compared_with_each_other(seed: int) -> None:
    """One costs ten times the other, either way alike: whatever order they report in, nothing changes."""
    chance = random.Random(seed)
    found = Experience(Balance("chain", 1.0))
    cheap, dear = Stream(found, lambda _way: 1.0), Stream(found, lambda _way: 10.0)
    for _ in range(4000):
        chance.choice([cheap, dear]).flow(chance.randrange(1, 32 * MIB))
    assert found.balance.changes == 0
    assert found.balance.tried > 0
    assert found.balance.tried < 0.03 * found.fed


def test_all_streams_follow_when_the_way_changes() -> None:
    """What one found out the others do as well, at their next report."""
    found = Experience(Balance("chain", 1.5))
    streams = [Stream(found, lambda way: 0.5 if way == "ring" else 1.0) for _ in range(3)]
    for _ in range(200):
        for stream in streams:
            stream.flow(16 * MIB)
    assert {stream.way for stream in streams} == {"ring"}
    assert found.balance.changes == 1


def test_who_hears_late_of_a_change_has_tried_nothing() -> None:
    """What the others sent the old way until they heard that another one changed it is no trial of theirs."""
    found = Experience(Balance("chain", 1.5))
    streams = [Stream(found, lambda way: 0.5 if way == "ring" else 1.0) for _ in range(8)]
    while not found.balance.changes:
        streams[0].flow(MIB)
    tried = found.balance.tried
    for stream in streams[1:]:
        stream.flow(128 * MIB)
    assert {stream.way for stream in streams} == {"ring"}
    assert found.balance.tried == tried


def test_a_stream_that_stopped_in_the_middle_of_a_trial_is_not_waited_for() -> None:
    """While it is heard of nobody else tries; when the route went on for long without it somebody else does."""
    found = Experience(Balance("chain", 1.0))
    stuck = Stream(found, lambda _way: 1.0)
    while found.trier is None:
        stuck.flow(MIB)
    tried = found.balance.tried
    going = Stream(found, lambda _way: 1.0)
    going.flow(WAITS // 2)
    assert found.trier is stuck
    assert found.balance.tried == tried
    going.flow(8 * WAITS)
    assert found.trier is not stuck
    assert found.balance.tried > tried


def test_routes_and_ends_of_other_kinds_have_their_own() -> None:
    """Shared is what has one route's name and goes between ends of the same schemes on one engine."""
    engine = Engine()
    try:
        one = Experience.of(engine, "r", "tcp", ["tcp", "tcp"], "chain", 1.9)
        assert Experience.of(engine, "r", "tcp", ["tcp", "tcp"], "ring", 0.5) is one
        assert Experience.of(engine, "other", "tcp", ["tcp", "tcp"], "chain", 1.9) is not one
        assert Experience.of(engine, "r", "unix", ["tcp", "tcp"], "chain", 1.9) is not one
        assert Experience.of(engine, "r", "tcp", ["tcp"], "chain", 1.9) is not one
    finally:
        engine.close()
