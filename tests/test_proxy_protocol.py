"""PROXY headers on connections: accepted from those who are trusted, sent ahead of all else, with HAProxy and nginx."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from duplexes import Duplex, connected, descriptors, in_background, outcome, turned_away
from faults import ShortCounts, strace_prefix
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    program,
    receive_all,
    receive_exactly,
    refused_address,
    running,
    tcp_listener,
    unix_listener,
)
from relays import Relay, serving

from relay.config.load import loads
from relay.endpoints.address import Address
from relay.endpoints.proxy_header import make
from relay.errors import ConfigErrors
from relay.planning.preflight import show_plan

HERE = "127.0.0.0/8"
CLIENT, SERVICE = "192.0.2.7:4711", "198.51.100.2:443"
HEADERS = {version: make(version, CLIENT, SERVICE) for version in ("v1", "v2")}  # type: ignore[arg-type] # these two
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"


def has_ipv6() -> bool:
    """Whether somebody can listen on ::1."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


HAS_IPV6 = has_ipv6()


def trusting(**limits: Any) -> dict[str, Any]:
    """A source that believes everybody on this machine."""
    return {"listen": "tcp://127.0.0.1:0", "proxy_protocol": HERE, **({"limits": limits} if limits else {})}


def name_of(sock: socket.socket) -> str:
    """A connection's own end as records name it."""
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def peer_of(sock: socket.socket) -> str:
    """Its other end."""
    host, port = sock.getpeername()[:2]
    return f"{host}:{port}"


@contextlib.contextmanager
def behind(source: Any, **sink: Any) -> Iterator[tuple[Duplex, socket.socket]]:
    """A duplex route from `source` to a listening socket of the test's."""
    with tcp_listener() as (listening, address), Duplex(source, {"connect": address, **sink}) as duplex:
        yield duplex, listening


@contextlib.contextmanager
def accept_after(client: socket.socket, listening: socket.socket) -> Iterator[socket.socket]:
    """What the server gets once `client` has introduced itself and said one byte."""
    client.sendall(HEADERS["v1"] + b"x")
    with accept(listening) as server:
        assert receive_exactly(server, 1) == b"x"
        yield server


def refusals(text: str) -> list[str]:
    """Why connections were refused, as the log has it."""
    return re.findall(r"refused: (.*?) \(\d+ refused", text)


# --- accepted -----------------------------------------------------------------------------------------------


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
        assert json.loads("{" + record.as_json() + "}") == record.as_dict()
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


# --- sent ---------------------------------------------------------------------------------------------------


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


# --- when calls come short ------------------------------------------------------------------------------------


def between(address: str, version: str, *, duplex: bool) -> str:
    """A route that expects headers and sends some."""
    source = f'{{listen: "tcp://127.0.0.1:0", proxy_protocol: "{HERE}"}}'
    sink = f'{{connect: "{address}", proxy_protocol: {version}}}'
    return f"engines: 1\nroutes: {{r: {{source: {source}, sink: {sink}, duplex: {str(duplex).lower()}}}}}"


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_short_counts_break_no_header(
    version: str, seed: int, tmp_path: Path, short_counts: ShortCounts
) -> None:
    """With calls cut short, and some interrupted, headers are read and sent whole, ahead of the payload."""
    data = payload(seed, 20_000)
    environment = short_counts.environment(seed, rate=100, eintr=10)
    with tcp_listener() as (listening, address):
        with serving(between(address, version, duplex=False), tmp_path, env=environment) as served:
            for header in HEADERS.values():
                with connected(served.addresses(1)[0]) as client:
                    client.sendall(header + data)
                    client.shutdown(socket.SHUT_WR)
                    with accept(listening) as server:
                        assert_same(receive_all(server), HEADERS[version] + data)
                    assert receive_all(client) == b""
            assert [record["bytes"] for record in served.sessions(2)] == [len(data)] * 2
    counts = short_counts.counts()
    assert counts["recv"].shortened
    assert counts["vmsplice"].shortened


def test_a_header_that_finds_no_room_goes_out_later(tmp_path: Path) -> None:
    """A send of the header that the kernel refuses for the moment is made again, and nothing overtakes it."""
    with unix_listener(tmp_path / "s") as (listening, address):
        prefix = strace_prefix("send:error=EAGAIN:when=1")
        with serving(between(address, "v2", duplex=True), tmp_path, prefix=prefix) as served:
            with connected(served.addresses(1)[0]) as client:
                client.sendall(HEADERS["v1"] + b"x")
                with accept(listening) as server:
                    assert receive_exactly(server, len(HEADERS["v2"]) + 1) == HEADERS["v2"] + b"x"
                    server.sendall(b"y")
                    assert receive_exactly(client, 1) == b"y"


