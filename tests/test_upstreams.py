"""The upstreams of a route: who takes the place of whom, what a name means and for how long, settings."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any

import pytest
from peers import eventually

from relay.config.data import from_data
from relay.config.load import loads
from relay.duplex.upstream import Upstream
from relay.duplex.upstreams import FRESH, STALE, Upstreams
from relay.endpoints import tcp
from relay.engine import Engine
from relay.errors import ConfigErrors

# -- all of them, and names


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
