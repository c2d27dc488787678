"""Duplex routes and their sink, with stages and without: names, addresses, refusals, options of both connections."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from duplexes import EITHER, Duplex, connected, relayed, turned_away
from mirrors import Mirror
from peers import (
    PATIENCE,
    accept,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    refused_address,
    tcp_listener,
)

from relay.endpoints import tcp


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "staged"])
def test_bytes_that_come_before_the_sink_is_connected_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirrored: bool
) -> None:
    """A client that speaks, ends and even closes while the upstream's name is looked up loses nothing."""
    answer = threading.Event()
    known = tcp.lookup
    with tcp_listener() as (listening, _address), Mirror(tmp_path) as mirror:
        place = (socket.AF_INET, listening.getsockname())

        def slow(host: str, port: int, **more: Any) -> list[tuple[int, Any]]:
            if host != "slow.test":
                return known(host, port, **more)
            assert answer.wait(PATIENCE)
            return [place]

        monkeypatch.setattr(tcp, "lookup", slow)
        stages = [{"tee": {"to": mirror.address}}] if mirrored else []
        to = {"connect": "tcp://slow.test:1"}
        with Duplex({"listen": "tcp://127.0.0.1:0"}, to, stages=stages) as duplex:
            clients = [connected(duplex.address) for _ in range(3)]
            for number, client in enumerate(clients):
                client.sendall(payload(41 + number, 100_000))
                client.close()
            eventually(lambda: duplex.route.under_way, "the clients are there")
            answer.set()
            got = set()
            for _ in clients:
                with accept(listening) as server:
                    got.add(receive_all(server))
            assert got == {payload(41 + number, 100_000) for number in range(3)}
            eventually(lambda: len(duplex.records) == 3, "all are over")
            assert {record.result for record in duplex.records} == {"delivered"}
        assert set(mirror.got) == (got if mirrored else set())


def test_ipv6_on_both_sides() -> None:
    """[::1] in front and behind; the record names the peer as [address]:port."""
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with listening:
        port = listening.getsockname()[1]
        with Duplex({"listen": "tcp://[::1]:0"}, {"connect": f"tcp://[::1]:{port}"}) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                client.sendall(b"six")
                assert receive_exactly(server, 3) == b"six"
                name = f"[::1]:{client.getsockname()[1]}"
            assert duplex.record().peer == name


@EITHER
def test_a_refused_upstream_resets_the_client(stages: dict[str, Any]) -> None:
    """Nobody listens upstream: the client is reset, a record says why, and the next one is served all the same."""
    with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": refused_address()}, **stages) as duplex:
        for count in (1, 2):
            assert turned_away(duplex.address)
            eventually(lambda want=count: len(duplex.records) == want, "its record is there")
        record = duplex.records[0]
        assert (record.result, record.ended_by, record.failed_sinks) == ("failed", "sinks", 1)
        assert "ECONNREFUSED" in record.reason


@EITHER
def test_a_name_that_nobody_knows_resets_the_client(stages: dict[str, Any]) -> None:
    """An upstream whose name cannot be looked up: the client is reset, a record says why."""
    sink = {"connect": "tcp://nowhere.invalid:9"}
    with Duplex({"listen": "tcp://127.0.0.1:0"}, sink, **stages) as duplex:
        assert turned_away(duplex.address)
        assert "nowhere.invalid" in duplex.record().reason


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address of a name refuses, the second answers."""
    with tcp_listener() as (listening, address):
        port = listening.getsockname()[1]
        dead = int(refused_address().rpartition(":")[2])
        places = [(socket.AF_INET, ("127.0.0.1", dead)), (socket.AF_INET, ("127.0.0.1", port))]
        known = tcp.lookup
        monkeypatch.setattr(
            tcp, "lookup", lambda host, *a, **k: places if host == "somewhere.test" else known(host, *a, **k)
        )
        sink = {"connect": f"tcp://somewhere.test:{port}"}
        with Duplex({"listen": "tcp://127.0.0.1:0"}, sink) as duplex, connected(duplex.address) as client:
            with accept(listening) as server:
                client.sendall(b"hello")
                assert receive_exactly(server, 5) == b"hello"
        assert address.endswith(str(port))


def test_the_socket_options_of_every_connection(tmp_path: Path) -> None:
    """Both connections have keepalive by dead_after and no Nagle delay, the accepted one from its listener."""
    sides: list[socket.socket] = []
    with relayed("tcp", "tcp", tmp_path) as (_client, _server, duplex):
        engine = duplex.engines[0]

        def look() -> list[list[int]]:
            c = engine.exchange().sessions[0].sides
            found = []
            for side in (c[0], c[1]):
                sock = socket.socket(fileno=os.dup(side.fd))
                sides.append(sock)
                options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
                options += [(socket.IPPROTO_TCP, o) for o in (socket.TCP_KEEPIDLE, socket.TCP_KEEPCNT, 44)]
                found.append([sock.getsockopt(*option) for option in options if _known(sock, option)])
            return found

        accepted, connecting = engine.call(look)
        assert accepted == connecting
        assert accepted[:2] == [1, 1]
        assert accepted[2] < 15
    for sock in sides:
        sock.close()


def _known(sock: socket.socket, option: tuple[int, int]) -> bool:
    try:
        sock.getsockopt(*option)
    except OSError as error:
        return error.errno != errno.ENOPROTOOPT
    return True
