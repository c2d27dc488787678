"""Thousands of duplex connections that come and go: descriptors, pipes and memory are as before in the end.

RELAY_CHURN=1: 5,000 connections at once in place of 500, and 180,000 in all, an hour at 50 a second; where each is two
pipelines 1,500 in place of 200, and 36,000, an hour at 10. They come at the pace of the machine. Figures with `-s`.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from churn import Crowd, Footprint, Told, crowd, until
from relays import serving

FULL = os.environ.get("RELAY_CHURN") == "1"
HOUR = 3600  # seconds
KILLS = 3  # of servers, with everybody on them, while a quarter of the connections come
SPARE = 1000  # descriptors beside those of connections, on either side

STAGES = ', stages: [{tee: {to: "null:", on_slow: drop}}], replies: [{meter: {every: 60s}}]'


@pytest.fixture
def descriptors() -> Iterator[int]:
    """As many as the hard limit lets a process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, 40_000) if hard != resource.RLIM_INFINITY else 40_000
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.timeout(1200 if FULL else 120)
@pytest.mark.parametrize(
    ("stages", "each", "few", "many", "total", "pace"),
    [("", 2, 500, 5000, 3000, 50), (STAGES, 12, 200, 1500, 1500, 10)],
    ids=["plain", "stages"],
)
def test_churn_of_duplex_connections(
    tmp_path: Path, descriptors: int, stages: str, each: int, few: int, many: int, total: int, pace: int
) -> None:
    """Clients come, send, are answered, end, reset and go, while servers are killed and come back: nothing is left
    of them, and memory does not grow once the largest crowd was there."""
    at_once = min(many if FULL else few, (descriptors - SPARE) // each)
    rounds = (HOUR * pace if FULL else total) // 4
    with crowd() as people, serving(config(people, stages), tmp_path) as served:
        to, told = ("127.0.0.1", served.port()), Told(served)
        people.churn(to, 10, 20)  # what the first ones load stays
        people.leave()
        until(people, told)
        start = Footprint.of(served.pid)
        assert at_once >= few, f"the hard limit of {descriptors} descriptors is too low"
        while people.here < at_once:  # the largest crowd there will be
            people.churn(to, at_once, 100)
        seen = []
        for _ in range(4):
            began = time.monotonic()
            people.churn(to, at_once, rounds, rounds // KILLS)
            speed = rounds / (time.monotonic() - began)
            full = Footprint.of(served.pid)
            people.leave()
            until(people, told)
            seen.append(Footprint.of(served.pid))
            print(f"{people.came} came, {speed:.0f}/s, full {full}, empty {seen[-1]}, at the start {start}")
        assert people.whole > people.came // 10
        assert people.broken > 0
        served.signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        told.join()
    assert told.sessions == people.came
    assert not told.errors
    first, *_, last = seen
    for now in seen:
        assert now.descriptors - now.pipes <= start.descriptors - start.pipes, now
        assert now.pipes <= start.pipes + 2 * PIPES, now
        assert now.threads <= first.threads, now
    assert last.resident <= first.resident + 2048, "memory grows with the number of connections"
    assert last.resident <= start.resident + 8192 + at_once * (48 if stages else 1), (
        "a crowd leaves memory behind"
    )


PIPES = 8  # that an engine keeps for bulk


def config(people: Crowd, stages: str) -> str:
    """One route to all the servers, with limits of time whose watching might leave something behind."""
    places = ", ".join(f'"{address}"' for address in people.addresses)
    source = '{listen: "tcp://127.0.0.1:0", limits: {idle: 60s, lifetime: 1h}}'
    return f"engines: 1\nroutes: {{r: {{source: {source}, duplex: true, sink: {{connect: [{places}]}}{stages}}}}}"
