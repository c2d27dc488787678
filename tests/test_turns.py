"""The end of a turn: a branch that may hold nobody does not hold the next stream either."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest
from peers import accept, assert_same, payload, receive_all, receive_exactly, tcp_listener
from relays import serving
from spills import sending
from standing import end, source_of, standing

BRANCHES = {
    "a sink": "tee: {to: '%s', on_slow: %s}",
    "a stage": "tee: {stages: [meter: {every: 10s}, throttle: {rate: 1GB/s}], to: '%s', on_slow: %s}",
    "a tee": (
        "tee: {stages: [tee: {to: 'null:'}, tee: {stages: [meter: {every: 10s}], to: 'null:'}], to: '%s',"
        " on_slow: %s}"
    ),
}
POLICIES = (
    "{policy: drop, after: 100ms}",
    "{policy: disconnect, after: 100ms}",
    "{policy: drop, after: 100ms, buffer: 64KiB}",
    "{policy: spill, max: 64KiB, then: drop, after: 100ms}",
)


@pytest.mark.parametrize(
    ("branch", "policy"),
    [(b, p) for b in BRANCHES for p in POLICIES if b != "a tee" or "max" not in p],  # no tee behind a log
)
@pytest.mark.parametrize("size", [1 << 16, 12 << 20], ids=["little", "more than it holds"])
def test_a_stalled_branch_holds_no_turns_end(tmp_path: Path, branch: str, policy: str, size: int) -> None:
    """A receiver that reads nothing keeps neither its turn's end nor the next stream; its records add up."""
    data = payload(1, size)
    with tcp_listener() as (stalled, slow), tcp_listener() as (listener, address):
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        config = standing(f"'{address}'", f"[{BRANCHES[branch] % (slow, policy)}]")
        with (
            serving(config.replace("routes:", "drain: 1s\nroutes:", 1), tmp_path) as served,
            contextlib.closing(accept(stalled)),
            accept(listener) as sink,
        ):
            for _turn in range(3):
                with source_of(served) as source:
                    feeder = sending(source, data)
                    assert_same(receive_exactly(sink, len(data)), data)
                    feeder.join()
                    with contextlib.suppress(ConnectionResetError):
                        receive_all(source)
            records = served.sessions(3)[:3]
    for record in records:
        assert record["sinks"][-1]["bytes"] == len(data)
    last = next(
        each for each in records[-1]["sinks"] if each["address"] != "/dev/null" and slow in each["address"]
    )
    earlier = [each for record in records for each in record["sinks"] if each["address"] == last["address"]]
    got = sum(each["bytes"] + each["dropped"] for each in earlier) + last.get("backlog", 0)
    assert got == 3 * len(data), earlier


def test_a_branch_that_reads_again_has_both_streams(tmp_path: Path) -> None:
    """What waited in a branch when its turn ended goes out before the next stream's bytes, and nothing is lost."""
    first, second = payload(1, 300_000), payload(2, 300_000)
    with tcp_listener() as (stalled, slow), tcp_listener() as (listener, address):
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        config = standing(f"'{address}'", f"[{BRANCHES['a stage'] % (slow, '{policy: drop, after: 300ms}')}]")
        with serving(config, tmp_path) as served, accept(stalled) as late, accept(listener) as sink:
            for data in (first, second):
                with source_of(served) as source:
                    source.sendall(data)
                    assert_same(receive_exactly(sink, len(data)), data)
                    end(source)
            assert_same(receive_exactly(late, 600_000), first + second)
            served.sessions(2)
