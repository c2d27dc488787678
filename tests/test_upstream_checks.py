"""Health checks of upstreams, with real listeners: who is found ill and well again, what is asked, what is left."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from duplexes import Duplex, connected, descriptors, in_background
from peers import PATIENCE, accept, eventually, hanging, receive_exactly, tcp_listener
from upstream_servers import LISTEN, Server, addresses, served_by, several, states

QUICK = {"every": "0.1s", "timeout": "0.5s", "fall": 2, "rise": 2}


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Three that are up; all end with the test."""
    with several(3) as made:
        yield made


def test_checks_take_one_out_and_back_without_any_client(servers: list[Server]) -> None:
    """An upstream that dies is found by checks, and when it is back it is found again; no client ever tries it."""
    sink = {"connect": addresses(servers), "balance": "first", "health": QUICK}
    with Duplex(LISTEN, sink) as duplex:
        assert served_by(duplex, 2) == ["s0"] * 2
        servers[0].kill()
        eventually(lambda: states(duplex)[0] == "down", "it is found")
        assert served_by(duplex, 2) == ["s1"] * 2
        why = duplex.route.upstreams.snapshot()[0].why
        assert "ECONNREFUSED" in why
        servers[0].start()
        eventually(lambda: states(duplex)[0] == "up", "it is found again")
        assert served_by(duplex, 2) == ["s0"] * 2
        eventually(lambda: len(duplex.records) == 6, "all are over")
        assert all(record.sinks[0].tries == 1 for record in duplex.records)
        passed = dict(duplex.records[2].sinks[0].passed_over)
        assert passed[servers[0].address].startswith("down: Connection refused")


class Answering:
    """A server that says what it was told to say to whoever asks, and keeps what it was asked."""

    def __init__(self) -> None:
        self.says: bytes | None = b"+PONG\r\n"
        self.asked: list[bytes] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Answering:
        self._listener, self.address = self._stack.enter_context(tcp_listener())
        self._thread = in_background(self._run)
        return self

    def _run(self) -> None:
        while True:
            try:
                sock, _peer = self._listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(1)
                with contextlib.suppress(OSError):
                    self.asked.append(sock.recv(100))
                    if self.says is None:
                        sock.recv(100)  # silent until the other side gives up
                    else:
                        sock.sendall(self.says)

    def __exit__(self, *_error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._stack.close()


def test_a_check_asks_and_looks_at_the_answer() -> None:
    """`send` is what the upstream hears, and only an answer that contains `expect` is a good one; silence is none."""
    health = {**QUICK, "timeout": "0.2s", "send": "PING\r\n", "expect": "+PONG"}
    with Answering() as one, Answering() as other:
        sink = {"connect": [one.address, other.address], "health": health}
        with Duplex(LISTEN, sink) as duplex:
            eventually(lambda: len(one.asked) > 2 and len(other.asked) > 2, "both were asked")
            assert set(one.asked) == {b"PING\r\n"}
            assert states(duplex) == ["up", "up"]
            one.says = b"-LOADING\r\n"
            other.says = None
            eventually(lambda: states(duplex) == ["down", "down"], "both are ill")
            why = [each.why for each in duplex.route.upstreams.snapshot()]
            assert why[0] == "it closed the connection; it said '-LOADING\\r\\n', '+PONG' was expected"
            assert why[1] == "no answer within 0.2 s; it said nothing, '+PONG' was expected"
            one.says = other.says = b"x" * 5000 + b"+PONG"
            eventually(lambda: states(duplex) == ["up", "up"], "both are well")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_check_introduces_nobody(version: str) -> None:
    """To an upstream that is sent PROXY headers a check says in one that there is no client, and then its question."""
    health = {**QUICK, "send": "PING\r\n", "expect": "+PONG"}
    with Answering() as one:
        sink = {"connect": one.address, "health": health, "proxy_protocol": version}
        with Duplex(LISTEN, sink) as duplex:
            eventually(lambda: one.asked, "it was asked")
            assert one.asked[0].endswith(b"PING\r\n")
            assert one.asked[0].startswith(
                b"PROXY UNKNOWN\r\n" if version == "v1" else b"\r\n\r\n\0\r\nQUIT\n"
            )
            assert states(duplex) == ["up"]


def test_a_check_that_fails_at_the_start_counts_at_once(servers: list[Server]) -> None:
    """An upstream that is away when relay starts is down after the first check of many that it takes later."""
    servers[0].kill()
    sink = {"connect": addresses(servers), "health": {"every": "0.2s", "fall": 1000}}
    with Duplex(LISTEN, sink) as duplex:
        eventually(lambda: states(duplex) == ["down", "up", "up"], "it was checked")
        assert duplex.route.upstreams.snapshot()[0].failed_checks < 10


def test_checks_hold_no_descriptors(servers: list[Server]) -> None:
    """Checks that succeed, fail and hang leave nothing behind when the route ends in the midst of them."""
    servers[0].kill()
    before = descriptors()
    with hanging() as address:
        health = {"every": "0.05s", "timeout": "5s", "expect": "never said"}
        with Duplex(LISTEN, {"connect": [*addresses(servers), address], "health": health}) as duplex:
            eventually(lambda: servers[1].served and servers[2].served, "they are asked")
            eventually(lambda: states(duplex)[0] == "down", "one is down")
            duplex.drain()
            duplex.over()
        eventually(lambda: not servers[1]._connections, "no check is under way")
    eventually(lambda: descriptors() == before, "the servers have closed their ends as well")


def test_every_try_begins_with_the_header(servers: list[Server]) -> None:
    """The second upstream that is tried gets the whole PROXY header, then what the client had sent."""
    servers[0].kill()
    with tcp_listener() as (listener, address):
        sink = {"connect": [servers[0].address, address], "balance": "first", "proxy_protocol": "v1"}
        with Duplex(LISTEN, sink) as duplex, connected(duplex.address) as client:
            client.sendall(b"hello")
            with accept(listener) as server:
                host, port = client.getsockname()
                header = (
                    f"PROXY TCP4 {host} 127.0.0.1 {port} {duplex.address.rpartition(':')[2]}\r\n".encode()
                )
                assert receive_exactly(server, len(header) + 5) == header + b"hello"
