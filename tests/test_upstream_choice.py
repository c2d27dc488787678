"""Who of a route's upstreams gets a connection: ways of balancing, ejections and trials, what checks decide."""

from __future__ import annotations

import errno
import random
import socket
from collections import Counter
from typing import Any

import pytest

from relay.backoff import Backoff
from relay.duplex.balance import choose, client_of, passed_over
from relay.duplex.upstream import Upstream
from relay.endpoints.options import Balance

CLIENTS = [f"10.{number >> 8}.{number & 255}.7:40000" for number in range(3000)]


def upstream(port: int, now: float = 0.0) -> Upstream:
    """One at 127.0.0.1."""
    return Upstream(f"tcp://127.0.0.1:{port}", (socket.AF_INET, ("127.0.0.1", port)), 15.0, now)


@pytest.fixture
def five() -> list[Upstream]:
    """Upstreams without sessions."""
    return [upstream(port) for port in range(1, 6)]


# -- balance


def test_round_robin_gives_each_its_turn(five: list[Upstream]) -> None:
    """Each upstream gets every fifth connection, in the order of the configuration."""
    chosen = [choose("round_robin", five, "x:1", turn) for turn in range(10)]
    assert chosen == five * 2


def test_least_connections_evens_out(five: list[Upstream]) -> None:
    """Sessions that come and go at random, at some upstreams faster than at others: nobody has two more than another
    when a new one has been given out."""
    chance = random.Random(1)
    for turn in range(2000):
        one = choose("least_connections", five, "x:1", turn)
        assert one.sessions == min(other.sessions for other in five)
        one.sessions += 1
        for number, other in enumerate(five):
            if other.sessions and chance.random() < 0.1 * number:
                other.sessions -= 1


def test_least_connections_takes_turns_among_equals(five: list[Upstream]) -> None:
    """Where sessions are over before the next one comes each upstream still gets its part."""
    counts = Counter(choose("least_connections", five, "x:1", turn).name for turn in range(100))
    assert set(counts.values()) == {20}


def test_first_is_the_first_that_can(five: list[Upstream]) -> None:
    """The order of the configuration decides, whoever asks and however busy it is."""
    five[0].sessions = 1000
    assert choose("first", five, "x:1", 3) is five[0]
    assert choose("first", five[2:], "x:1", 3) is five[2]


def test_source_hash_spreads_and_stays(five: list[Upstream]) -> None:
    """A client's connections go to one upstream whatever its port, and clients spread evenly."""
    counts = Counter(choose("source_hash", five, peer, turn).name for turn, peer in enumerate(CLIENTS))
    assert all(abs(count - 600) < 100 for count in counts.values()), counts
    for peer in CLIENTS[:50]:
        other_port = peer.replace(":40000", ":50001")
        assert choose("source_hash", five, peer, 1) is choose("source_hash", five, other_port, 2)


@pytest.mark.parametrize("gone", range(5))
def test_source_hash_moves_only_who_has_to(five: list[Upstream], gone: int) -> None:
    """Without one upstream only its own clients move, to all of the others, and they come back with it."""
    before = {peer: choose("source_hash", five, peer, 0) for peer in CLIENTS}
    rest = [one for one in five if one is not five[gone]]
    moved = Counter()
    for peer, one in before.items():
        now = choose("source_hash", rest, peer, 0)
        if one is five[gone]:
            moved[now.name] += 1
        else:
            assert now is one
    assert len(moved) == 4
    assert all(count > 80 for count in moved.values()), moved
    chance = random.Random(gone)
    shuffled = chance.sample(five, 5)
    assert all(choose("source_hash", shuffled, peer, 0) is one for peer, one in before.items())


def test_source_hash_with_one_more(five: list[Upstream]) -> None:
    """Who joins takes about its share of every other's clients, and nobody else moves."""
    more = [*five, upstream(99)]
    moved = 0
    for peer in CLIENTS:
        before, now = choose("source_hash", five, peer, 0), choose("source_hash", more, peer, 0)
        if before is not now:
            assert now is more[-1]
            moved += 1
    assert 400 < moved < 600


