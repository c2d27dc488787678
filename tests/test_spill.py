"""Sinks that read through a log: slow, away, refused, and whose log is full, on disk and in memory."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from flapping import Receiver, gaps
from peers import (
    accept,
    assert_same,
    connected,
    eventually,
    payload,
    receive_all,
    received,
    reset,
    send_all,
    tcp_listener,
)
from relays import Relay, serving
from spills import MIB, branch_record, sending, tee

from relay.endpoints.socket import unacknowledged


@pytest.fixture(params=["memory", "disk"])
def spill(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A spill's policy, with its log in memory or on disk."""
    if request.param == "memory":
        return {"policy": "spill"}
    return {"policy": "spill", "directory": str(tmp_path / "spill")}


# --- nothing lost, nobody held up -------------------------------------------------------------------------


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_sink_that_comes_and_goes_gets_every_byte(
    spill: dict[str, Any], tmp_path: Path, unix: bool
) -> None:
    """Down, up, reset and up again: each connection goes on where the last one had everything."""
    data = payload(1, 8 * MIB)
    with Receiver(tmp_path / "s" if unix else None) as receiver:
        with Relay(tee(receiver, spill, "null:")) as relay, connected(relay.bound[-1]) as source:
            got = b""
            for turn in range(4):
                send_all(source, data[turn * 2 * MIB : (turn + 1) * 2 * MIB])
                receiver.up()
                got += receiver.read(2 * MIB)
                if turn < 3:
                    receiver.down()
            source.shutdown(socket.SHUT_WR)
            assert receiver.rest() == b""
            record = branch_record(relay)
    assert_same(got, data)
    assert (record.bytes, record.lost, record.dropped, record.twice) == (len(data), 0, 0, 0)
    assert (record.result, record.reconnects, record.backlog) == ("delivered", 3, 0)
    assert not (tmp_path / "spill").exists() or os.listdir(tmp_path / "spill") == ["lock"]  # noqa: PTH208 - names


def test_a_reset_under_way_skips_nothing_that_was_not_acknowledged(spill: dict[str, Any]) -> None:
    """A receiver that stalls and resets: the next connection begins with the first byte its kernel did not have,
    and what had been sent beyond that comes once more."""
    data = payload(2, 12 * MIB)
    with Receiver(buffer=64 << 10) as receiver:
        with Relay(tee(receiver, spill, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.up()
            send_all(source, data)
            source.shutdown(socket.SHUT_WR)
            got = bytearray(receiver.read(100_000))
            last = -1
            while (now := receiver.waiting()) != last:  # until its window is shut
                last = now
                eventually(lambda last=last: receiver.waiting() != last or True, "a look")
            eventually(lambda: relay.moved() == len(data), "all is in the log")
            acknowledged = len(got) + receiver.waiting()
            receiver.reset()
            rest = receiver.rest()
            record = branch_record(relay)
    assert_same(rest, data[len(data) - len(rest) :])
    begun = len(data) - len(rest)
    assert begun <= acknowledged, "something was skipped"
    assert (
        acknowledged - begun <= record.twice <= 8 * MIB
    )  # a send queue; an acknowledgement may have been delayed
    assert (record.bytes, record.lost, record.reconnects) == (len(data), 0, 1)


def test_others_are_not_held_up(spill: dict[str, Any]) -> None:
    """While one receiver takes nothing the other gets the whole stream; then the first gets it too."""
    data = payload(3, 24 * MIB)
    with Receiver(buffer=64 << 10) as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, spill, address)) as relay, connected(relay.bound[-1]) as source:
            receiver.up()
            with accept(listener) as other:
                send_thread = sending(source, data)
                assert_same(receive_all(other), data)
                send_thread.join()
            assert_same(receiver.rest(), data)
            record = branch_record(relay)
    assert (record.result, record.dropped) == ("delivered", 0)


def test_stages_behind_the_log_hold_nobody(spill: dict[str, Any]) -> None:
    """A throttled branch that spills gets all at its rate; the chain is done long before."""
    data = payload(4, 2 * MIB)
    stages = [{"throttle": {"rate": "4MiB/s", "burst": "64KiB"}}, "meter"]
    with Receiver() as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, spill, address, stages=stages)) as relay:
            receiver.up()
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                send_thread = sending(source, data)
                assert_same(receive_all(other), data)
                assert relay.moved() == len(data)
                assert receiver.accept()
                assert_same(receiver.rest(), data)
                send_thread.join()
                assert branch_record(relay).seconds > 0.3


