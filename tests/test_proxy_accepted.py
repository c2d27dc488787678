"""PROXY headers of those who are trusted: whom a session names, who is refused, what limits and drains make of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from duplexes import Duplex, connected, descriptors, outcome, turned_away
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    tcp_listener,
)
from proxied import (
    CLIENT,
    HAS_IPV6,
    HEADERS,
    HERE,
    LOCAL,
    SERVICE,
    accept_after,
    behind,
    name_of,
    refusals,
    trusting,
)
from relays import Relay, serving

from relay.endpoints.proxy_header import make


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("pieces", ["one", "two", "bytes"])
def test_a_header_names_the_peer(version: str, pieces: str) -> None:
    """However it is cut and whatever came in the same segment: the session has the header's peer and the payload, and
    tells which proxy it came through."""
    data = payload(1, 100_000)
    header = HEADERS[version]
    with behind(trusting()) as (duplex, listening), connected(duplex.address) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        proxy = name_of(client)
        if pieces == "one":
            client.sendall(header + data)
        elif pieces == "two":
            client.sendall(header[:9])
            client.sendall(header[9:] + data)
        else:
            for byte in header:
                client.send(bytes([byte]))
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with accept(listening) as server:
            assert_same(receive_all(server), data)
            server.sendall(b"answer")
        assert receive_all(client) == b"answer"
        record = duplex.record()
        assert (record.peer, record.bytes, record.back, record.result) == (
            CLIENT,
            len(data),
            len(b"answer"),
            "delivered",
        )
        assert record.via == proxy
        assert json.loads("{" + record.as_json() + "}") == {"message": record.as_text(), **record.as_dict()}
        assert f"from {CLIENT} via {proxy}: " in record.as_text()


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", LOCAL], ids=["unknown", "local"])
def test_a_proxy_that_connects_for_itself(header: bytes) -> None:
    """A health check of the proxy's own goes through, under its own address."""
    with behind(trusting()) as (duplex, listening), connected(duplex.address) as client:
        client.sendall(header + b"x")
        client.shutdown(socket.SHUT_WR)
        own = name_of(client)
        with accept(listening) as server:
            assert receive_all(server) == b"x"
        assert receive_all(client) == b""
        assert (duplex.record().peer, duplex.record().via) == (own, "")
        assert "via" not in duplex.record().as_dict()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nobody_else_is_believed(version: str) -> None:
    """From a network that is not trusted a header is payload like any other, and names nobody."""
    source = {"listen": "tcp://127.0.0.1:0", "proxy_protocol": {"trust": ["192.0.2.0/24", "127.0.0.9"]}}
    with behind(source) as (duplex, listening), connected(duplex.address) as client:
        client.sendall(HEADERS[version] + b"x")
        client.shutdown(socket.SHUT_WR)
        own = name_of(client)
        with accept(listening) as server:
            assert receive_all(server) == HEADERS[version] + b"x"
        assert receive_all(client) == b""
        assert duplex.record().peer == own


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\r\n\r\n\0\r\nQUIX",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        b"PROXY UNKNOWN ".ljust(200, b"x"),
        HEADERS["v2"][:13] + b"\x11\xff\xff",
    ],
    ids=["http", "signature", "words", "endless", "oversize"],
)
def test_what_is_no_header_is_refused(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A trusted proxy that says something else is reset at once and named in the log; nothing of it is passed on."""
    with behind(trusting()) as (duplex, listening), connected(duplex.address) as client:
        client.sendall(said)
        assert outcome(client) == (b"", "ConnectionResetError")
        (reason,) = refusals(caplog.text)
        assert "PROXY" in reason
        assert duplex.route._admission.refused == 1
        assert not duplex.records
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize("sent", [0, 1, 13, len(HEADERS["v2"]) - 1])
def test_who_closes_before_the_header_is_whole(sent: int, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that ends its stream within its header, or before it, is refused, and the log says so."""
    with behind(trusting()) as (duplex, _listening), connected(duplex.address) as client:
        client.sendall(HEADERS["v2"][:sent])
        client.shutdown(socket.SHUT_WR)
        assert outcome(client) == (b"", "ConnectionResetError")
        assert "closed before" in refusals(caplog.text)[0]


@pytest.mark.parametrize("sent", [b"", b"PROXY TCP4 1.2.3.4"], ids=["silent", "half"])
def test_a_header_that_does_not_come_in_time(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """After `timeout` a proxy that has not introduced itself is reset, and its place is free again."""
    source = trusting(connections=1)
    source["proxy_protocol"] = {"trust": [HERE], "timeout": "100ms"}
    with behind(source) as (duplex, listening):
        with connected(duplex.address) as client:
            client.sendall(sent)
            assert outcome(client) == (b"", "ConnectionResetError")
        assert "proxy_protocol.timeout" in refusals(caplog.text)[0]
        with connected(duplex.address) as client:
            client.sendall(HEADERS["v1"] + b"x")
            with accept(listening) as server:
                assert receive_exactly(server, 1) == b"x"


def test_who_has_not_introduced_himself_counts() -> None:
    """Connections without a header use up `limits.connections`; with the header they use no more than one place."""
    with behind(trusting(connections=2)) as (duplex, listening):
        with connected(duplex.address) as slow, connected(duplex.address) as other:
            slow.sendall(b"PROXY")
            other.sendall(HEADERS["v2"] + b"x")
            with accept(listening) as server:
                assert receive_exactly(server, 1) == b"x"
                assert turned_away(duplex.address)
                slow.sendall(HEADERS["v1"][5:] + b"y")
                with accept(listening) as second:
                    assert receive_exactly(second, 1) == b"y"
                    assert turned_away(duplex.address)


def test_a_crowd_that_never_introduces_itself(caplog: pytest.LogCaptureFixture) -> None:
    """Two hundred connections that stop within their headers are gone after `timeout`, with a line or two in the log;
    a real client comes in at any time where no limit is reached, and nothing of theirs stays open."""
    source = trusting()
    source["proxy_protocol"] = {"trust": [HERE], "timeout": "1s"}
    with behind(source) as (duplex, listening):
        with connected(duplex.address) as first, accept_after(first, listening) as server:
            assert server.fileno() >= 0
        eventually(lambda: len(duplex.records) == 1, "what is made once is made")
        before = descriptors()
        crowd = [connected(duplex.address) for _ in range(200)]
        for number, sock in enumerate(crowd):
            sock.sendall(HEADERS["v2"][: number % len(HEADERS["v2"])])
        eventually(lambda: len(duplex.route._introductions or ()) == 200, "all are accepted")
        with connected(duplex.address) as client, accept_after(client, listening) as server:
            client.sendall(b"y")
            assert receive_exactly(server, 1) == b"y"
        for sock in crowd:
            assert outcome(sock) == (b"", "ConnectionResetError")
            sock.close()
        assert duplex.route._admission.refused == 200
        assert not duplex.route._introductions
        eventually(lambda: descriptors() == before, "all are closed")
        assert len(refusals(caplog.text)) <= 3


def test_a_reload_leaves_nobody_behind(tmp_path: Path) -> None:
    """Who was accepted before a reload and introduces himself after it is served as the old settings say."""
    with tcp_listener() as (listening, address):
        limits = "limits: {connections: 9}"
        source = f'{{listen: "unix://{tmp_path}/s", proxy_protocol: true, {limits}}}'
        config = f'routes: {{r: {{source: {source}, duplex: true, sink: "{address}"}}}}'
        with serving(config, tmp_path) as served:
            with connected(served.addresses(1)[0]) as early:
                early.sendall(b"PROXY")
                with connected(served.addresses(1)[0]) as other, accept_after(other, listening):
                    pass  # who came before it has been accepted, too
                served.config.write_text(config.replace("connections: 9", "connections: 8"))
                served.signal(signal.SIGHUP)
                served.until(lambda: [line for line in served.lines if "reload" in line["message"]])
                early.sendall(b" TCP4 192.0.2.7 198.51.100.2 4711 443\r\nx")
                with accept(listening) as server:
                    assert receive_exactly(server, 1) == b"x"
            records = served.sessions(2)
            assert CLIENT in {record["peer"] for record in records}


def test_limits_are_those_of_the_named_peer(caplog: pytest.LogCaptureFixture) -> None:
    """allow, deny and per_peer look at the address in the header and not at the proxy's."""
    limits = {"allow": ["192.0.2.0/24"], "deny": ["192.0.2.13"], "per_peer": 1}
    with behind(trusting(**limits)) as (duplex, listening):

        def comes(peer: str) -> socket.socket:
            client = connected(duplex.address)
            client.sendall(make("v2", peer, SERVICE) + b"x")
            return client

        with (
            comes("192.0.2.13:1") as denied,
            comes("203.0.113.1:1") as outside,
            comes("192.0.2.7:1") as first,
        ):
            assert outcome(denied)[1] == outcome(outside)[1] == "ConnectionResetError"
            with accept(listening) as server, comes("192.0.2.7:2") as second:
                assert receive_exactly(server, 1) == b"x"
                assert outcome(second)[1] == "ConnectionResetError"
                with comes("192.0.2.8:1") as neighbour, accept(listening) as another:
                    assert receive_exactly(another, 1) == b"x"
                    assert neighbour.fileno() >= 0
            assert first.fileno() >= 0
        assert duplex.route._admission.refused == 3


def test_a_drain_waits_for_the_header() -> None:
    """A connection that was accepted before the drain is served when its header has come."""
    with behind(trusting()) as (duplex, listening), connected(duplex.address) as client:
        eventually(lambda: len(duplex.route._introductions or ()) == 1, "it is accepted")
        duplex.drain()
        client.sendall(HEADERS["v1"] + b"x")
        client.shutdown(socket.SHUT_WR)
        with accept(listening) as server:
            assert receive_all(server) == b"x"
        assert receive_all(client) == b""
        duplex.over()
        assert duplex.record().result == "delivered"


@pytest.mark.parametrize("duplex", [True, False])
def test_an_abort_resets_who_has_not_introduced_himself(duplex: bool) -> None:
    """A route that is ended at once leaves nobody waiting for his header to be read."""
    with tcp_listener() as (_listening, address), contextlib.ExitStack() as stack:
        settings = {"source": trusting(), "sink": {"connect": address}}
        route: Any = Duplex(**settings) if duplex else Relay(settings)
        stack.enter_context(route)
        client = stack.enter_context(connected(route.route.bound[0]))
        eventually(lambda: len(route.route._introductions or ()) == 1, "it is accepted")
        (route.engines[0] if duplex else route._engine).post(lambda: route.route.abort("it ends"))
        assert outcome(client) == (b"", "ConnectionResetError")
        assert route._over.wait(PATIENCE)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_header_on_a_unix_socket(version: str, tmp_path: Path) -> None:
    """Who may connect to the socket's file is trusted, and his connection must begin with a header."""
    source = {"listen": f"unix://{tmp_path}/s", "mode": "0600", "proxy_protocol": True}
    with behind(source) as (duplex, listening):
        with connected(duplex.address) as client, connected(duplex.address) as other:
            client.sendall(HEADERS[version] + b"x")
            client.shutdown(socket.SHUT_WR)
            with accept(listening) as server:
                assert receive_all(server) == b"x"
            assert receive_all(client) == b""
            assert (duplex.record().peer, duplex.record().via) == (CLIENT, f"pid:{os.getpid()}")
            other.sendall(b"hello there, this is none")
            assert outcome(other)[0] == b""
            assert duplex.route._admission.refused == 1


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_one_way_routes_accept_headers(version: str, tmp_path: Path) -> None:
    """The record, the file's name and its content are as if the client itself had connected."""
    data = payload(3, 300_000)
    source = f'{{listen: "tcp://127.0.0.1:0", proxy_protocol: ["{HERE}"]}}'
    config = f'routes: {{r: {{source: {source}, sink: "got-{{peer}}"}}}}'
    with serving(config, tmp_path) as served:
        with connected(served.addresses(1)[0]) as client:
            client.sendall(HEADERS[version] + data)
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
            proxy = name_of(client)
        (record,) = served.sessions(1)
        assert (record["peer"], record["via"]) == (CLIENT, proxy)
        assert record["bytes"] == len(data)
        assert_same((tmp_path / "got-192.0.2.7-4711").read_bytes(), data)


def test_connections_that_take_turns_introduce_themselves(tmp_path: Path) -> None:
    """Where connections share one pipeline each is named by its own header, and a drain waits for the last one's."""
    config = (
        f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:0", proxy_protocol: "{HERE}"}}, sink: "out"}}}}'
    )
    with serving(config, tmp_path) as served:
        for number in (1, 2):
            with connected(served.addresses(1)[0]) as client:
                client.sendall(make("v2", f"192.0.2.{number}:1", SERVICE) + str(number).encode())
                client.shutdown(socket.SHUT_WR)
                assert receive_all(client) == b""
        assert [record["peer"] for record in served.sessions(2)] == ["192.0.2.1:1", "192.0.2.2:1"]
        with connected(served.addresses(1)[0]) as late:
            late.sendall(b"PROXY")
            served.process.terminate()
            served.said("drain")
            late.sendall(b" UNKNOWN\r\n3")
            late.shutdown(socket.SHUT_WR)
            assert receive_all(late) == b""
        assert served.wait() == 0
        assert (tmp_path / "out").read_bytes() == b"123"


@pytest.mark.skipif(not HAS_IPV6, reason="IPv6 is missing on the loopback interface")
@pytest.mark.parametrize("accepted", ["v1", "v2"])
@pytest.mark.parametrize("sent", ["v1", "v2"])
def test_ipv6(accepted: str, sent: str) -> None:
    """Headers come over and name IPv6, also a client of IPv4 who came to a service on IPv6."""
    named = [("[2001:db8::7]:4711", "[2001:db8::1]:443"), (CLIENT, "[2001:db8::1]:443")]
    with tcp_listener("::1") as (listening, address):
        source = {"listen": "tcp://[::]:0", "proxy_protocol": ["::1", HERE]}
        with Duplex(source, {"connect": address, "proxy_protocol": sent}) as duplex:
            port = int(duplex.address.rpartition(":")[2])
            for number, (peer, local) in enumerate(named):
                with socket.create_connection(("::1", port), timeout=PATIENCE) as client:
                    client.sendall(make(accepted, peer, local))  # type: ignore[arg-type] # as given
                    client.shutdown(socket.SHUT_WR)
                    with accept(listening) as server:
                        assert receive_all(server) == make(sent, peer, local)  # type: ignore[arg-type] # as given
                    assert receive_all(client) == b""
                eventually(lambda so_far=number: len(duplex.records) > so_far, "it is over")  # type: ignore[misc] # bound now
                assert duplex.records[number].peer == peer
