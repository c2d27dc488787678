"""Upstreams of duplex routes, one part at a time: who is chosen, who is passed over for how long, what names mean."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from peers import eventually

from relay.backoff import Backoff
from relay.config.data import from_data
from relay.config.load import loads
from relay.duplex.balance import choose, client_of, passed_over
from relay.duplex.upstream import Upstream
from relay.duplex.upstreams import FRESH, STALE, Upstreams
from relay.endpoints import tcp
from relay.endpoints.options import Balance
from relay.engine import Engine
from relay.errors import ConfigErrors

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


# -- all of them, and names


@pytest.fixture
def engine() -> Iterator[Engine]:
    """One whose thread this is."""
    made = Engine("upstreams-under-test")
    yield made
    made.close()


def made(engine: Engine, sink: Any, before: Upstreams | None = None) -> Upstreams:
    """Upstreams of a route with that sink."""
    route = {"source": "tcp://127.0.0.1:0", "duplex": True, "sink": sink}
    return Upstreams("r", from_data({"routes": {"r": route}}, "test").routes["r"].sink, engine, before)


ADDRESSES = [f"tcp://127.0.0.1:{port}" for port in (1, 2, 3)]


def names(upstreams: Upstreams, peers: list[str] | None = None) -> list[str]:
    """Whom connections go to, one after another."""
    found = []
    for peer in peers or ["x:1"] * 6:
        attempt = upstreams.pick(peer)
        assert attempt is not None
        found.append(attempt.upstream.name)
        upstreams.leave(attempt)
    return found


def test_one_that_is_passed_over_is_named_with_its_reason(engine: Engine) -> None:
    """Sessions after a failure go elsewhere, and know why."""
    upstreams = made(engine, {"connect": ADDRESSES, "balance": "first"})
    attempt = upstreams.pick("x:1")
    assert attempt is not None
    upstreams.refused(attempt, errno.ECONNREFUSED)
    attempt = upstreams.pick("x:1")
    assert attempt is not None
    assert attempt.upstream.name == ADDRESSES[1]
    assert attempt.passed == [(ADDRESSES[0], "ejected: Connection refused (ECONNREFUSED)")]
    states = upstreams.snapshot()
    assert [(one.state, one.sessions, one.fails) for one in states] == [
        ("ejected", 0, 1), ("up", 1, 0), ("up", 0, 0),
    ]  # fmt: skip
    assert "ECONNREFUSED" in states[0].why


def test_with_nobody_left_the_least_bad_one_is_tried(engine: Engine) -> None:
    """Where all are ejected or down connections still go somewhere: to one that checks do not call down, whose time is
    up soonest."""
    upstreams = made(engine, {"connect": ADDRESSES})
    first, second, third = upstreams
    upstreams.checked(first, "it is ill", engine.now, 3, 2)
    for one in (second, third):
        attempt = one.begin(engine.now, [])
        upstreams.refused(attempt, errno.ECONNREFUSED)
    least = min((second, third), key=Upstream.badness)
    attempt = upstreams.pick("x:1")
    assert attempt is not None
    assert attempt.upstream is least
    assert [upstreams.pick("x:1", tried) is None for tried in ((least,), (first, second, third))] == [
        False,
        True,
    ]


def test_everyone_ejected_is_tried_before_giving_up(engine: Engine) -> None:
    """A connection's tries go through all of them, each once."""
    upstreams = made(engine, {"connect": ADDRESSES})
    tried: tuple[Upstream, ...] = ()
    while attempt := upstreams.pick("x:1", tried):
        upstreams.refused(attempt, errno.ECONNREFUSED)
        tried += (attempt.upstream,)
    assert sorted(one.name for one in tried) == ADDRESSES


def test_a_reload_keeps_what_is_known_of_those_that_stay(engine: Engine) -> None:
    """The route that takes another's place knows its ejections and sessions; one that is not in its list any more gets
    none, and is told of as long as it has some."""
    old = made(engine, {"connect": ADDRESSES})
    kept, gone = old.pick("x:1"), old.pick("x:1")
    assert kept is not None
    assert gone is not None
    bad = old.pick("x:1")
    assert bad is not None
    old.refused(bad, errno.ECONNREFUSED)
    new = made(engine, {"connect": [ADDRESSES[2], ADDRESSES[0]], "balance": "least_connections"}, old)
    assert [(one.upstream, one.state, one.sessions) for one in new.snapshot()] == [
        (ADDRESSES[2], "ejected", 0),
        (ADDRESSES[0], "up", 1),
        (ADDRESSES[1], "leaving", 1),
    ]
    assert set(names(new)) == {ADDRESSES[0]}
    old.leave(gone)
    assert len(new.snapshot()) == 2
    old.leave(kept)
    assert new.snapshot()[1].sessions == 0


