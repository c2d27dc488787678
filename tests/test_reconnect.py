"""Sinks that go away and come back, on loopback: what is lost is counted, what is not is not."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from peers import (
    PATIENCE,
    accept,
    assert_same,
    payload,
    receive_exactly,
    refused_address,
    reset,
    send_all,
    tcp_listener,
    unix_listener,
    wait_for,
)
from relays import Process, serving
from standing import end, listening_at, source_of, standing

from relay.endpoints.address import Address

# --- sinks ------------------------------------------------------------------------------------------------


def test_a_reset_while_idle_is_noticed_at_once(tmp_path: Path) -> None:
    """Nothing flows when the sink's peer resets: it is away there and then, and what comes later loses nothing."""
    with tcp_listener() as (listener, address), serving(standing(f"'{address}'"), tmp_path) as served:
        first = accept(listener)
        with source_of(served) as source:
            send_all(source, b"before")
            assert receive_exactly(first, 6) == b"before"
            reset(first)
            away = served.said("is away")
            with accept(listener) as second:
                send_all(source, b"after")
                assert receive_exactly(second, 5) == b"after"
                end(source)
        (record,) = served.sessions()
    assert "ECONNRESET" in away["message"]
    (sink,) = record["sinks"]
    assert (sink["result"], sink["reconnects"], sink["bytes"]) == ("delivered", 1, 11)
    assert sink["lost"] == 0


def test_what_a_broken_connection_had_is_counted(tmp_path: Path) -> None:
    """Under block a standing sink rejoins where the pipe is: received before and after, and lost, are all there was."""
    data = payload(1, 8 << 20)
    with (
        tcp_listener() as (listener, address),
        serving(standing(f"'{address}'"), tmp_path) as served,
        accept(listener) as first,
        source_of(served) as source,
    ):
        feeder = threading.Thread(target=send_all, args=(source, data))
        feeder.start()
        got = receive_exactly(first, 1 << 20)
        served.said("it holds the source")
        reset(first)
        with accept(listener) as second:
            rest = receive_exactly(second, 1 << 20)
            feeder.join(PATIENCE)
            source.shutdown(socket.SHUT_WR)
            (record,) = _sessions_while_reading(served, second, rest_of := bytearray(rest))
    (sink,) = record["sinks"]
    assert_same(got, data[: len(got)])
    assert_same(bytes(rest_of), data[len(data) - len(rest_of) :])
    assert sink["reconnects"] == 1
    # what the first peer's kernel had acknowledged and nobody read is beyond a raw stream's reach
    assert 0 < sink["lost"] <= len(data) - len(got) - len(rest_of)
    assert sink["bytes"] == len(data)
    assert record["result"] == "failed"


def _sessions_while_reading(served: Process, sock: socket.socket, got: bytearray) -> list[dict[str, Any]]:
    """The first session, while a thread keeps reading `sock` into `got`."""
    stop, wake = os.pipe()

    def read() -> None:
        waiter = select.poll()
        waiter.register(sock, select.POLLIN)
        waiter.register(stop, select.POLLIN | select.POLLHUP)
        while True:
            ready = {fd for fd, _ in waiter.poll(PATIENCE * 1000)}
            if sock.fileno() in ready:
                got.extend(sock.recv(1 << 20))
            elif stop in ready or not ready:
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        return served.sessions()
    finally:
        os.close(wake)
        reader.join(PATIENCE)
        os.close(stop)


def test_a_sink_that_is_down_holds_the_source_under_block(tmp_path: Path) -> None:
    """Nobody listens at first: block holds the source, says so, and every byte arrives once somebody does."""
    data = payload(2, 4 << 20)
    address = refused_address()
    with serving(standing(f"'{address}'"), tmp_path) as served, source_of(served) as source:
        feeder = threading.Thread(target=send_all, args=(source, data))
        feeder.start()
        said = served.said("it holds the source")
        assert "is away" in said["message"]
        with listening_at(Address.parse(address).port) as listener, accept(listener) as sink:
            assert_same(receive_exactly(sink, len(data)), data)
            feeder.join(PATIENCE)
            end(source)
            (record,) = served.sessions()
    (said,) = record["sinks"]
    assert (said["result"], said["bytes"]) == ("delivered", len(data))
    assert said["blocked_seconds"] > 0.5


