"""Sinks with a buffer: a pause that fits it, a backlog that does not, and what each policy then does."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path

import pytest
from flapping import Receiver, gaps
from peers import (
    accept,
    assert_same,
    connected,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    send_all,
    tcp_listener,
)
from relays import Relay, serving
from spills import MIB, branch_record, sending, tee


def test_a_buffer_is_backlog_beside_the_pipe() -> None:
    """A receiver that takes nothing holds nobody while the buffer has room; block then holds the source."""
    data = payload(13, 56 * MIB)
    with Receiver(buffer=64 << 10) as receiver:
        slow = {"policy": "block", "buffer": "8MiB"}
        receiver.up()
        with Relay(tee(receiver, slow, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.accept()
            sender = sending(source, data)
            held = [0]

            def still() -> bool:
                before, held[0] = held[0], relay.moved()
                return before == held[0] >= 8 * MIB

            eventually(still, "the source is held, and not before the buffer was full")
            assert held[0] < len(data)
            assert_same(receiver.rest(), data)
            sender.join()
            record = branch_record(relay)
    assert (record.result, record.bytes, record.lost) == ("delivered", len(data), 0)


def test_a_pause_that_fits_the_buffer_drops_nothing() -> None:
    """With drop, what fits the buffer waits there for a receiver that pauses: no gap."""
    data = payload(14, 10 * MIB)
    with Receiver(buffer=64 << 10) as receiver:
        slow = {"policy": "drop", "buffer": "16MiB", "after": "10ms"}
        receiver.up()
        with Relay(tee(receiver, slow, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.accept()
            send_all(source, data)
            source.shutdown(socket.SHUT_WR)
            eventually(lambda: relay.moved() == len(data), "all was read")
            assert_same(receiver.rest(), data)
            assert branch_record(relay).dropped == 0


def test_a_full_buffer_drops_whole_pieces() -> None:
    """Once the buffer is full for too long, gaps are aligned and counted; the others get everything."""
    data = payload(15, 32 * MIB)
    with Receiver(buffer=64 << 10) as receiver, tcp_listener() as (listener, address):
        slow = {"policy": "drop", "buffer": "2MiB", "after": "500ms", "align": 1316}
        with Relay(tee(receiver, slow, address)) as relay:
            receiver.up()
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                receiver.accept()
                taken: list[bytes] = []
                taker = threading.Thread(target=lambda: taken.append(receiver.rest()))
                feeder = threading.Thread(target=send_all, args=(source, data[: 24 * MIB]))
                feeder.start()
                begun = receive_exactly(other, 24 * MIB)  # far more than the branch can hold: it drops
                feeder.join()
                taker.start()  # before the end of the stream: from there on it must not stall for `after`
                sender = sending(source, data[24 * MIB :])
                assert_same(begun + receive_all(other), data)
                sender.join()
                taker.join()
                record = branch_record(relay)
    (got,) = taken
    left_out = gaps(got, data)
    assert left_out
    assert all(start % 1316 == 0 and (end % 1316 == 0 or end == len(data)) for start, end in left_out)
    assert sum(end - start for start, end in left_out) == record.dropped
    assert len(got) == record.bytes


def test_a_full_buffer_disconnects_and_says_how_much(tmp_path: Path) -> None:
    """The reason counts the buffer as backlog, and what was in it is lost."""
    data = payload(16, 24 * MIB)
    with Receiver(buffer=64 << 10) as receiver, tcp_listener() as (listener, address):
        slow = {"policy": "disconnect", "buffer": "3MiB", "after": "20ms"}
        with Relay(tee(receiver, slow, address)) as relay:
            receiver.up()
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                sender = sending(source, data)
                assert_same(receive_all(other), data)
                sender.join()
                record = branch_record(relay)
    assert "backlog of 4.0 MiB full" in record.reason
    assert record.lost > 3 * MIB


def test_a_break_behind_a_buffer_fails_as_without_one() -> None:
    """With a pipeline a connection, a block sink that breaks fails the stream: the source is reset."""
    with Receiver(buffer=64 << 10) as receiver:
        slow = {"policy": "block", "buffer": "8MiB"}
        receiver.up()
        with Relay(tee(receiver, slow, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.accept()
            send_all(source, payload(17, 2 * MIB))
            eventually(receiver.waiting, "some came")
            receiver.down()
            source.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                receive_all(source)
            record = branch_record(relay)
    assert record.result == "failed"
    assert record.lost > 0


def test_a_buffered_standing_sink_rejoins(tmp_path: Path) -> None:
    """With `one` it is connected again, without what was under way and with what waits in the buffer."""
    with Receiver() as receiver:
        config = (
            "routes: {r: {source: {listen: 'tcp://127.0.0.1:0', connections: one}, sink: {connect: '"
            + receiver.address
            + "', on_slow: {policy: block, buffer: 8MiB}}}}"
        )
        with serving(config, tmp_path) as served:
            with socket.create_connection(("127.0.0.1", served.port())) as source:
                source.sendall(payload(1, 100_000))
                receiver.up()
                assert_same(receiver.read(100_000), payload(1, 100_000))
                receiver.down()
                served.said("is away")
                source.sendall(payload(2, 3 * MIB))
                source.shutdown(socket.SHUT_WR)
                receiver.up()
                assert_same(receiver.read(3 * MIB), payload(2, 3 * MIB))
                assert receive_all(source) == b""
            (record,) = served.sessions()
            served.signal(signal.SIGTERM)
            assert receiver.rest() == b""
            assert served.wait() == 0
    assert record["sinks"][0].get("lost", 0) == 0
