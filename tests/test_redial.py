"""Sinks that connect again: their names are looked up anew, their waits grow."""

from __future__ import annotations

import random
import socket
from typing import Any

import pytest
from peers import (
    accept,
    assert_same,
    connected,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    refused_address,
    reset,
    send_all,
    tcp_listener,
)
from standing import at_work, end

from relay.backoff import Backoff
from relay.endpoints import tcp
from relay.endpoints.address import Address
from relay.journal.record import SessionRecord


class Resolver:
    """Answers for one name, with another place every time it is asked; None is a failure."""

    def __init__(self, *ports: int | None) -> None:
        self._ports = list(ports)
        self.asked = 0

    def __call__(self, host: str, port: int, *, passive: bool = False) -> list[tuple[int, Any]]:
        if host in ("", "127.0.0.1"):
            return [(socket.AF_INET, (host, port))]
        assert host == "moves.example"
        found = self._ports[min(self.asked, len(self._ports) - 1)]
        self.asked += 1
        if found is None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, ("127.0.0.1", found))]


def test_a_sinks_name_is_looked_up_again_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name points elsewhere after the first connection broke, past a look-up that failed: relay goes there."""
    with tcp_listener() as (one, first), tcp_listener() as (two, second):
        resolver = Resolver(Address.parse(first).port, None, Address.parse(second).port)
        monkeypatch.setattr(tcp, "lookup", resolver)
        records: list[SessionRecord] = []
        route = {
            "source": {"listen": "tcp://127.0.0.1:0", "connections": "one"},
            "sink": "tcp://moves.example:9",
        }
        with at_work(route, records) as running, accept(one) as sink, connected(running.bound[-1]) as source:
            send_all(source, b"one")
            assert receive_exactly(sink, 3) == b"one"
            reset(sink)
            with accept(two) as moved:
                send_all(source, b"two")
                assert receive_exactly(moved, 3) == b"two"
                end(source)
            eventually(lambda: records, "the record")
    assert resolver.asked == 3
    assert records[0].sinks[0].reconnects == 2


def test_a_spills_delivery_looks_its_name_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a log it is the same: the next connection goes to where the name points by then, and nothing is lost."""
    data = payload(6, 6 << 20)
    with tcp_listener() as (one, first), tcp_listener() as (two, second):
        resolver = Resolver(Address.parse(first).port, None, Address.parse(second).port)
        monkeypatch.setattr(tcp, "lookup", resolver)
        records: list[SessionRecord] = []
        route = {
            "source": "tcp://127.0.0.1:0",
            "sink": {"connect": "tcp://moves.example:9", "on_slow": "spill"},
        }
        with at_work(route, records) as running, connected(running.bound[-1]) as source:
            with accept(one) as sink:
                send_all(source, data)  # the log takes all of it
                source.shutdown(socket.SHUT_WR)
                got = receive_exactly(sink, 1 << 20)
                reset(sink)
            with accept(two) as moved:
                rest = receive_all(moved)
            eventually(lambda: records, "the record")
    assert_same(got, data[: len(got)])
    assert_same(rest, data[len(data) - len(rest) :])
    # what the first peer's kernel had acknowledged is beyond a raw stream's reach; the rest came, in order
    assert records[0].sinks[0].bytes == len(data)


def test_waits_grow_with_jitter_and_end_only_after_sustained_success() -> None:
    """Each wait is half to all of a step that doubles up to the longest; a short success does not shorten it."""
    backoff = Backoff(random.Random(1))
    step = Backoff.FIRST
    for _ in range(12):
        assert step / 2 <= backoff.next() <= step
        step = min(step * 2, Backoff.LONGEST)
    backoff.lasted(Backoff.SUSTAINED / 2)
    assert backoff.next() >= Backoff.LONGEST / 2
    backoff.lasted(Backoff.SUSTAINED)
    assert backoff.next() <= Backoff.FIRST
    assert len({Backoff(random.Random(seed)).next() for seed in range(20)}) == 20


def test_trying_for_long_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery whose connect took long in vain waits longer the next time, not shorter."""
    said: list[float] = []
    monkeypatch.setattr(Backoff, "lasted", lambda _self, seconds: said.append(seconds))
    with at_work(
        {"source": "tcp://127.0.0.1:0", "sink": {"connect": refused_address(), "on_slow": "spill"}}, []
    ) as running:
        with connected(running.bound[-1]) as source:
            send_all(source, b"x")
            eventually(lambda: len(said) > 2, "three attempts")
    assert said[:3] == [0.0, 0.0, 0.0]
