"""What duplex bulk costs is measured: methods change in mid-stream, sessions share what was found, the record tells."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from duplexes import Duplex, connected, listener
from peers import accept, assert_same, payload, receive_all, receive_exactly, send_all

from relay.duplex import gauge
from relay.pipeline import balance, experience

MIB = 1 << 20
SMALL = 300_000


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of 300 KB, one after the other."""
    for module in (gauge, experience, balance):
        monkeypatch.setattr(module, "OWN", SMALL)
    monkeypatch.setattr(gauge, "SETTLES", 0)
    monkeypatch.setattr(balance, "TRIAL", SMALL)
    monkeypatch.setattr(balance, "REST", 0)


def both_ways(end: socket.socket, data: bytes, got: list[bytes]) -> list[threading.Thread]:
    """Sends `data` and its end, and takes whatever comes, on threads."""

    def give() -> None:
        send_all(end, data)
        end.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=give), threading.Thread(target=lambda: got.append(receive_all(end)))]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
@pytest.mark.parametrize("seed", range(3))
def test_the_method_changes_in_mid_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, scheme: str, seed: int
) -> None:
    """With a change at each sample both directions arrive as they were sent, and both methods had a part in it."""
    turns = {"chain": "ring", "ring": "chain"}
    now: dict[Any, Any] = {}

    def alternate(which: experience.Experience, _who: object) -> tuple[Any, int]:
        now[id(which)] = turns[now.get(id(which), which.balance.way)]
        return now[id(which)], SMALL

    monkeypatch.setattr(experience.Experience, "next", alternate)
    there, back = payload(seed, 24 * MIB + 5), payload(seed + 10, 9 * MIB + 1)
    with (
        listener(scheme, tmp_path, "server") as (server, address),
        Duplex("tcp://127.0.0.1:0", address) as duplex,
    ):
        with connected(duplex.address) as client, accept(server) as end:
            at_client: list[bytes] = []
            at_end: list[bytes] = []
            for thread in [*both_ways(client, there, at_client), *both_ways(end, back, at_end)]:
                thread.join(60)
        record = duplex.record()
    assert_same(at_end[0], there)
    assert_same(at_client[0], back)
    assert record.result == "delivered"
    assert (record.bytes, record.back) == (len(there), len(back))
    assert len(now) >= 1


