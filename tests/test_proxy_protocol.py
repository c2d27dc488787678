"""PROXY headers when calls come short and room is scarce; what of them the configuration refuses and a plan says."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from duplexes import connected, outcome
from faults import ShortCounts, strace_prefix
from peers import accept, assert_same, payload, receive_all, receive_exactly, tcp_listener, unix_listener
from proxied import HEADERS, HERE
from relays import serving

from relay.config.load import loads
from relay.errors import ConfigErrors
from relay.planning.preflight import show_plan

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
