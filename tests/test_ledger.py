"""What figures of a relay add up to: counters that stay, classes of reasons, histograms, rates, the last sessions."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from relay.admin.ledger import REASONS, Histogram, Ledger, reason_class
from relay.admin.metrics import Figures
from relay.admin.rates import Rates
from relay.admin.status import RouteStatus, Status
from relay.admin.streams import known_sinks
from relay.config.data import from_data
from relay.engine import Engine
from relay.journal.record import SessionRecord, SinkRecord
from relay.kernel.probe import machine
from relay.pipeline.chain import Chain
from relay.spill.ages import Ages
from relay.ways import Ways

SHAPES: list[dict[str, Any]] = [
    {"sink": "null:"},
    {"stages": [{"tee": {"to": "tcp://a:1"}}], "sink": "null:"},
    {"stages": [{"tee": {"to": "tcp://a:1", "name": "x"}}], "sink": "tcp://a:1"},
    {"stages": [{"tee": {"to": "tcp://a:1", "name": "x", "stages": ["meter"]}}], "sink": "null:"},
    {
        "stages": [{"tee": {"to": "tcp://a:1", "name": "x", "on_slow": "spill", "stages": ["meter"]}}],
        "sink": "null:",
    },
    {
        "stages": [{"tee": {"to": "f", "stages": [{"tee": {"to": "g", "name": "inner"}}]}}, "meter"],
        "sink": "h",
    },
    {"stages": [{"tee": {"to": {"listen": "tcp://a:2"}, "name": "x"}}], "sink": "null:"},
    {"stages": [{"tee": {"to": {"file": "f", "sidecar": "sha256"}, "name": "x"}}], "sink": "null:"},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_name_sinks_as_the_chain_does(shape: dict[str, Any]) -> None:
    """The sinks that a route's settings are expected to have are those that its chain has."""
    route = from_data({"routes": {"r": {"source": "tcp://:1", **shape}}}, "test").routes["r"]
    engine = Engine("shapes")
    chain = Chain(engine, route.stages, route.sink, Ways(machine(), "auto"), persistent=True)
    try:
        names = {outlet.name for outlet in chain.outlets if not outlet.hidden}
        assert {name for name, _address, _policy in known_sinks(route)} == names
    finally:
        chain.close()
        engine.close()


def record(**more: Any) -> SessionRecord:
    """A session that went well, unless told otherwise."""
    sinks = [SinkRecord("s", "tcp://a:1", 10, 0.5, "splice", "delivered")]
    given = {
        "route": "r", "id": "1", "source": "tcp://:1", "peer": "p", "bytes": 10, "seconds": 0.5, "method": "splice",
        "ended_by": "source", "result": "delivered", "sinks": sinks,
    }  # fmt: skip
    return SessionRecord(**{**given, **more})  # type: ignore[arg-type] # the fields as above


def test_counters_stay_where_they_were() -> None:
    """A session that is in neither sum for a moment makes no counter fall, and is not counted twice after that."""
    figures, ledger = Figures(), Ledger()
    base = status_of(bytes=0)

    def told(status: Status) -> float:
        text = figures.text(status, ledger.totals(["r"]))[0].decode()
        line = next(line for line in text.splitlines() if line.startswith("relay_route_received_bytes_total"))
        return float(line.split()[-1])

    assert told(status_of(bytes=10)) == 10  # under way
    assert told(base) == 10  # over, its record on its way
    assert told(status_of(bytes=10)) == 10  # in the ledger
    assert told(status_of(bytes=25)) == 25


def status_of(**route: Any) -> Status:
    """A relay with one route."""
    given = {
        "name": "r", "state": "waiting", "duplex": False, "source": "", "listening": (), "connections": 0, "waiting": 0,
        "refused": 0, "streams": 0, "bytes": 0, "sessions": {}, "sinks": (), "hops": (), "details": (),
    }  # fmt: skip
    from relay.admin.status import Resources

    one = RouteStatus(**{**given, **route})
    return Status("1", 1, "ready", 0.0, 0.0, "", (one,), (), Resources(0, 0, 0, 0, None, 0), ())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "none"),
        ("nothing moved for 60 s (limits.idle)", "idle"),
        ("it lived for 1 s (limits.lifetime)", "lifetime"),
        ("ending tcp://a:1: backlog of 1.0 MiB full for 2.0 s", "slow"),
        ("the drain deadline passed", "drain"),
        ("reading from tcp://a:1: Connection reset by peer (ECONNRESET)", "reset"),
        ("connecting to tcp://a:1: Connection refused (ECONNREFUSED); is the receiver running", "refused"),
        ("writing to x: No space left on device (ENOSPC)", "no_space"),
        ("the configuration of its route changed", "reload"),
        ("something nobody thought of", "other"),
    ],
)
def test_reasons_are_put_into_few_classes(text: str, kind: str) -> None:
    """What a record says becomes one of few words."""
    assert reason_class(text) == kind
    assert kind in REASONS


