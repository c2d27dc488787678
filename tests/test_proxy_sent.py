"""PROXY headers that go ahead of all else, to servers, upstreams, sinks and tees."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from duplexes import Duplex, connected, in_background
from peers import (
    accept,
    assert_same,
    payload,
    receive_all,
    receive_exactly,
    refused_address,
    tcp_listener,
    unix_listener,
)
from proxied import CLIENT, HEADERS, LOCAL, behind, name_of, peer_of, trusting
from relays import serving

from relay.endpoints.proxy_header import make


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_header_goes_out_at_connect(version: str) -> None:
    """A server that speaks first gets the header before the client has said anything; records count payload only."""
    with behind("tcp://127.0.0.1:0", proxy_protocol=version) as (duplex, listening):
        with connected(duplex.address) as client, accept(listening) as server:
            expected = make(version, name_of(client), peer_of(client))  # type: ignore[arg-type] # as given
            assert receive_exactly(server, len(expected)) == expected
            server.sendall(b"220 ready")
            assert receive_exactly(client, 9) == b"220 ready"
            client.sendall(b"EHLO")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(server) == b"EHLO"
            server.close()
            assert receive_all(client) == b""
            record = duplex.record()
            assert (record.bytes, record.back, record.result, record.sinks[0].lost) == (4, 9, "delivered", 0)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_header_goes_ahead_of_bulk(version: str, kind: str, tmp_path: Path) -> None:
    """Bytes that waited for the connect come right behind the header, none lost, to tcp and unix servers."""
    data = payload(5, 3_000_000)
    made = tcp_listener() if kind == "tcp" else unix_listener(tmp_path / "s")
    with made as (listening, address):
        sink = {"connect": address, "proxy_protocol": version}
        with Duplex("tcp://127.0.0.1:0", sink) as duplex, connected(duplex.address) as client:
            expected = make(version, name_of(client), peer_of(client))  # type: ignore[arg-type] # as given
            sender = in_background(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            with accept(listening) as server:
                got = receive_all(server)
            sender.join()
            assert got[: len(expected)] == expected
            assert_same(got[len(expected) :], data)
            assert receive_all(client) == b""
            assert duplex.record().bytes == len(data)


@pytest.mark.parametrize("first", ["v1", "v2"])
@pytest.mark.parametrize("second", ["v1", "v2"])
def test_a_chain_of_proxies_names_the_first_client(first: str, second: str) -> None:
    """What was accepted is what is sent: client and service of the header that came, whatever its version."""
    with behind(trusting(), proxy_protocol=second) as (duplex, listening):
        with connected(duplex.address) as client:
            client.sendall(HEADERS[first] + b"x")
            client.shutdown(socket.SHUT_WR)
            with accept(listening) as server:
                assert receive_all(server) == HEADERS[second] + b"x"


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("stages", ["stages", "replies"])
def test_with_stages_of_either_direction(version: str, stages: str) -> None:
    """On a duplex route with stages headers are accepted and sent alike, at connect, and bulk passes both ways."""
    data, back = payload(1, 400_000), payload(2, 300_000)
    with tcp_listener() as (listening, address):
        sink = {"connect": address, "proxy_protocol": version}
        with (
            Duplex(trusting(), sink, **{stages: [{"meter": {}}]}) as duplex,
            connected(duplex.address) as client,
        ):
            client.sendall(HEADERS["v1"])
            with accept(listening) as server:
                assert receive_exactly(server, len(HEADERS[version])) == HEADERS[version]
                server.sendall(back)
                assert_same(receive_exactly(client, len(back)), back)
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                assert_same(receive_all(server), data)
            assert receive_all(client) == b""
            record = duplex.record()
            assert (record.peer, record.back, record.result) == (CLIENT, len(back), "delivered")
            assert record.bytes == len(data)
            sink_record = next(each for each in record.sinks if not each.way)
            assert sink_record.bytes == len(data), "the header is no part of the stream"


def test_a_peer_without_an_address_is_unknown(tmp_path: Path) -> None:
    """For a client of a unix socket the header says UNKNOWN."""
    with behind(f"unix://{tmp_path}/s", proxy_protocol="v1") as (duplex, listening):
        with connected(duplex.address), accept(listening) as server:
            assert receive_exactly(server, 15) == b"PROXY UNKNOWN\r\n"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_next_upstream_gets_the_header_whole(version: str) -> None:
    """An upstream that refuses costs nothing of the header: the one that takes the session gets all of it."""
    with tcp_listener() as (listening, address):
        sink = {"connect": [refused_address(), address], "balance": "first", "proxy_protocol": version}
        with Duplex("tcp://127.0.0.1:0", sink) as duplex, connected(duplex.address) as client:
            expected = make(version, name_of(client), peer_of(client))  # type: ignore[arg-type] # as given
            client.sendall(b"x")
            with accept(listening) as server:
                assert receive_exactly(server, len(expected) + 1) == expected + b"x"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_check_introduces_itself(version: str) -> None:
    """A health check goes to a server that expects headers, too: it says that it comes for nobody, then asks."""
    health = {"every": "50ms", "send": "ping", "expect": "pong"}
    with tcp_listener() as (listening, address):
        sink = {"connect": address, "proxy_protocol": version, "health": health}
        with Duplex("tcp://127.0.0.1:0", sink), accept(listening) as server:
            expected = {"v1": b"PROXY UNKNOWN\r\n", "v2": LOCAL}[version] + b"ping"
            assert receive_exactly(server, len(expected)) == expected


ONE_WAY = {
    "alone": '{{connect: "{0}", proxy_protocol: {1}}}',
    "drop": '{{connect: "{0}", proxy_protocol: {1}, on_slow: drop}}',
    "disconnect": '{{connect: "{0}", proxy_protocol: {1}, on_slow: disconnect}}',
}


@pytest.mark.parametrize("size", [0, 1, 2_000_000])
@pytest.mark.parametrize("policy", sorted(ONE_WAY))
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_one_way_sinks_begin_with_a_header(version: str, policy: str, size: int, tmp_path: Path) -> None:
    """The header, then the stream, also an empty one; the same for a sink that may lose bytes."""
    data = payload(7, size)
    with tcp_listener() as (listening, address):
        sink = ONE_WAY[policy].format(address, version)
        config = f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: {sink}}}}}'
        with serving(config, tmp_path) as served:
            with connected(served.addresses(1)[0]) as client:
                expected = make(version, name_of(client), peer_of(client))  # type: ignore[arg-type] # as given
                with accept(listening) as server:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    assert_same(receive_all(server), expected + data)
            (record,) = served.sessions(1)
            assert (record["bytes"], record["result"]) == (size, "delivered")


@pytest.mark.parametrize("policy", ["block", "drop"])
def test_tees_begin_with_a_header(policy: str, tmp_path: Path) -> None:
    """Each tee has its own: one with a header, one without, beside a sink with another version of it."""
    data = payload(11, 500_000)
    with tcp_listener() as (a, to_a), tcp_listener() as (b, to_b), tcp_listener() as (c, to_c):
        tees = (
            f'{{tee: {{to: {{connect: "{to_a}", proxy_protocol: v1}}, on_slow: {policy}}}}}, '
            f'{{tee: {{to: "{to_b}"}}}}'
        )
        config = (
            f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:0"}}, stages: [{tees}], '
            f'sink: {{connect: "{to_c}", proxy_protocol: v2}}}}}}'
        )
        with serving(config, tmp_path) as served, connected(served.addresses(1)[0]) as client:
            ends = name_of(client), peer_of(client)
            with accept(a) as one, accept(b) as two, accept(c) as three:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                assert_same(receive_all(one), make("v1", *ends) + data)
                assert_same(receive_all(two), data)
                assert_same(receive_all(three), make("v2", *ends) + data)
            assert served.sessions(1)[0]["result"] == "delivered"