def test_a_server_that_resets_at_the_header(tmp_path: Path) -> None:
    """A reset that meets the header ends the session as one that meets payload does; the client is reset."""
    with tcp_listener() as (listening, address):
        prefix = strace_prefix("send:error=ECONNRESET:when=1")
        with serving(between(address, "v2", duplex=True), tmp_path, prefix=prefix) as served:
            with connected(served.addresses(1)[0]) as client:
                client.sendall(HEADERS["v1"] + b"x")
                with accept(listening):
                    assert outcome(client) == (b"", "ConnectionResetError")
            (record,) = served.sessions(1)
            assert (record["result"], record["bytes"]) == ("failed", 0)
            assert "ECONNRESET" in record["reason"]


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ("source: {listen: 'tcp://:1', proxy_protocol: true}, sink: 'null:'", "nobody is trusted"),
        ("source: {listen: 'unix:///x', proxy_protocol: 10.0.0.0/8}, sink: 'null:'", "write 'true'"),
        (
            "source: {listen: 'tcp://:1', proxy_protocol: 10.0.0.1/8}, sink: 'null:'",
            "did you mean '10.0.0.0/8'",
        ),
        (
            "source: {connect: 'tcp://h:1', proxy_protocol: 10.0.0.0/8}, sink: 'null:'",
            "sources that listen only",
        ),
        ("source: {listen: 'tcp://:1'}, sink: {file: x, proxy_protocol: v1}", "sinks that connect only"),
        ("source: {listen: 'tcp://:1'}, sink: {connect: 'tcp://h:1', proxy_protocol: v3}", "v1"),
        ("source: x, sink: {connect: 'tcp://h:1', proxy_protocol: v1}", "this source accepts none"),
        (
            "source: {listen: 'tcp://:1', connections: one}, sink: {connect: 'tcp://h:1', proxy_protocol: v1}",
            "write 'connections: each'",
        ),
        (
            "source: {listen: 'tcp://:1'}, sink: {connect: 'tcp://h:1', proxy_protocol: v1, on_slow: spill}",
            "leave 'proxy_protocol' out",
        ),
        (
            "source: {listen: 'tcp://:1'}, stages: [{tee: {to: {connect: 'tcp://h:1', proxy_protocol: v1}, "
            "on_slow: spill}}], sink: 'null:'",
            "leave 'proxy_protocol' out",
        ),
    ],
)
def test_what_cannot_be_is_refused(route: str, said: str) -> None:
    """Each is refused in plain words at its place."""
    with pytest.raises(ConfigErrors) as caught:
        loads(f"routes: {{r: {{{route}}}}}", "f", to_run=True)
    (error,) = caught.value.errors
    assert said in str(error)
    assert error.line == 1


def test_a_plan_names_who_is_believed_and_told(tmp_path: Path) -> None:
    """The plan of a route says whose headers are expected, and which sinks begin with one."""
    config = tmp_path / "relay.yaml"
    config.write_text(
        "routes:\n"
        "  a: {source: {listen: 'tcp://:1', proxy_protocol: [10.0.0.0/8, '192.0.2.1']},\n"
        "      stages: [{tee: {to: {connect: 'tcp://h:4', proxy_protocol: v1}}}], sink: 'tcp://h:5'}\n"
        "  b: {source: {listen: 'unix:///x', proxy_protocol: true}, duplex: true,\n"
        "      sink: {connect: ['tcp://h:2', 'tcp://h:3'], proxy_protocol: v2, transparent: true}}\n"
    )
    text = show_plan(str(config), "text")
    assert "expects PROXY headers from 10.0.0.0/8, 192.0.2.1/32" in text
    assert "tcp://h:4 (connects), begins with a PROXY header (v1)" in text
    assert "tcp://h:5 (connects), " not in text
    assert "expects PROXY headers from whoever may connect" in text
    assert "begins with a PROXY header (v2), from the peer's own address" in text


# --- with programs that nobody here wrote -------------------------------------------------------------------

TELLS = '"%[src]:%[src_port] %[dst]:%[dst_port]"'


@contextlib.contextmanager
def haproxy(directory: Path, body: str, *listening: socket.socket) -> Iterator[None]:
    """HAProxy with that configuration; it inherits the sockets, `fd@{0}` and so on in it."""
    config = directory / "haproxy.cfg"
    head = "global\n  maxconn 50\ndefaults\n  timeout client 20s\n  timeout server 20s\n"
    config.write_text(f"{head}  timeout connect 20s\n{body.format(*(sock.fileno() for sock in listening))}\n")
    argv = [program("haproxy"), "-db", "-f", str(config)]
    fds = [sock.fileno() for sock in listening]
    for fd in fds:
        os.set_inheritable(fd, True)
    with running(argv, pass_fds=fds, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL):
        yield