def test_source_hash_is_the_same_in_every_relay(five: list[Upstream]) -> None:
    """The choice depends on names alone: another relay, another process, another machine agrees."""
    ports = [choose("source_hash", five, f"192.0.2.{host}:1", 0).name[-1] for host in range(10)]
    assert "".join(ports) == "5253454131"


def test_who_a_client_is() -> None:
    """A tcp peer is its host, a unix peer its process."""
    assert client_of("127.0.0.1:80") == b"127.0.0.1"
    assert client_of("[::1]:80") == b"[::1]"
    assert client_of("pid:12") == b"pid:12"


@pytest.mark.parametrize("balance", ["round_robin", "least_connections", "source_hash", "first"])
def test_who_is_passed_over(five: list[Upstream], balance: Balance) -> None:
    """Without those that are passed over the choice is the same: they are all that stood in front of the chosen one."""
    chance = random.Random(2)
    for peer in CLIENTS[:100]:
        usable = sorted(chance.sample(five, chance.randint(1, 5)), key=five.index)
        chosen = choose(balance, usable, peer, 0)
        passed = [one for one in passed_over(balance, chosen, five, peer) if one not in usable]
        if balance in ("first", "source_hash"):
            behind = [one for one in five if one not in passed]
            assert choose(balance, behind, peer, 0) is chosen
        else:
            assert set(passed) == set(five) - set(usable)


# -- one upstream


def test_a_failed_connect_ejects_for_a_while() -> None:
    """After a refusal nobody is sent there; then one on trial, and nobody else until that has gone well."""
    one = upstream(1)
    wait = one.refused(one.begin(1.0, []), errno.ECONNREFUSED, 1.5)
    assert wait is not None
    assert Backoff.FIRST / 2 <= wait <= Backoff.FIRST
    assert one.state == "ejected"
    assert not one.usable(1.5 + wait / 2)
    assert one.usable(1.5 + wait)
    trial = one.begin(2.0, [])
    assert trial.trial
    assert not one.usable(2.0)
    assert one.connected(trial, 2.1)
    assert one.state == "up"
    assert one.usable(2.1)
    assert not one.begin(2.2, []).trial


def test_waits_grow_while_trials_fail_and_are_short_again_after_good_times() -> None:
    """Each failed trial ejects for longer, up to a limit; an upstream that flaps does not get out of that, one that was
    well for long does."""
    one, now, waits = upstream(1), 1.0, []
    for _ in range(12):
        wait = one.refused(one.begin(now, []), errno.ETIMEDOUT, now + 0.1)
        assert wait is not None
        waits.append(wait)
        now += 0.2 + wait
        trial = one.begin(now, [])
        assert one.connected(trial, now + 0.01)  # it flaps
        one.leave(trial)
        now += 1
    assert waits[0] <= Backoff.FIRST
    assert Backoff.LONGEST / 2 <= waits[-1] <= Backoff.LONGEST
    now += Backoff.SUSTAINED
    wait = one.refused(one.begin(now, []), errno.ETIMEDOUT, now + 0.1)
    assert wait is not None
    assert wait <= Backoff.FIRST


def test_connects_that_were_under_way_eject_once() -> None:
    """A hundred connects that began before an ejection and fail after it do not make it longer."""
    one = upstream(1)
    attempts = [one.begin(1.0 + number / 1000, []) for number in range(100)]
    answers = [
        one.refused(attempt, errno.ETIMEDOUT, 5.0 + number / 10) for number, attempt in enumerate(attempts)
    ]
    assert answers[0] is not None
    assert answers[1:] == [None] * 99
    assert (one.sessions, one.served, one.fails) == (0, 0, 100)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EADDRNOTAVAIL, errno.EMFILE])
