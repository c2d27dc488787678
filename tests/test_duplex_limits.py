"""Limits of connections both ways: how fast they come, and how long one may be half closed."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from duplexes import Duplex, connected, outcome
from peers import accept, receive_all, receive_exactly, tcp_listener
from relays import serving

from relay.config.load import loads
from relay.endpoints.turnstile import Turnstile
from relay.errors import ConfigErrors
from relay.units import parse_pace


def limited(**limits: Any) -> dict[str, Any]:
    """A source with limits."""
    return {"listen": "tcp://127.0.0.1:0", "limits": limits}


@pytest.mark.parametrize("stages", [[], [{"meter": {}}]], ids=["plain", "stages"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_a_half_closed_session_is_ended(side: str, stages: list[Any]) -> None:
    """After limits.half_closed without a byte, once one side has ended its stream, both are reset, and it is said."""
    with tcp_listener() as (listening, address):
        with Duplex(limited(half_closed="0.3s"), {"connect": address}, stages=stages) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                first, other = (client, server) if side == "client" else (server, client)
                first.sendall(b"x")
                first.shutdown(socket.SHUT_WR)
                began = time.monotonic()
                assert outcome(other) == (b"x", "end")
                assert outcome(first) == (b"", "ConnectionResetError")
                assert 0.2 < time.monotonic() - began < 3
            record = duplex.record()
            assert (record.result, record.ended_by) == ("failed", "relay")
            assert "limits.half_closed" in record.reason
            assert f"the {'source' if side == 'client' else 'sink'} had ended" in record.reason


def test_what_still_comes_keeps_a_half_closed_session() -> None:
    """An answer in pieces that takes longer than the limit in all is delivered; so is a session that is quiet first."""
    with tcp_listener() as (listening, address):
        with Duplex(limited(half_closed="0.4s"), {"connect": address}) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                quiet = time.monotonic() + 0.6
                while time.monotonic() < quiet:
                    client.settimeout(0.1)
                    with pytest.raises(TimeoutError):
                        client.recv(1)
                client.shutdown(socket.SHUT_WR)
                assert receive_all(server) == b""
                for _ in range(7):
                    client.settimeout(0.1)
                    with pytest.raises(TimeoutError):
                        client.recv(1)
                    server.sendall(b"y")
                    assert receive_exactly(client, 1) == b"y"
                server.close()
                assert receive_all(client) == b""
            assert duplex.record().result == "delivered"


def test_a_turnstile() -> None:
    """After a quiet second as many as come in a second, then one after another; never less than one at once."""
    gate = Turnstile(10)
    assert gate.room(100.0) == 10
    gate.took(10)
    assert gate.room(100.0) == 0
    assert gate.wait() == pytest.approx(0.1)
    assert gate.room(100.1) == 1
    gate.took(1)
    assert gate.room(100.45) == 3
    assert gate.room(200.0) == 10
    slow = Turnstile(0.5)
    assert slow.room(0.0) == 1
    slow.took(1)
    assert slow.wait() == pytest.approx(2.0)
    assert slow.room(1.9) == 0
    assert slow.room(2.0) == 1


@pytest.mark.parametrize("duplex", [True, False])
def test_those_who_come_too_fast_wait(duplex: bool, tmp_path: Path) -> None:
    """Of twenty at once eight come in; the others wait to be accepted, eight a second, and nobody is refused."""
    rate, count = 8, 20
    with tcp_listener() as (listening, address):
        listening.listen(64)
        source = f'{{listen: "tcp://127.0.0.1:0", limits: {{rate: {rate}/s}}}}'
        config = f'routes: {{r: {{source: {source}, sink: "{address}", duplex: {str(duplex).lower()}}}}}'
        with serving(config, tmp_path) as served:
            to = served.addresses(1)[0]
            began = time.monotonic()
            clients = [connected(to) for _ in range(count)]
            for client in clients:
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
            arrived = []
            for _ in range(count):
                with accept(listening) as server:
                    arrived.append(time.monotonic() - began)
                    assert receive_all(server) == b"x"
            assert [outcome(client) for client in clients] == [(b"", "end")] * count
            for client in clients:
                client.close()
            assert arrived[-1] > (count - rate) / rate - 0.2
            assert "limits.rate" in served.said("they wait")["message"]
            assert {record["result"] for record in served.sessions(count)} == {"delivered"}


@pytest.mark.parametrize(
    ("text", "times"), [("100/s", 100), ("30/m", 0.5), ("3600 / h", 1), (7, 7), ("0.5", 0.5)]
)
def test_a_pace(text: object, times: float) -> None:
    """So many in a second, a minute or an hour; a plain number is a second's."""
    assert parse_pace(text) == pytest.approx(times)


@pytest.mark.parametrize("text", ["", "0/s", "-1/s", "1/x", "10MB/s", True, None, float("inf"), "1e3/s", []])
def test_what_is_no_pace(text: object) -> None:
    """Refused with an example."""
    with pytest.raises(ValueError, match="such as 100/s"):
        parse_pace(text)


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ("source: {listen: 'tcp://:1', limits: {half_closed: 1s}}, sink: 'null:'", "needs 'duplex: true'"),
        ("source: {connect: 'tcp://h:1', limits: {rate: 1/s}}, sink: 'null:'", "sources that listen only"),
        ("source: {listen: 'tcp://:1', limits: {rate: 10MB/s}}, sink: 'null:'", "such as 100/s"),
    ],
)
def test_what_cannot_be_is_refused(route: str, said: str) -> None:
    """Each is refused in plain words."""
    with pytest.raises(ConfigErrors) as caught:
        loads(f"routes: {{r: {{{route}}}}}", "f", to_run=True)
    assert said in str(caught.value.errors[0])