def test_a_reload_without_checks_forgets_what_they_said(engine: Engine) -> None:
    """One that checks called down is up where nobody checks any more."""
    old = made(engine, {"connect": ADDRESSES, "health": "2s"})
    old.checked(next(iter(old)), "it is ill", engine.now, 3, 2)
    with_checks = made(engine, {"connect": ADDRESSES, "health": "3s"}, old)
    assert with_checks.snapshot()[0].state == "down"
    without = made(engine, {"connect": ADDRESSES}, with_checks)
    assert without.snapshot()[0].state == "up"


class Resolver:
    """Answers for somewhere.test what a test says, when it says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: list[str] | OSError = []
        self.asked = 0
        known = tcp.lookup

        def lookup(host: str, port: int, **more: Any) -> list[tuple[int, Any]]:
            if host != "somewhere.test":
                return known(host, port, **more)
            self.asked += 1
            if isinstance(self.answer, OSError):
                raise self.answer
            return [place for one in self.answer for place in known(one, port)]

        monkeypatch.setattr(tcp, "lookup", lookup)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """For names in tests."""
    return Resolver(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which an engine's clock is ahead."""
    ahead = [0.0]
    real = Engine.now.fget
    assert real is not None
    monkeypatch.setattr(Engine, "now", property(lambda self: real(self) + ahead[0]))
    return ahead


def looked_up(engine: Engine, upstreams: Upstreams) -> list[bool]:
    """Asks, and turns the engine until whoever asked has his answer."""
    done: list[bool] = []
    upstreams.ready(engine, lambda: done.append(True))
    waited = not done
    eventually(lambda: engine.turn(0.01) or done, "it was answered")
    return [waited]


def settled(engine: Engine, what: Any) -> None:
    """Turns the engine until `what` is so."""
    eventually(lambda: engine.turn(0.01) or what(), "it came to be")


def test_all_addresses_of_a_name_are_upstreams(engine: Engine, resolver: Resolver) -> None:
    """IPv4 and IPv6, as many as there are; each gets its turn."""
    resolver.answer = ["127.0.0.1", "127.0.0.2", "::1"]
    upstreams = made(engine, {"connect": "tcp://somewhere.test:9", "balance": "round_robin"})
    assert looked_up(engine, upstreams) == [True]
    assert [one.upstream for one in upstreams.snapshot()] == [
        "tcp://127.0.0.1:9", "tcp://127.0.0.2:9", "tcp://[::1]:9",
    ]  # fmt: skip
    assert {one.address for one in upstreams.snapshot()} == {"tcp://somewhere.test:9"}
    assert len(set(names(upstreams))) == 3


def test_names_age(engine: Engine, resolver: Resolver, clock: list[float]) -> None:
    """An answer serves for a while; an older one serves while the next is looked up, a very old one does not. A place
    that is gone gets no more sessions, a new one does, one that stays keeps its state."""
    resolver.answer = ["127.0.0.1", "127.0.0.2"]
    upstreams = made(engine, {"connect": "tcp://somewhere.test:9"})
    looked_up(engine, upstreams)
    assert looked_up(engine, upstreams) == [False]
    assert resolver.asked == 1
    stays = list(upstreams)[1]
    held = stays.begin(engine.now, [])
    gone = next(iter(upstreams)).begin(engine.now, [])
    resolver.answer = ["127.0.0.3", "127.0.0.2"]
    clock[0] += FRESH + 1
    assert looked_up(engine, upstreams) == [False]
    settled(engine, lambda: resolver.asked == 2 and len(upstreams.snapshot()) == 3)
    assert [(one.upstream, one.state) for one in upstreams.snapshot()] == [
        ("tcp://127.0.0.3:9", "up"),
        ("tcp://127.0.0.2:9", "up"),
        ("tcp://127.0.0.1:9", "leaving"),
    ]
    assert list(upstreams)[1] is stays
    upstreams.leave(gone)
    assert len(upstreams.snapshot()) == 2
    upstreams.leave(held)
    clock[0] += STALE + 1
    assert looked_up(engine, upstreams) == [True]


