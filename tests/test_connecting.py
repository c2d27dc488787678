"""Connects and connections: places that never answer, errors in words, peers that are dead."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from peers import (
    accept,
    connected,
    eventually,
    hanging,
    receive_exactly,
    refused_address,
    reset,
    send_all,
    tcp_listener,
    wait_for,
)
from standing import at_work

from relay.endpoints.address import Address
from relay.endpoints.connecting import Connecting, connected_to_itself
from relay.endpoints.liveness import TcpState, keepalive
from relay.endpoints.socket import unacknowledged
from relay.endpoints.tcp import TcpSink
from relay.engine import Engine
from relay.journal.record import SessionRecord

# --- connecting -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_place() -> Iterator[tuple[int, Any]]:
    """A place that never answers: its family and its name."""
    with hanging() as address:
        yield socket.AF_INET, ("127.0.0.1", int(address.rpartition(":")[2]))


def connect_to(places: list[tuple[int, Any]], timeout: float) -> tuple[socket.socket | None, int]:
    """What Connecting makes of them."""
    engine = Engine("connecting")
    answers: list[tuple[socket.socket | None, int]] = []
    try:
        Connecting(engine, places, lambda sock, code: answers.append((sock, code)), timeout=timeout)
        while not answers:
            engine.turn(0.05)
    finally:
        engine.close()
    return answers[0]


def test_a_silent_place_leaves_time_for_the_next() -> None:
    """The first of two places never answers: it uses its share of the time, and the second is reached."""
    with silent_place() as silent, tcp_listener() as (listener, address):
        port = Address.parse(address).port
        sock, code = connect_to([silent, (socket.AF_INET, ("127.0.0.1", port))], 0.6)
        assert code == 0
        assert sock is not None
        sock.close()
        accept(listener).close()


def test_a_socket_connected_to_itself_has_met_nobody() -> None:
    """Connecting to a port of this machine may come back to the very socket: that is found out."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert connected_to_itself(sock)
    with tcp_listener() as (listener, address), connected(address) as sock, accept(listener):
        assert not connected_to_itself(sock)


def test_a_reset_before_the_end_counts_what_was_under_way() -> None:
    """A receiver that resets just before relay ends the stream to it: what it had not acknowledged is lost, though
    nobody had looked at the connection again."""
    engine = Engine("reset")
    with tcp_listener() as (listener, address):
        sink = TcpSink(engine, Address.parse(address))
        try:
            sink.open()
            while sink.state == "opening":
                engine.turn(0.05)
            fd, sent = int(sink.c.fd), 0
            with accept(listener) as peer:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += os.write(fd, bytes(1 << 16))
                sink.c.moved = sent
                reset(peer)
            wait_for(fd, 0)
            waiting = unacknowledged(fd)
            sink.finish()
            assert sink.state == "failed"
            assert 0 < sink.lost == waiting < sent
            assert "ECONNRESET" in sink.reason
        finally:
            sink.close()
            engine.close()


def failing_sink(address: str, monkeypatch: pytest.MonkeyPatch, **limits: float) -> str:
    """Why a sink there failed to connect."""
    engine = Engine("failing")
    if limits:
        monkeypatch.setattr(Connecting.__init__, "__kwdefaults__", limits)
    sink = TcpSink(engine, Address.parse(address))
    failed: list[str] = []
    sink.on_fail = lambda _sink: failed.append(sink.reason)
    try:
        sink.open()
        while not failed:
            engine.turn(0.05)
    finally:
        engine.close()
    return failed[0]


def test_errors_of_a_connect_say_what_and_what_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, timed out, unknown: each names the operation, the address, the errno and what to do."""
    address = refused_address()
    refused = failing_sink(address, monkeypatch)
    assert refused.startswith(f"connecting to {address}: Connection refused (ECONNREFUSED); is the receiver")
    with silent_place() as (_family, (host, port)):
        silent = failing_sink(f"tcp://{host}:{port}", monkeypatch, timeout=0.2)
    assert silent.startswith(
        f"connecting to tcp://{host}:{port}: Connection timed out (ETIMEDOUT); is the host up"
    )
    unknown = failing_sink("tcp://nobody.invalid:9", monkeypatch)
    assert unknown.startswith("connecting to tcp://nobody.invalid:9: looking up 'nobody.invalid': ")
    assert unknown.endswith("check the name, or write the address in figures")


# --- liveness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead_after", [2.0, 2.5, 3.0, 5.0, 7.0, 15.0, 60.0, 3600.0])
def test_keepalive_finds_a_dead_peer_within_dead_after(dead_after: float) -> None:
    """Idle time and all probes together fit into dead_after, and use most of it."""
    idle, interval, count = keepalive(dead_after)
    assert dead_after - 1 < idle + interval * count <= dead_after
    assert min(idle, interval, count) >= 1
    assert keepalive(0.1) == (1, 1, 1)


def test_one_lost_packet_is_no_death() -> None:
    """A probe or a retransmission that is just late is no proof; two are, and so is one overdue by half."""
    quiet = TcpState(retransmits=0, probes=0, backoff=0, rto=0.2, unacked=0, heard=100.0)
    assert not quiet.asking()
    shut = quiet._replace(backoff=9, rto=0.2)  # backoff stays while a shut window's probes are answered
    assert not shut.asking()
    assert shut._replace(probes=1).asking()
    assert not shut._replace(probes=1).unanswered(100.0)
    assert shut._replace(probes=2).unanswered(100.0)
    shrunk = quiet._replace(unacked=3, backoff=8, rto=60.0)
    assert shrunk.asking()
    assert not shrunk.unanswered(60.0)
    assert shrunk.unanswered(90.0)


def test_an_idle_connection_is_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    """Once all is acknowledged the timer ends; the next byte begins it again."""
    caplog.set_level(logging.ERROR)
    records: list[SessionRecord] = []
    with tcp_listener() as (listener, address):
        route = {
            "source": {"listen": "tcp://127.0.0.1:0", "connections": "one"},
            "sink": {"connect": address, "dead_after": "200ms"},
        }
        with (
            at_work(route, records) as running,
            accept(listener) as sink,
            connected(running.bound[-1]) as source,
        ):
            assert running._standing is not None
            (outlet,) = running._standing.chain.outlets
            for _ in range(2):
                send_all(source, b"x")
                receive_exactly(sink, 1)
                end_of_line = outlet.sink
                assert isinstance(end_of_line, TcpSink)
                assert end_of_line._liveness is not None
                eventually(
                    lambda end=end_of_line: end.c.rouse == 1 and not end._liveness.looking,  # type: ignore[misc] # bound
                    "nothing is outstanding, nothing is looked at",
                )
    assert not caplog.records
