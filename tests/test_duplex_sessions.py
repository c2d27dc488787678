"""Sessions of duplex routes, with stages and without: limits, engines, many at once, drains and aborts."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from duplexes import (
    BOTH,
    EITHER,
    Duplex,
    connected,
    descriptors,
    in_background,
    listener,
    outcome,
    relayed,
    reset,
    turned_away,
)
from peers import PATIENCE, accept, assert_same, eventually, payload, receive_exactly, tcp_listener
from stories import client_ends_first, client_resets

from relay.kernel.exchange import PIPES

# -- limits and numbers


def test_an_idle_session_is_ended(tmp_path: Path) -> None:
    """limits.idle ends a session in which nothing moves, both ends with a reset, and says so."""
    with tcp_listener() as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "limits": {"idle": "0.3s"}}
        with Duplex(source, {"connect": address}) as duplex, connected(duplex.address) as client:
            with accept(listening) as server:
                client.sendall(b"x")
                receive_exactly(server, 1)
                began = time.monotonic()
                assert outcome(client) == (b"", "ConnectionResetError")
                assert 0.2 < time.monotonic() - began < 2
                assert outcome(server) == (b"", "ConnectionResetError")
            record = duplex.record()
            assert record.ended_by == "relay"
            assert "limits.idle" in record.reason


@pytest.mark.parametrize(
    ("limit", "stages"), [("connections", {}), ("per_peer", BOTH)], ids=["plain", "staged"]
)
def test_limits_of_connections_count_sessions(limit: str, stages: dict[str, Any]) -> None:
    """One more than limits.connections or limits.per_peer is reset at once; when one has left there is room again."""
    with tcp_listener() as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "limits": {limit: 1}}
        with Duplex(source, {"connect": address}, **stages) as duplex:
            with connected(duplex.address), accept(listening):
                assert turned_away(duplex.address)
            eventually(lambda: duplex.records, "the first has left")
            with connected(duplex.address) as third, accept(listening) as server:
                third.sendall(b"in")
                assert receive_exactly(server, 2) == b"in"


def test_sessions_spread_over_engines() -> None:
    """With three engines each carries some of the sessions, and every record arrives."""
    with tcp_listener() as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, engines=3) as duplex:
            clients = [connected(duplex.address) for _ in range(30)]
            servers = [accept(listening) for _ in clients]
            for number, client in enumerate(clients):
                client.sendall(f"{number:03}".encode())
            said = sorted(receive_exactly(server, 3) for server in servers)
            assert said == sorted(f"{number:03}".encode() for number in range(30))
            assert all(len(duplex.route._sessions[engine]) == 10 for engine in duplex.engines)
            for sock in [*clients, *servers]:
                sock.close()
            eventually(lambda: len(duplex.records) == 30, "every record is there")
            assert not duplex.route.under_way


def test_2000_idle_sessions() -> None:
    """Two thousand sessions take two descriptors each and no pipe; all of them come back."""
    count = 2000
    with tcp_listener(backlog=4096) as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0"}
        with Duplex(source, {"connect": address}, method="zero-copy") as duplex:
            with connected(duplex.address), accept(listening):
                pass  # what is made once is made
            eventually(lambda: len(duplex.records) == 1, "the first is over")
            before = descriptors()
            clients, servers = [], []
            for number in range(count):
                clients.append(connected(duplex.address))
                clients[-1].sendall(f"{number:04}".encode())
                servers.append(accept(listening))
                assert receive_exactly(servers[-1], 4) == f"{number:04}".encode()
            assert descriptors() == before + 4 * count  # two of them are the test's own
            for sock in [*clients, *servers]:
                sock.close()
            eventually(lambda: len(duplex.records) == count + 1, "all are over")
            assert descriptors() == before


# -- ending


@EITHER
def test_drain_lets_sessions_go_on(stages: dict[str, Any]) -> None:
    """A route that drains accepts nobody, and ends when the last session has."""
    with tcp_listener() as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, **stages) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                duplex.drain()
                eventually(
                    lambda: all(one.bound is None for one in duplex.route.reception), "it accepts nobody"
                )
                with pytest.raises(ConnectionRefusedError):
                    connected(duplex.address)
                client.sendall(b"still")
                assert receive_exactly(server, 5) == b"still"
                assert duplex.route.under_way
            duplex.over()
            assert duplex.record().result == "delivered"


@EITHER
def test_abort_resets_both_sides(tmp_path: Path, stages: dict[str, Any]) -> None:
    """A route that is aborted resets every client and every server, and says who did."""
    with relayed("tcp", "tcp", tmp_path, **stages) as (client, server, duplex):
        client.sendall(b"x")
        receive_exactly(server, 1)
        duplex.engines[0].post(lambda: duplex.route.abort("no more"))
        assert outcome(client)[1] == outcome(server)[1] == "ConnectionResetError"
        record = duplex.record()
        assert (record.ended_by, record.result, record.reason) == ("relay", "failed", "no more")


def test_a_record_as_json_is_the_same_either_way(tmp_path: Path) -> None:
    """The template that thousands of records a second go through says what the record itself says."""
    import json

    stories: list[Any] = [client_ends_first, client_resets]
    for number, story in enumerate(stories):
        directory = tmp_path / str(number)
        directory.mkdir()
        with relayed("tcp", "tcp", directory) as (client, server, duplex):
            story(client, server)
            record = duplex.record()
            assert json.loads(f"{{{record.as_json()}}}") == {"message": record.as_text(), **record.as_dict()}


def test_a_pipe_outlives_the_session_that_held_bytes_in_it(tmp_path: Path) -> None:
    """Session after session is reset with its pipe full: the pipe is empty and free again, and bulk is spliced on."""
    data = payload(23, 4 << 20)

    def over(count: int) -> bool:
        return len(duplex.records) >= count

    with listener("tcp", tmp_path, "sink") as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, method="zero-copy") as duplex:
            for number in range(1, PIPES + 3):
                with connected(duplex.address) as client, accept(listening):
                    client.settimeout(0.1)
                    with pytest.raises(TimeoutError):  # nobody reads: everything on the way fills up
                        client.sendall(bytes(64 << 20))
                    reset(client)
                eventually(partial(over, number), "the session is over")
            made = duplex.free()[2]
            assert made > 0
            with connected(duplex.address) as client, accept(listening) as server:
                sender = in_background(client.sendall, data)
                assert_same(receive_exactly(server, len(data)), data)
                sender.join(PATIENCE)
            eventually(partial(over, PIPES + 3), "the last session is over")
            assert duplex.records[-1].method == "splice"
            assert duplex.free()[2] == made