# --- the bound --------------------------------------------------------------------------------------------


def full(spill: dict[str, Any], then: str, **more: Any) -> dict[str, Any]:
    """The policy with a bound that is soon reached."""
    return {**spill, "max": "1MiB", "then": then, "after": "50ms", **more}


def test_a_full_log_that_blocks_holds_the_source(spill: dict[str, Any]) -> None:
    """At the bound no more is read than fits the log and the pipes; when the sink is back all of it comes."""
    data = payload(5, 48 * MIB)
    with Receiver() as receiver:
        with Relay(tee(receiver, full(spill, "block"), "null:")) as relay:
            with connected(relay.bound[-1]) as source:
                sender = sending(source, data)
                held = [0]

                def still() -> bool:
                    before, held[0] = held[0], relay.moved()
                    return before == held[0] >= MIB

                eventually(still, "the source is held")
                assert held[0] < len(data)
                receiver.up()
                assert_same(receiver.rest(), data)
                sender.join()
                record = branch_record(relay)
    assert (record.bytes, record.dropped, record.lost) == (len(data), 0, 0)
    assert record.blocked_seconds > 0


def test_a_full_log_that_drops_leaves_aligned_gaps(spill: dict[str, Any]) -> None:
    """The others get everything; the sink gets a subsequence whose gaps are whole pieces, and counted."""
    data = payload(6, 24 * MIB)
    with Receiver() as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, full(spill, "drop", align=188), address)) as relay:
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                sender = sending(source, data)
                assert_same(receive_all(other), data)
                receiver.up()
                got = receiver.rest()
                sender.join()
                record = branch_record(relay)
    left_out = gaps(got, data)
    assert left_out
    assert all(start % 188 == 0 and (end % 188 == 0 or end == len(data)) for start, end in left_out)
    assert sum(end - start for start, end in left_out) == record.dropped
    assert (record.bytes, record.lost) == (len(got), 0)


def test_a_full_log_that_disconnects_ends_its_sink_alone(spill: dict[str, Any]) -> None:
    """The reason says how much was full for how long; the others get everything."""
    data = payload(7, 24 * MIB)
    with Receiver() as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, full(spill, "disconnect"), address)) as relay:
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                sender = sending(source, data)
                assert_same(receive_all(other), data)
                sender.join()
                record = branch_record(relay)
    assert record.result == "failed"
    assert "backlog of 2.0 MiB full for 0.1 s" in record.reason
    if "directory" in spill:
        assert "bytes wait in" in record.reason
        assert record.backlog > 0
    else:
        assert record.bytes == record.lost > 0  # what was in memory went nowhere
    assert record.bytes + record.backlog + record.dropped == len(data)


# --- streams that break off ---------------------------------------------------------------------------------


def until_reset(sock: socket.socket) -> tuple[bytes, bool]:
    """What comes, and whether it had an orderly end."""
    got = bytearray()
    try:
        for piece in received(sock):
            got += piece
    except ConnectionResetError:
        return bytes(got), False
    return bytes(got), True


@pytest.mark.parametrize("directory", ["", ", directory: spill"])
def test_what_a_broken_stream_left_in_its_log_is_delivered(tmp_path: Path, directory: str) -> None:
    """A source that resets leaves no orphan: what was logged comes out when the sink is there, cut off at its end."""
    data = payload(11, 2 * MIB)
    with Receiver() as receiver:
        config = (
            'routes: {r: {source: {listen: "tcp://127.0.0.1:0", connections: each}, '
            f'sink: {{connect: "{receiver.address}", on_slow: {{policy: spill{directory}}}}}}}}}'
        )
        with serving(config, tmp_path) as served:
            with socket.create_connection(("127.0.0.1", served.port())) as source:
                source.sendall(data)
                served.said("is away")
                eventually(lambda: unacknowledged(source.fileno()) == 0, "relay's kernel has it")
                reset(source)
            served.said("reading from")
            receiver.up()
            connection = receiver.accept()
            got, ended = until_reset(connection)
            assert not ended
            (record,) = served.sessions()
            assert not list((tmp_path / "spill").glob("r.*"))
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    (sink,) = record["sinks"]
    assert_same(got, data[: len(got)])
    assert (record["result"], sink["result"], sink["lost"]) == ("failed", "failed", 0)
    assert len(got) == sink["bytes"] == record["bytes"]