@pytest.mark.parametrize("policy", ["drop", "disconnect"])
def test_a_sink_that_is_down_holds_nobody_for_longer_than_after(tmp_path: Path, policy: str) -> None:
    """Under drop and disconnect the others get all, the turn ends without it, and the record counts what it missed."""
    data = payload(3, 8 << 20)
    stages = f"[tee: {{to: '{refused_address()}', on_slow: {{policy: {policy}, after: 100ms}}}}]"
    with (
        tcp_listener() as (listener, address),
        serving(standing(f"'{address}'", stages), tmp_path) as served,
        accept(listener) as sink,
    ):
        missed = 0
        for turn in (1, 2):
            with source_of(served) as source:
                feeder = threading.Thread(target=send_all, args=(source, data))
                feeder.start()
                assert_same(receive_exactly(sink, len(data)), data)
                feeder.join(PATIENCE)
                end(source)
            record = served.sessions(turn)[-1]
            down, up = record["sinks"]
            assert (up["result"], up["bytes"]) == ("delivered", len(data))
            assert (down["result"], down["bytes"]) == ("failed", 0)
            missed += down["dropped"]
            assert missed + down.get("backlog", 0) == turn * len(data)
            assert "ECONNREFUSED" in down["reason"]


@pytest.mark.parametrize("policy", ["drop", "disconnect"])
def test_a_short_stream_does_not_wait_for_a_sink_that_is_down(tmp_path: Path, policy: str) -> None:
    """All of a stream fits the pipe of a sink that is down: after its grace the turn ends nevertheless."""
    stages = f"[tee: {{to: '{refused_address()}', on_slow: {{policy: {policy}, after: 100ms}}}}]"
    with serving(standing("out.bin", stages), tmp_path) as served:
        with source_of(served) as source:
            send_all(source, b"a few bytes")
            end(source)
        (record,) = served.sessions()
    down, up = record["sinks"]
    assert up["result"] == "delivered"
    # they wait, or were dropped at the end of the grace already
    assert (down["result"], down["bytes"], down.get("backlog", 0) + down.get("dropped", 0)) == (
        "failed",
        0,
        11,
    )