def test_histograms_count_as_prometheus_does() -> None:
    """A value that is a bound belongs to it; one beyond all bounds to the last."""
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.add([value])
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 8.0)


def test_the_ledger_remembers_the_last_sessions_only() -> None:
    """However many there were; and a failed sink's reason stands for a session without one of its own."""
    ledger = Ledger()
    for number in range(250):
        ledger.add(record(id=str(number)))
    failed = SinkRecord(
        "s", "tcp://a:1", 3, 0.1, "splice", "failed", reason="writing to tcp://a:1: x (EPIPE)"
    )
    ledger.add(record(id="250", result="failed", sinks=[failed]))
    recent = ledger.recent()
    assert len(recent) == 100
    assert recent[0].reason == failed.reason
    totals = ledger.totals(["r", "other"])
    assert list(totals) == ["r"]
    assert totals["r"].ends["failed", "source", "reset"] == 1
    assert totals["r"].sinks["s"].bytes == 2503


def test_rates_compare_looks_that_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate is that of the time between two looks; without an earlier one there is none."""
    clock = itertools.count(100.0, 1.0)
    monkeypatch.setattr("relay.admin.rates.time.monotonic", lambda: next(clock))
    rates = Rates()
    assert rates.rated(status_of(bytes=0)).routes[0].rate is None
    assert rates.rated(status_of(bytes=50)).routes[0].rate == 50.0
    assert rates.rated(status_of(bytes=50)).routes[0].rate == 25.0
    assert rates.rated(replace(status_of(bytes=10))).routes[0].rate == pytest.approx(10 / 3)


def test_the_age_of_what_waits() -> None:
    """The oldest byte that waits tells how far behind a log is, however long the log is."""
    ages = Ages()
    now = time.monotonic()
    for number in range(2000):
        ages.note(number * 100, now - 2000 + number)
    assert ages.oldest(0) == pytest.approx(2000, abs=3)
    assert ages.oldest(150_000) == pytest.approx(500, abs=8)
    assert ages.oldest(199_900) == pytest.approx(1, abs=8)
    assert Ages().oldest(0) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_sessions_that_are_counted_together(seed: int) -> None:
    """Whenever somebody asks, and from whichever threads they came: every session is in the sums, once."""
    chance, ledger = random.Random(seed), Ledger()
    shares: list[list[SessionRecord]] = [[], [], []]
    for number in range(300):
        result = chance.choice(["delivered", "failed"])
        sinks = [
            SinkRecord(
                name, "tcp://a:1", chance.randrange(100), 0.1, "copy", result, lost=chance.randrange(3)
            )
            for name in chance.sample("xyz", chance.randint(1, 3))
        ]
        for sink in sinks:
            sink.connects, sink.dropped = (chance.random(),) * chance.randrange(3), chance.randrange(5)
        chance.choice(shares).append(
            record(
                id=str(number), route=chance.choice("ab"), result=result, sinks=sinks, bytes=chance.randrange(1000),
                seconds=chance.random() * 100, back=chance.choice([None, 7]), back_lost=chance.randrange(2),
                reason=chance.choice(["", "x (ECONNRESET)"]) if result == "failed" else "",
            )
        )  # fmt: skip

    def add(share: list[SessionRecord]) -> None:
        for one in share:
            ledger.add(one)

    threads = [threading.Thread(target=add, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    counted = 0
    while any(thread.is_alive() for thread in threads):
        now = sum(totals.ends.total() for totals in ledger.totals("ab").values())
        assert now >= counted
        counted = now
    for thread in threads:
        thread.join()
    ledger.compact()
    everyone = [one for share in shares for one in share]
    for name, totals in ledger.totals("ab").items():
        those = [one for one in everyone if one.route == name]
        assert totals.bytes == sum(one.bytes for one in those)
        assert totals.back == sum(one.back or 0 for one in those)
        assert totals.back_lost == sum(one.back_lost for one in those)
        assert sum(totals.durations.counts) == len(those)
        assert totals.durations.sum == pytest.approx(sum(one.seconds for one in those))
        ends = Counter((one.result, one.ended_by, "reset" if one.reason else "none") for one in those)
        assert totals.ends == ends
        for sink, figures in totals.sinks.items():
            parts = [part for one in those for part in one.sinks if part.sink == sink]
            assert (figures.bytes, figures.dropped, figures.lost) == (
                sum(part.bytes for part in parts),
                sum(part.dropped for part in parts),
                sum(part.lost for part in parts),
            )
            assert sum(figures.connects.counts) == sum(len(part.connects) for part in parts)
    assert len(ledger.recent()) == 100