def test_what_is_not_the_upstreams_fault_does_not_eject(code: int) -> None:
    """A full backlog, or a machine that has no port or descriptor left, says nothing about the upstream."""
    one = upstream(1)
    assert one.refused(one.begin(1.0, []), code, 1.0) is None
    assert (one.state, one.fails) == ("up", 0)


def test_a_trial_that_is_given_up_lets_the_next_one_try() -> None:
    """A trial whose client went away decides nothing; another session may try."""
    one = upstream(1)
    wait = one.refused(one.begin(1.0, []), errno.ECONNREFUSED, 1.0)
    assert wait is not None
    trial = one.begin(1.0 + wait, [])
    one.leave(trial)
    assert one.state == "ejected"
    assert one.usable(1.0 + wait)


def test_checks_decide_by_so_many_in_a_row() -> None:
    """Three bad checks in a row make it down, two good ones up again; fewer do not."""
    one = upstream(1)
    assert not one.checked("", 1.0, 1.0, 3, 2)
    for verdicts, state in (
        ("bb", "up"),
        ("gbb", "up"),
        ("b", "down"),
        ("gb", "down"),
        ("g", "down"),
        ("g", "up"),
    ):
        for verdict in verdicts:
            one.checked("it is ill" if verdict == "b" else "", 2.0, 2.0, 3, 2)
        assert one.state == state, verdicts
    assert one.failed_checks == 6


def test_the_first_check_decides_alone() -> None:
    """Whoever is ill when relay starts gets no session, however many bad checks it takes later."""
    one = upstream(1)
    assert one.checked("it is ill", 1.0, 1.0, 3, 2)
    assert one.state == "down"
    assert one.told(2.0).why == "it is ill"


def test_a_good_check_ends_an_ejection() -> None:
    """A check that began after it and went well takes an ejected upstream back; one that began before does not."""
    one = upstream(1)
    one.refused(one.begin(1.0, []), errno.ECONNREFUSED, 2.0)
    assert not one.checked("", 1.9, 2.1, 3, 2)
    assert one.checked("", 2.2, 2.3, 3, 2)
    assert one.state == "up"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_counts_are_right(seed: int) -> None:
    """Connects, failures, trials, goodbyes and checks in any order, in any number at once: sessions are counted, one
    trial at a time is let in, and an upstream that only good things happen to is up in the end."""
    chance = random.Random(seed)
    one, now = upstream(1), 1.0
    connecting: list[Any] = []
    open_: list[Any] = []
    for _ in range(400):
        now += chance.choice([0.0, 0.001, 0.05, 1.0, 20.0])
        what = chance.random()
        if what < 0.4:
            ejected = one.state == "ejected"
            if one.usable(now) or chance.random() < 0.1:  # the least bad one is asked for more
                connecting.append(one.begin(now, []))
                assert connecting[-1].trial == (ejected or (one.state == "down" and one._ejected))
                assert not (ejected and one.usable(now))
        elif what < 0.6 and connecting:
            attempt = connecting.pop(chance.randrange(len(connecting)))
            if chance.random() < 0.5:
                one.refused(attempt, chance.choice([errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EAGAIN]), now)
            else:
                if attempt.trial:
                    one.connected(attempt, now)
                open_.append(attempt)
        elif what < 0.8 and open_:
            one.leave(open_.pop(chance.randrange(len(open_))))
        else:
            one.checked(chance.choice(["", "it is ill"]), now - chance.random(), now, 3, 2)
        assert one.sessions == len(connecting) + len(open_)
        assert one._trials == sum(attempt.trial for attempt in connecting + open_)
    for attempt in connecting + open_:
        one.leave(attempt)
    assert (one.sessions, one._trials) == (0, 0)
    for _ in range(2):
        one.checked("", now + 1, now + 1, 3, 2)
    assert one.state == "up"
    assert one.usable(now + 1)