def test_gaps_are_aligned_across_an_absence(tmp_path: Path) -> None:
    """A sink that drops while it is away rejoins between two pieces of align bytes, counted from the first byte."""
    piece = 188
    data = b"".join(number.to_bytes(4, "big") * (piece // 4) for number in range(120_000))
    address = refused_address()
    stages = f"[tee: {{to: '{address}', on_slow: {{policy: drop, after: 50ms, align: {piece}}}}}]"
    with (
        tcp_listener() as (listener, main),
        serving(standing(f"'{main}'", stages), tmp_path) as served,
        accept(listener) as other,
        source_of(served) as source,
    ):
        half = len(data) // 2 + 50  # in the middle of a piece
        feeder = threading.Thread(target=send_all, args=(source, data[:half]))
        feeder.start()
        receive_exactly(other, half)
        feeder.join(PATIENCE)
        served.said("dropping for it alone")
        got = bytearray()
        with listening_at(Address.parse(address).port) as late, accept(late) as sink:
            reader = threading.Thread(target=lambda: got.extend(_until_reset(sink)))
            reader.start()
            border = half - half % piece + piece
            send_all(source, data[half:border])  # the gap can end once its last piece is whole
            receive_exactly(other, border - half)
            served.said("has caught up")
            feeder = threading.Thread(target=send_all, args=(source, data[border:]))
            feeder.start()
            receive_exactly(other, len(data) - border)
            feeder.join(PATIENCE)
            end(source)
            (record,) = served.sessions()
            served.signal(signal.SIGTERM)
            served.wait()
            reader.join(PATIENCE)
    said = record["sinks"][0]
    assert len(got) == said["bytes"]
    assert said["bytes"] + said["dropped"] == len(data)
    assert said["dropped"] % piece == 0
    assert said["dropped"] > 0
    pieces = [bytes(got[i : i + piece]) for i in range(0, len(got), piece)]
    assert all(len({p[i : i + 4] for i in range(0, piece, 4)}) == 1 for p in pieces)
    numbers = [int.from_bytes(p[:4], "big") for p in pieces]
    assert numbers == sorted(set(numbers))
    assert border // piece in numbers  # the first piece after the gap


def _until_reset(sock: socket.socket) -> bytes:
    got = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while True:
            wait_for(sock)
            piece = sock.recv(1 << 20)
            if not piece:
                break
            got += piece
    return bytes(got)


def test_a_disconnected_sink_is_in_nobodys_way(tmp_path: Path) -> None:
    """A standing sink disconnected for being slow holds the others neither then nor while it is away."""
    data = payload(4, 24 << 20)
    with tcp_listener() as (stalled, slow), tcp_listener() as (listener, address):
        stages = f"[tee: {{to: '{slow}', on_slow: {{policy: disconnect, after: 100ms}}}}]"
        with (
            serving(standing(f"'{address}'", stages), tmp_path) as served,
            accept(stalled) as never_read,
            accept(listener) as sink,
            source_of(served) as source,
        ):
            stalled.close()  # it will not come back
            feeder = threading.Thread(target=send_all, args=(source, data))
            feeder.start()
            assert_same(receive_exactly(sink, len(data)), data)
            feeder.join(PATIENCE)
            end(source)
            (record,) = served.sessions()
            never_read.close()
    left, all_of_it = record["sinks"]
    assert all_of_it["result"] == "delivered"
    assert left["result"] == "failed"
    assert left["bytes"] + left["dropped"] + left.get("backlog", 0) == len(data)
    assert "full for 0.1 s" in "".join(line["message"] for line in served.lines)


def test_a_half_close_is_noted_and_not_acted_on(tmp_path: Path) -> None:
    """A peer that ends its own stream, as `nc -N -l` does at once, goes on receiving."""
    with tcp_listener() as (listener, address), serving(standing(f"'{address}'"), tmp_path) as served:
        with accept(listener) as sink, source_of(served) as source:
            sink.shutdown(socket.SHUT_WR)
            send_all(source, b"still here")
            assert receive_exactly(sink, 10) == b"still here"
            end(source)
            (record,) = served.sessions()
    assert record["sinks"][0]["result"] == "delivered"
    assert record["sinks"][0]["reconnects"] == 0


def test_peer_eof_close_takes_a_half_close_for_the_end(tmp_path: Path) -> None:
    """With `peer_eof: close` the sink is away when its peer ends its own stream, and is connected again."""
    with tcp_listener() as (listener, address):
        sink_settings = f"{{connect: '{address}', peer_eof: close}}"
        with serving(standing(sink_settings), tmp_path) as served, accept(listener) as sink:
            sink.shutdown(socket.SHUT_WR)
            assert "peer_eof" in served.said("is away")["message"]
            with accept(listener) as second, source_of(served) as source:
                send_all(source, b"again")
                assert receive_exactly(second, 5) == b"again"
                end(source)


def test_a_unix_peer_that_closes_while_idle_is_away(tmp_path: Path) -> None:
    """A unix socket tells a close from a half-close: the sink is away before anything is sent into the void."""
    with unix_listener(tmp_path / "s") as (listener, address):
        with serving(standing(f"'{address}'"), tmp_path) as served, accept(listener) as first:
            first.shutdown(socket.SHUT_WR)
            with source_of(served) as source:
                send_all(source, b"half")
                assert receive_exactly(first, 4) == b"half"
                first.close()
                served.said("is away")
                with accept(listener) as second:
                    send_all(source, b"whole")
                    assert receive_exactly(second, 5) == b"whole"
                    end(source)
            (record,) = served.sessions()
    assert record["sinks"][0]["result"] == "delivered"


def test_a_drain_does_not_wait_for_a_sink_that_is_away(tmp_path: Path) -> None:
    """SIGTERM with a standing sink away and nothing for it under way ends relay at once, with 0."""
    with serving(standing(f"'{refused_address()}'"), tmp_path) as served:
        served.port()
        served.said("is away")
        served.signal(signal.SIGTERM)
        assert served.wait(5) == 0