def test_the_record_tells_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Both methods were tried: their costs and the one in force are in the record of the session that tried them."""
    monkeypatch.setattr(balance, "SHARE", 0.5)
    data = payload(1, 32 * MIB)
    with listener("tcp", tmp_path, "s") as (server, address), Duplex("tcp://127.0.0.1:0", address) as duplex:
        with connected(duplex.address) as client, accept(server) as end:
            got: list[bytes] = []
            for thread in [*both_ways(client, data, got), *both_ways(end, b"", got)]:
                thread.join(60)
        told = duplex.record().as_dict()["measured"]["to_sink"]
    assert_same(max(got, key=len), data)
    assert told["way"] in ("zero-copy", "copy")
    assert set(told["cpu_seconds_per_gib"]) == {"zero-copy", "copy"}
    assert all(cost > 0 for cost in told["cpu_seconds_per_gib"].values())


@pytest.mark.parametrize("method", ["zero-copy", "copy"])
def test_a_method_that_is_asked_for_is_not_measured(tmp_path: Path, quick: None, method: str) -> None:
    """Every byte of bulk crosses by it, and the record has no measurements."""
    data = payload(2, 8 * MIB)
    with (
        listener("tcp", tmp_path, "s") as (server, address),
        Duplex("tcp://127.0.0.1:0", address, method=method) as duplex,
    ):
        with connected(duplex.address) as client, accept(server) as end:
            got: list[bytes] = []
            for thread in [*both_ways(client, data, got), *both_ways(end, b"", got)]:
                thread.join(60)
        record = duplex.record()
    assert record.measured == {}
    assert record.method == ("splice" if method == "zero-copy" else "copy")


def test_what_one_session_found_others_begin_with(tmp_path: Path, quick: None) -> None:
    """When the way in force changes, live sessions follow and new ones begin with it; messages are not measured."""
    with listener("tcp", tmp_path, "s") as (server, address), Duplex("tcp://127.0.0.1:0", address) as duplex:
        engine = duplex.engines[0]
        with connected(duplex.address) as quiet, accept(server) as quiet_end:
            send_all(quiet, b"hello")
            receive_exactly(quiet_end, 5)
            (sessions,) = duplex.route._sessions.values()
            assert engine.call(lambda: engine.exchange().c.gauge.side == gauge.core.ffi.NULL)
            found = sessions._gauge._found[0, "tcp"]
            assert sessions.methods == ("splice", "splice")
            engine.call(lambda: setattr(found.balance, "way", "ring"))
            with connected(duplex.address) as client, accept(server) as end:
                send_all(client, b"x")
                receive_exactly(end, 1)
                first, second = sorted(engine.call(sessions.live), key=lambda session: session.id)
                assert second.c.sides[0].method == gauge.core.COPY
                assert sessions.methods == ("copy", "splice")
                engine.call(lambda: sessions._gauge._set(first, 0, found))
                assert first.c.sides[0].method == gauge.core.COPY


def stream_until(client: socket.socket, end: socket.socket, done: Callable[[], Any]) -> None:
    """Sends pieces of bulk until `done`."""
    piece = payload(3, 2 * MIB)
    for _ in range(200):
        thread = threading.Thread(target=send_all, args=(client, piece))
        thread.start()
        receive_exactly(end, len(piece))
        thread.join(60)
        if done():
            return
    raise AssertionError("400 MiB of bulk, and the gauge is elsewhere")


def test_a_gauge_is_taken_from_who_is_still(tmp_path: Path, quick: None) -> None:
    """A session that had bulk once does not keep the gauge for good, nor does one that is over."""
    with listener("tcp", tmp_path, "s") as (server, address), Duplex("tcp://127.0.0.1:0", address) as duplex:
        engine = duplex.engines[0]
        where = engine.call(lambda: engine.exchange().c.gauge)
        nobody = gauge.core.ffi.NULL
        with connected(duplex.address) as client, accept(server) as end:
            stream_until(client, end, lambda: engine.call(lambda: where.side != nobody))
            before = engine.call(lambda: where.side)
            with connected(duplex.address) as other, accept(server) as other_end:
                engine.call(lambda: setattr(where, "last_ns", where.last_ns - 2_000_000_000))
                stream_until(other, other_end, lambda: engine.call(lambda: where.side != before))
        duplex.drain()
        duplex.over()
        assert where.side == nobody


def test_who_loses_the_gauge_in_a_trial_goes_back(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is on trial when the gauge moves on crosses as before again, whatever its route hears."""
    monkeypatch.setattr(gauge.Gauge, "heard", lambda *_what: None)
    with listener("tcp", tmp_path, "s") as (server, address), Duplex("tcp://127.0.0.1:0", address) as duplex:
        engine = duplex.engines[0]
        where = engine.call(lambda: engine.exchange().c.gauge)
        with connected(duplex.address) as client, accept(server) as end:
            stream_until(client, end, lambda: engine.call(lambda: where.side != gauge.core.ffi.NULL))
            before = engine.call(lambda: where.side)
            assert before.method == gauge.core.SPLICE
            engine.call(lambda: setattr(before, "method", gauge.core.COPY))
            with connected(duplex.address) as other, accept(server) as other_end:
                engine.call(lambda: setattr(where, "last_ns", where.last_ns - 2_000_000_000))
                stream_until(other, other_end, lambda: engine.call(lambda: where.side != before))
                assert engine.call(lambda: before.method) == gauge.core.SPLICE


def test_a_trial_that_a_session_did_not_finish_counts(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that end in the middle of a trial spend what they sent that way: there is no trial for each of them."""
    monkeypatch.setattr(balance, "SHARE", 0.5)
    monkeypatch.setattr(balance, "TRIAL", 64 * MIB)
    monkeypatch.setattr(balance.Balance, "_less", lambda _balance, size: size)
    spent: list[int] = []
    monkeypatch.setattr(balance.Balance, "spent", lambda _balance, size: spent.append(size))
    data = payload(4, 160 * MIB)
    with listener("tcp", tmp_path, "s") as (server, address), Duplex("tcp://127.0.0.1:0", address) as duplex:
        with connected(duplex.address) as client, accept(server) as end:
            got: list[bytes] = []
            for thread in [*both_ways(client, data, got), *both_ways(end, b"", got)]:
                thread.join(60)
        duplex.record()
    assert_same(max(got, key=len), data)
    assert 0 < sum(spent) <= len(data)