def asked(address: str) -> tuple[str, str, str]:
    """The body of a GET, and both ends of the connection it was asked over."""
    with connected(address) as client:
        ends = name_of(client), peer_of(client)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return receive_all(client).rpartition(b"\r\n\r\n")[2].decode(), *ends


def is_answered(address: str) -> bool:
    """Whether the server behind `address` is at work."""
    try:
        return bool(asked(address)[0])
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_from_haproxy(version: str, tmp_path: Path) -> None:
    """HAProxy in front sends a header of either version: relay names the client that connected to HAProxy."""
    with tcp_listener() as (front, address), behind(trusting()) as (duplex, listening):
        to = Address.parse(duplex.address)
        body = (
            f"listen l\n  mode tcp\n  bind fd@{{0}}\n  server s {to.host}:{to.port} {version}"
            + " proxy-v2-options unique-id\n  unique-id-format %[uuid()]" * (version == "send-proxy-v2")
        )
        with haproxy(tmp_path, body, front), connected(address) as client:
            own = name_of(client)
            client.sendall(b"question")
            with accept(listening) as server:
                assert receive_exactly(server, 8) == b"question"
                server.sendall(b"answer")
            assert receive_all(client) == b"answer"
            client.close()
            assert duplex.record().peer == own


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_to_haproxy(version: str, tmp_path: Path) -> None:
    """HAProxy behind accepts the header of either version: it knows who connected to relay, and where."""
    with tcp_listener() as (back, address):
        body = (
            "frontend f\n  mode http\n  bind fd@{0} accept-proxy\n"
            f"  http-request return status 200 content-type text/plain lf-string {TELLS}"
        )
        sink = {"connect": address, "proxy_protocol": version}
        with haproxy(tmp_path, body, back), Duplex("tcp://127.0.0.1:0", sink) as duplex:
            told, client, service = asked(duplex.address)
            assert told == f"{client} {service}"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_between_two_haproxies(version: str, tmp_path: Path) -> None:
    """HAProxy, relay, HAProxy: the last one knows the client of the first, and where that had connected to."""
    with tcp_listener() as (front, first), tcp_listener() as (back, address):
        sink = {"connect": address, "proxy_protocol": version}
        with Duplex(trusting(), sink) as duplex:
            to = Address.parse(duplex.address)
            body = (
                "frontend f\n  mode http\n  bind fd@{1} accept-proxy\n"
                f"  http-request return status 200 content-type text/plain lf-string {TELLS}\n"
                f"listen l\n  mode tcp\n  bind fd@{{0}}\n  server s {to.host}:{to.port} send-proxy-v2"
            )
            with haproxy(tmp_path, body, front, back):
                told, client, service = asked(first)
                assert told == f"{client} {service}"
                assert duplex.record().peer == client


def test_from_curl(tmp_path: Path) -> None:
    """curl sends a header of version 1, relay one of version 2: HAProxy behind knows where curl's connection is."""
    with tcp_listener() as (back, address):
        body = (
            "frontend f\n  mode http\n  bind fd@{0} accept-proxy\n"
            f"  http-request return status 200 content-type text/plain lf-string {TELLS}"
        )
        with haproxy(tmp_path, body, back):
            with Duplex(trusting(), {"connect": address, "proxy_protocol": "v2"}) as duplex:
                to = Address.parse(duplex.address)
                argv = [program("curl"), "-sS", "--haproxy-protocol", f"http://{to.host}:{to.port}/"]
                ran = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=True)
                record = duplex.record()
                assert ran.stdout == f"{record.peer} {to.host}:{to.port}"


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


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_to_nginx(version: str, tmp_path: Path) -> None:
    """nginx behind, on a unix socket: it knows who connected to relay, and where."""
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log stderr;\nevents {{}}\nhttp {{\n"
        f"  access_log off; client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path};\n"
        f"  fastcgi_temp_path {tmp_path}; uwsgi_temp_path {tmp_path}; scgi_temp_path {tmp_path};\n"
        f"  server {{ listen unix:{tmp_path}/s proxy_protocol;\n"
        '    return 200 "$proxy_protocol_addr:$proxy_protocol_port '
        '$proxy_protocol_server_addr:$proxy_protocol_server_port"; } }\n'
    )
    argv = [program("nginx"), "-p", str(tmp_path), "-c", str(config)]
    sink = {"connect": f"unix://{tmp_path}/s", "proxy_protocol": version}
    with running(argv, stderr=subprocess.DEVNULL), Duplex("tcp://127.0.0.1:0", sink) as duplex:
        eventually(lambda: is_answered(duplex.address), "nginx listens")
        told, client, service = asked(duplex.address)
        assert told == f"{client} {service}"