def test_a_resolver_that_fails_leaves_the_old_answer(
    engine: Engine, resolver: Resolver, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """A name that cannot be looked up for a while means what it meant before; that is said once."""
    resolver.answer = ["127.0.0.1"]
    upstreams = made(engine, {"connect": "tcp://somewhere.test:9"})
    looked_up(engine, upstreams)
    resolver.answer = socket.gaierror(socket.EAI_AGAIN, "try later")
    for count in (2, 3, 4):
        clock[0] += STALE + 1
        looked_up(engine, upstreams)
        settled(engine, lambda count=count: resolver.asked == count)
    assert names(upstreams) == ["tcp://127.0.0.1:9"] * 6
    assert len([line for line in caplog.messages if "try later" in line]) == 1


def test_a_name_that_is_unknown_does_not_hold_up_others(engine: Engine, resolver: Resolver) -> None:
    """Of two names one cannot be looked up: connections go to the other."""
    resolver.answer = socket.gaierror(socket.EAI_NONAME, "no such name")
    upstreams = made(engine, {"connect": ["tcp://somewhere.test:9", "tcp://127.0.0.1:9"]})
    looked_up(engine, upstreams)
    assert set(names(upstreams)) == {"tcp://127.0.0.1:9"}
    assert looked_up(engine, upstreams) == [False]
    assert "no such name" in upstreams.reason


def test_a_resolver_that_is_silent_is_waited_for_only_so_long(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name whose look-up takes for ever holds up a connection for half of its time to connect, no longer."""
    answer = threading.Event()
    known = tcp.lookup

    def slow(host: str, port: int, **more: Any) -> list[tuple[int, Any]]:
        if host != "slow.test":
            return known(host, port, **more)
        assert answer.wait(20)
        return []

    monkeypatch.setattr(tcp, "lookup", slow)
    sink = {"connect": ["tcp://slow.test:9", "tcp://127.0.0.1:9"], "connect_timeout": "0.2s"}
    upstreams = made(engine, sink)
    began = engine.now
    assert looked_up(engine, upstreams) == [True]
    assert 0.08 < engine.now - began < 5
    assert looked_up(engine, upstreams) == [False]
    assert set(names(upstreams)) == {"tcp://127.0.0.1:9"}
    answer.set()
    settled(engine, lambda: "no address" in upstreams.reason)


# -- settings


def problems(sink: str, more: str = "duplex: true") -> list[str]:
    """What is wrong with a route to that sink, as `relay check` says it: line, column, where, what."""
    text = f"routes:\n  r:\n    source: tcp://127.0.0.1:1\n    {more}\n    sink: {sink}\n"
    try:
        loads(text)
    except ConfigErrors as error:
        return [str(one).partition(":")[2] for one in error.errors]
    return []


@pytest.mark.parametrize(
    ("sink", "said"),
    [
        ("{connect: []}", "the list is empty"),
        (
            "{connect: [tcp://a:1, tcp://b:0]}",
            "5:33: routes.r.sink.connect[1]: port 0 in 'tcp://b:0' is for listening",
        ),
        ("{connect: [tcp://a:1, tcp://a:1]}", "routes.r.sink.connect[1]: tcp://a:1 is in the list already"),
        ("{connect: [tcp://a:1, x.bin]}", "'connect' takes a tcp or unix address, got 'x.bin'"),
        ("{connect: tcp://a:1, balance: firts}", "got 'firts'; did you mean 'first'?"),
        ("{connect: tcp://a:1, health: {send: x}}", "'send' without 'expect' asks and does not listen"),
        ("{connect: tcp://a:1, health: {fall: 0}}", "must be at least 1"),
        ("{connect: tcp://a:1, health: {evry: 1s}}", "did you mean 'every'?"),
        ("{connect: tcp://a:1, health: [1s]}", "expected a mapping with every, timeout"),
        ("{connect: tcp://a:1, tries: 0}", "must be at least 1"),
        ("{listen: tcp://127.0.0.1:2, tries: 2}", "'tries' applies to sinks that connect only"),
        ("{connect: [tcp://a:1, tcp://127.0.0.1:1]}", "comes back to 'r', again and again"),
    ],
)
def test_settings_that_cannot_be(sink: str, said: str) -> None:
    """Each is told at its place."""
    assert any(said in problem for problem in problems(sink)), problems(sink)


@pytest.mark.parametrize("key", ["balance: first", "health: 2s", "tries: 2", "connect_timeout: 2s"])
def test_settings_that_mean_nothing_one_way(key: str) -> None:
    """Keys of upstreams, and lists, are refused for sinks of one-way streams, those of tees on duplex routes too."""
    (said,) = problems(f"{{connect: tcp://a:1, {key}}}", "duplex: false")
    assert f"'{key.partition(':')[0]}' is for the sink of a duplex route" in said
    (said,) = problems("{connect: [tcp://a:1, tcp://b:1]}", "duplex: false")
    assert "one stream goes to many by 'tee'" in said
    (said,) = problems("tcp://a:1", f"stages: [tee: {{to: {{connect: tcp://b:1, {key}}}}}]")
    assert f"'{key.partition(':')[0]}' is for" in said


def test_short_forms_mean_the_same() -> None:
    """An address alone, a mapping with one, and a list of one are the same settings."""
    routes = [
        loads(f"routes: {{r: {{source: tcp://:1, duplex: true, sink: {sink}}}}}").routes["r"]
        for sink in ("tcp://a:1", "{connect: tcp://a:1}", "{connect: [tcp://a:1]}")
    ]
    assert routes[0].sink == routes[1].sink == routes[2].sink
    assert [str(one) for one in routes[2].sink.addresses] == ["tcp://a:1"]
    assert routes[0].sink.balanced == "first"
    more = "{connect: [tcp://a:1, unix:///b], health: 5s}"
    sink = loads(f"routes: {{r: {{source: tcp://:1, duplex: true, sink: {more}}}}}").routes["r"].sink
    assert [str(one) for one in sink.addresses] == ["tcp://a:1", "unix:///b"]
    assert (sink.balanced, sink.health and sink.health.every) == ("round_robin", 5.0)
