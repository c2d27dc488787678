"""The end of a turn: a branch that may hold nobody does not hold the next stream either."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest
from numbered import SURE, runs, stream
from peers import accept, assert_same, payload, receive_all, receive_exactly, tcp_listener
from relays import end as end_of
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


@pytest.mark.parametrize("before", [1000, 188 * 1000 + 4])
def test_a_gap_is_of_whole_pieces_of_its_own_stream(tmp_path: Path, before: int) -> None:
    """However long the streams before were, gaps begin and end at multiples of `align` from a stream's first byte."""
    streams = {number: stream(number, size) for number, size in {1: before, 2: 12 << 20, 3: 1 << 20}.items()}
    with tcp_listener() as (stalled, slow), tcp_listener() as (listener, address):
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        policy = "{policy: drop, after: 50ms, align: 188}"
        config = standing(f"'{address}'", f"[{BRANCHES['a sink'] % (slow, policy)}]")
        late = bytearray()
        with contextlib.ExitStack() as stack:
            with serving(config, tmp_path) as served, accept(listener) as sink:
                behind = stack.enter_context(accept(stalled))
                reader = threading.Thread(target=lambda: late.extend(receive_all(behind)))
                for number, data in streams.items():
                    with source_of(served) as source:
                        feeder = sending(source, data)
                        assert_same(receive_exactly(sink, len(data)), data)
                        feeder.join()
                        receive_all(source)  # its end: the turn is over
                    if number == 2:  # from here on it reads: the gap has an end
                        reader.start()
                served.sessions(3)
                end_of(served)
            reader.join(30)
    found = runs(bytes(late))
    assert sum(run.end - run.begin for run in found) < sum(map(len, streams.values())) - 188
    assert {run.stream for run in found} >= {1, 2}
    for run in found:
        size = len(streams[run.stream])
        whole = run.end >= size - SURE  # the last bytes of a stream are too few to tell where they are from
        assert any(
            (run.begin - by) % 188 == 0 and (whole or (run.end - by) % 188 == 0) for by in range(SURE)
        ), run
