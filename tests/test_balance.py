"""Which way is cheaper, by measuring: the decisions over made-up costs, and their price."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from relay.pipeline.balance import DEAR, OWN, RARE, SETTLES, TRIAL, Balance, Way, other

MIB = 1 << 20
GIB = 1 << 30

Costs = Callable[[Way, int], float]


def flow(balance: Balance, cost: Costs, total: int, noise: float = 0.0, seed: int = 1) -> dict[Way, int]:
    """`total` bytes cross as `balance` says, each at `cost(way, position)` but for noise; bytes by way."""
    chance = random.Random(seed)
    went: dict[Way, int] = {"chain": 0, "ring": 0}
    way, fed = balance.way, 0
    while fed < total:
        size = balance.own if way == balance.way else balance.trial
        before = fed
        fed += size
        went[way] += size
        if way != balance.way:
            balance.spent(size + SETTLES)
            fed += SETTLES
            went[way] += SETTLES
        balance.measured(way, cost(way, before) * chance.uniform(1 - noise, 1 + noise))
        way, _ = balance.next(fed)
    return went


def price(went: dict[Way, int], cost: Costs) -> float:
    """What it cost, over what the better way alone would have."""
    spent = sum(count * cost(way, 0) for way, count in went.items())
    return spent / (sum(went.values()) * min(cost("chain", 0), cost("ring", 0)))


@pytest.mark.parametrize("size", [256 * MIB, GIB, 8 * GIB, 64 * GIB])
@pytest.mark.parametrize("ratio", [1.0, 1.02, 1.1, 1.3, 1.9, 3.0, 8.0])
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_who_begins_right_pays_little_for_looking(size: int, ratio: float, noise: float) -> None:
    """However the ways compare, a stream that begins the better way costs at most 5 % more than that way alone."""
    balance = Balance("chain", ratio)

    def cost(way: Way, _at: int) -> float:
        return 1.0 if way == "chain" else ratio

    assert price(flow(balance, cost, size, noise), cost) <= 1.05


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("ratio", [1.3, 1.9, 3.0])
def test_who_begins_wrong_finds_out(ratio: float, noise: float) -> None:
    """A stream that begins the dearer way, believed to be the better one, changes once and stays."""
    balance = Balance("ring", 1.3)

    def cost(way: Way, _at: int) -> float:
        return 1.0 if way == "chain" else ratio

    went = flow(balance, cost, 16 * GIB, noise)
    assert balance.way == "chain"
    assert balance.changes == 1
    assert went["ring"] <= 0.08 * 16 * GIB


@pytest.mark.parametrize("expected", [DEAR, 8.0, 100.0])
def test_a_way_that_is_thought_to_be_dear_gets_next_to_nothing(expected: float) -> None:
    """What is expected to cost twice as much gets at most a thousandth of the bytes, and does so when it is true."""
    balance = Balance("chain", expected)
    went = flow(balance, lambda way, _at: 1.0 if way == "chain" else expected, 40 * GIB, 0.1)
    assert 0 < went["ring"] <= RARE * 40 * GIB
    assert balance.changes == 0


def test_a_dear_way_that_turns_out_cheap_is_taken() -> None:
    """What was thought to be dear is tried all the same, and taken when it is not."""
    balance = Balance("chain", 8.0)
    flow(balance, lambda way, _at: 1.0 if way == "chain" else 0.5, 40 * GIB, 0.1)
    assert balance.way == "ring"


@pytest.mark.parametrize("seed", range(20))
def test_ways_that_cost_the_same_do_not_take_turns(seed: int) -> None:
    """With nothing but noise between them there are hardly any changes, however long the stream."""
    balance = Balance("chain", 1.0)
    flow(balance, lambda _way, _at: 1.0, 256 * GIB, 0.2, seed)
    assert balance.changes <= 2


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ratio", [1.0, 1.3, 3.0])
def test_what_else_the_machine_does_is_not_taken_for_a_difference(seed: int, ratio: float) -> None:
    """When everything costs four times as much from one moment to the next, the better way is kept all the same."""
    chance = random.Random(seed)
    weather = [chance.choice([0.5, 1.0, 2.0]) for _ in range(1025)]
    balance = Balance("chain", 1.3)
    flow(
        balance,
        lambda way, at: weather[at // (256 * MIB)] * (1.0 if way == "chain" else ratio),
        256 * GIB,
        0.1,
        seed,
    )
    assert balance.changes <= (2 if ratio == 1.0 else 0)


def test_what_changes_is_looked_at_again() -> None:
    """When sizes or sinks change and what was cheap is dear, the stream goes the other way within a part of it."""
    balance = Balance("chain", 1.9)

    def cost(way: Way, at: int) -> float:
        small = at > 32 * GIB
        return {"chain": 3.0, "ring": 1.5}[way] if small else {"chain": 1.0, "ring": 1.9}[way]

    flow(balance, cost, 32 * GIB, 0.1)
    assert (balance.way, balance.changes) == ("chain", 0)
    tried = balance.tried
    for _ in range(400):
        way, size = balance.next(32 * GIB + 400 * OWN)
        if way != balance.way:
            balance.spent(size)
        balance.measured(way, cost(way, 33 * GIB))
        if balance.way == "ring":
            break
    assert balance.way == "ring"
    assert balance.tried - tried <= GIB


def test_what_cannot_be_tried_now_is_put_off() -> None:
    """A change that was given up is asked for again only when a good deal more has come."""
    balance = Balance("chain", 1.3)
    fed = 0
    asked = 0
    for _ in range(4096):
        way, size = balance.next(fed)
        if way == balance.way:
            balance.measured(way, 1.0)
            fed += size
        else:
            assert way == other(balance.way)
            asked += 1
            balance.gave_up(fed)
    assert 3 <= asked <= 32


def test_small_messages_are_found_out_early() -> None:
    """Where a byte costs much, as in small messages, far fewer tell which way is cheaper: less than 192 MiB."""
    balance = Balance("chain", 1.9)
    flow(balance, lambda way, _at: 6.0 if way == "chain" else 4.0, 192 * MIB, 0.05)
    assert (balance.way, balance.changes) == ("ring", 1)


def test_samples_of_a_stream_to_files_are_whole() -> None:
    """Where threads write loads, a sample has as many of them, whatever a byte costs."""
    balance = Balance("ring", 1.3, least=OWN)
    balance.measured("ring", 50.0)
    assert (balance.own, balance.trial) == (OWN, TRIAL)


def test_nothing_is_expected_of_references_that_cost_more_than_copies() -> None:
    """Copying is thought to cost eight times as much as references, but not as those of small messages: there it is
    tried soon."""
    bulk, small = Balance("chain", 8.0, usual=0.5), Balance("chain", 8.0, usual=0.5)
    flow(bulk, lambda way, _at: 0.05 if way == "chain" else 0.4, GIB, 0.05)
    flow(small, lambda way, _at: 5.0 if way == "chain" else 3.0, GIB, 0.05)
    assert bulk.samples["ring"] == 0
    assert (small.way, small.changes) == ("ring", 1)


def test_what_was_measured_counts_for_more_than_what_is_usual() -> None:
    """Small messages whose copies cost twice as much all the same: after one look next to nothing is spent on more."""
    balance = Balance("chain", 8.0, usual=0.5)
    went = flow(balance, lambda way, _at: 1.0 if way == "chain" else 2.5, 8 * GIB, 0.05)
    assert balance.changes == 0
    assert went["ring"] <= 0.004 * 8 * GIB


def test_what_is_known_of_a_stream_is_taken_at_its_word_and_measured_after_that() -> None:
    """A way that is taken unmeasured is in force at once, counts as a change, and is given up if it proves dearer."""
    balance = Balance("chain", 8.0)
    balance.take("ring", 1.25)
    assert (balance.way, balance.changes) == ("ring", 1)
    assert balance.next(MIB)[0] == "ring"
    flow(balance, lambda way, _at: 1.0 if way == "chain" else 2.0, 4 * GIB)
    assert (balance.way, balance.changes) == ("chain", 2)
    right = Balance("chain", 8.0)
    right.take("ring", 1.25)
    flow(right, lambda way, _at: 2.0 if way == "chain" else 1.0, 4 * GIB)
    assert (right.way, right.changes) == ("ring", 1)


@pytest.mark.parametrize("ring", [0.6, 0.85])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_small_messages_are_found_out_soon(ring: float, noise: float) -> None:
    """A stream whose references cost more than copies would is worth a look: after 100 MiB it goes the cheaper way."""
    for seed in range(10):
        balance = Balance("chain", 8.0, usual=0.75)
        flow(balance, lambda way, _at: 2.6 if way == "chain" else 2.6 * ring, 100 * MIB, noise, seed)
        assert balance.way == "ring", seed


@pytest.mark.parametrize("size", [4 * MIB, 40 * MIB, 100 * MIB, GIB])
@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.0])
def test_looking_at_small_messages_costs_little(size: int, ratio: float) -> None:
    """Where the other way turns out to be as dear or dearer, having tried it costs at most 6 % of the stream."""
    balance = Balance("chain", 8.0, usual=0.75)

    def cost(way: Way, _at: int) -> float:
        return 2.6 if way == "chain" else 2.6 * ratio

    assert price(flow(balance, cost, size), cost) < 1.06
    assert balance.way == "chain"


@pytest.mark.parametrize("cost", [0.5, 1.0, 1.9])
def test_a_trial_is_compared_with_the_sample_before_it(cost: float) -> None:
    """However much may be tried, after each sample of the other way comes one of the way in force; another of the
    other way by itself, whatever made it, changes nothing."""
    balance = Balance("chain", 1.5)
    for _ in range(5):
        balance.measured("chain", 1.0)
    assert balance.next(100 * GIB)[0] == "ring"
    balance.measured("ring", cost)
    assert balance.next(100 * GIB)[0] == "chain"
    for _ in range(5):
        balance.measured("ring", 0.1)
    assert balance.way == "chain"
    assert balance.samples["ring"] == 1
    balance.measured("chain", 1.0)
    assert balance.next(200 * GIB)[0] == "ring"


def test_a_dear_way_is_dear_until_it_costs_much_less() -> None:
    """One that costs about twice as much gets next to nothing, whichever side of twice a sample happens to be on."""
    costs = iter([2.1, 1.95, 2.1, 1.9, 1.95, 2.05, 1.9] * 40)
    went = flow(Balance("chain", 8.0), lambda way, _at: next(costs) if way == "ring" else 1.0, 40 * GIB)
    assert 0 < went["ring"] <= RARE * 40 * GIB
    balance = Balance("chain", 8.0)
    for cost, dear in [(1.75, True), (1.65, False), (1.95, False), (2.05, True)]:
        balance.measured("chain", 1.0)
        balance.measured("ring", cost)
        assert balance.dear == dear
