"""Upstreams that are killed, come back, refuse, hang and flap, with real listeners: whoever has a session keeps it,
whoever comes is served."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from admins import asked, figure, figures
from duplexes import Duplex, connected, descriptors, in_background, outcome, reset, turned_away
from netns import PEER, network
from peers import PATIENCE, accept, assert_same, eventually, payload, receive_exactly, tcp_listener
from relays import Process, run_relay, serving

HELLO = 8  # bytes: every server says its name first


class Server:
    """Says its name to whoever connects and echoes the rest; one thread for all of its connections. It can be killed,
    with everybody on it, and started again at its address."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name = name.ljust(HELLO).encode()
        self._at: Any = ("127.0.0.1", 0) if path is None else str(path)
        self._family = socket.AF_INET if path is None else socket.AF_UNIX
        self._listener: socket.socket | None = None
        self._connections: dict[int, socket.socket] = {}
        self._thread: threading.Thread | None = None
        self.served = 0
        self.start()

    @property
    def address(self) -> str:
        """As relay writes it."""
        return f"unix://{self._at}" if self._family == socket.AF_UNIX else f"tcp://127.0.0.1:{self._at[1]}"

    def start(self) -> None:
        """Listens, at the same address as before."""
        listener = self._listener = socket.socket(self._family)
        if self._family == socket.AF_UNIX:
            Path(self._at).unlink(missing_ok=True)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(self._at)
        listener.listen(128)
        listener.setblocking(False)
        self._at = listener.getsockname()
        self._wake, self._woken = socket.socketpair()
        self._thread = in_background(self._run, listener, self._woken, select.epoll())

    def _run(self, listener: socket.socket, woken: socket.socket, poll: select.epoll) -> None:
        with poll:
            poll.register(listener, select.EPOLLIN)
            poll.register(woken, select.EPOLLIN)
            while True:
                for fd, _mask in poll.poll():
                    if fd == woken.fileno():
                        return
                    if fd == listener.fileno():
                        with contextlib.suppress(OSError):  # it may be gone by now
                            sock = listener.accept()[0]
                            self._connections[sock.fileno()] = sock
                            poll.register(sock, select.EPOLLIN)
                            self.served += 1
                            sock.send(self.name)
                        continue
                    sock = self._connections[fd]
                    try:
                        piece = sock.recv(65536)
                        if piece:
                            sock.sendall(piece)
                            continue
                    except OSError:
                        pass
                    poll.unregister(fd)
                    del self._connections[fd]
                    sock.close()

    def kill(self) -> None:
        """Nobody listens any more, and whoever was connected is reset. Safe to call again."""
        if self._listener is None:
            return
        self._wake.close()
        assert self._thread is not None
        self._thread.join(PATIENCE)
        self._listener.close()
        self._woken.close()
        for sock in self._connections.values():
            reset(sock)
        self._connections.clear()
        self._listener = None


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Three that are up; all end with the test."""
    made = [Server(f"s{number}") for number in range(3)]
    yield made
    for server in made:
        server.kill()


LISTEN = {"listen": "tcp://127.0.0.1:0"}


def addresses(servers: list[Server]) -> list[str]:
    """As a sink's `connect` has them."""
    return [server.address for server in servers]


class Client:
    """A connection through relay: who serves it, and whether it still works."""

    def __init__(self, address: str, host: str = "", first: bytes = b"") -> None:
        if host:
            to = address.removeprefix("tcp://").rpartition(":")
            self.sock = socket.create_connection((to[0], int(to[2])), PATIENCE, (host, 0))
        else:
            self.sock = connected(address)
        self.sock.sendall(first)
        self.by = receive_exactly(self.sock, HELLO).decode().strip()
        self.chance = random.Random(1)

    def works(self, size: int = 1000) -> None:
        """What it sends comes back."""
        data = self.chance.randbytes(size)
        self.sock.sendall(data)
        assert_same(receive_exactly(self.sock, size), data)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.sock.close()


def served_by(duplex: Duplex, count: int = 12) -> list[str]:
    """Who serves newcomers, one after another."""
    found = []
    for _ in range(count):
        with Client(duplex.address) as client:
            client.works(10)
            found.append(client.by)
    return found


def states(duplex: Duplex) -> list[str]:
    """In the order of the configuration."""
    return [one.state for one in duplex.route.upstreams.snapshot()]


def test_round_robin_takes_turns_over_engines(servers: list[Server]) -> None:
    """Whichever engine has a session, each upstream gets its part; the record names the one that it was."""
    with Duplex(LISTEN, {"connect": addresses(servers)}, engines=2) as duplex:
        assert served_by(duplex) == ["s0", "s1", "s2"] * 4
        eventually(lambda: len(duplex.records) == 12, "all are over")
        sinks = [record.sinks[0] for record in duplex.records]
        assert {(sink.upstream, sink.tries) for sink in sinks} == {(each, 1) for each in addresses(servers)}
        assert all(not sink.passed_over for sink in sinks)
        assert [(one.sessions, one.served) for one in duplex.route.upstreams.snapshot()] == [(0, 4)] * 3


def test_least_connections_over_engines(servers: list[Server]) -> None:
    """Sessions that stay are spread evenly; who has lost some gets the next ones."""
    sink = {"connect": addresses(servers), "balance": "least_connections"}
    with Duplex(LISTEN, sink, engines=2) as duplex, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(duplex.address)) for _ in range(12)]
        assert sorted(client.by for client in clients) == ["s0"] * 4 + ["s1"] * 4 + ["s2"] * 4
        for client in clients:
            if client.by == "s1":
                client.sock.close()
        eventually(lambda: duplex.route.upstreams.snapshot()[1].sessions == 0, "they have left")
        assert [stack.enter_context(Client(duplex.address)).by for _ in range(4)] == ["s1"] * 4


def test_one_that_is_killed_takes_nobody_with_it(servers: list[Server]) -> None:
    """Its own sessions end with it; those of others go on, and whoever comes is served by others at the first try or
    the second."""
    with (
        Duplex(LISTEN, {"connect": addresses(servers)}, engines=2) as duplex,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(Client(duplex.address)) for _ in range(9)]
        servers[1].kill()
        for client in clients:
            if client.by == "s1":
                assert outcome(client.sock) == (b"", "ConnectionResetError")
            else:
                client.works()
        assert set(served_by(duplex)) == {"s0", "s2"}
        assert states(duplex) == ["up", "ejected", "up"]
        for client in clients:
            if client.by != "s1":
                client.works()
        eventually(lambda: len(duplex.records) == 15, "all but six are over")
        retried = [r.sinks[0] for r in duplex.records if r.sinks[0].tries == 2]
        assert retried
        assert dict(retried[0].passed_over)[servers[1].address] == "Connection refused (ECONNREFUSED)"
        assert all(sink.tries <= 2 for record in duplex.records for sink in record.sinks)


def test_one_that_comes_back_is_found(servers: list[Server]) -> None:
    """Without any checks: an upstream that is up again gets sessions again, soon."""
    with Duplex(LISTEN, {"connect": addresses(servers)}) as duplex:
        servers[2].kill()
        served_by(duplex, 6)
        assert states(duplex)[2] == "ejected"
        servers[2].start()
        eventually(lambda: "s2" in served_by(duplex, 3), "it serves again")
        eventually(lambda: states(duplex)[2] == "up", "it is taken back")
        assert set(served_by(duplex, 6)) == {"s0", "s1", "s2"}


def test_what_came_before_the_upstream_was_found_is_kept(servers: list[Server]) -> None:
    """A client that sends at once, and ends, loses nothing though two upstreams refuse first."""
    data = payload(1, 300_000)
    servers[0].kill()
    servers[1].kill()
    with Duplex(LISTEN, {"connect": addresses(servers), "balance": "first"}) as duplex:
        with connected(duplex.address) as client:
            client.sendall(data[:100_000])
            sender = in_background(lambda: (client.sendall(data[100_000:]), client.shutdown(socket.SHUT_WR)))
            got, end = outcome(client)
            sender.join(PATIENCE)
        assert (got[:2], end) == (b"s2", "end")
        assert_same(got[HELLO:], data)
        record = duplex.record()
        assert (record.result, record.sinks[0].upstream, record.sinks[0].tries) == (
            "delivered",
            servers[2].address,
            3,
        )
        assert [name for name, _why in record.sinks[0].passed_over] == addresses(servers[:2])


def test_a_record_with_upstreams_as_json(servers: list[Server]) -> None:
    """The template says the same as the record: the upstream, the tries, who was passed over and why."""
    servers[0].kill()
    with Duplex(LISTEN, {"connect": addresses(servers), "balance": "first"}) as duplex:
        served_by(duplex, 2)
        eventually(lambda: len(duplex.records) == 2, "both are over")
        for record in duplex.records:
            assert json.loads(f"{{{record.as_json()}}}") == record.as_dict()
        (first,), (second,) = (record.as_dict()["sinks"] for record in duplex.records)
        assert (first["upstream"], first["tries"], second["tries"]) == (servers[1].address, 2, 1)
        assert second["passed_over"][0]["why"].startswith("ejected: Connection refused")
        assert "passed over" in duplex.records[0].as_text()


def test_tries_are_bounded(servers: list[Server]) -> None:
    """With two tries a connection goes on to a second upstream and no further; the record has both reasons."""
    servers[0].kill()
    servers[1].kill()
    sink = {"connect": addresses(servers), "balance": "first", "tries": 2}
    with Duplex(LISTEN, sink) as duplex:
        assert turned_away(duplex.address)
        record = duplex.record()
        assert (record.result, record.sinks[0].tries, record.sinks[0].upstream) == ("failed", 2, "")
        assert record.reason.startswith(f"connecting to {servers[1].address}: Connection refused")
        assert record.sinks[0].passed_over == ((servers[0].address, "Connection refused (ECONNREFUSED)"),)
        assert served_by(duplex, 3) == ["s2"] * 3  # the next one does not begin with those two


def test_with_all_ejected_somebody_is_tried(servers: list[Server]) -> None:
    """All upstreams were away, and one is back before its time: the first newcomer is served all the same."""
    with Duplex(LISTEN, {"connect": addresses(servers), "tries": 3}) as duplex:
        for server in servers:
            server.kill()
        for _ in range(20):
            assert turned_away(duplex.address)
        assert states(duplex) == ["ejected"] * 3
        servers[1].start()
        assert served_by(duplex, 1) == ["s1"]
        eventually(lambda: states(duplex)[1] == "up", "it is taken back")


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """The address of a tcp listener whose backlog is full: connects to it hang."""
    with tcp_listener(backlog=0) as (listener, address), contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            if not select.select([], [sock], [], 0.1)[1]:
                break
        else:
            pytest.fail("the backlog is never full")
        yield address


def test_one_that_hangs_costs_its_share_of_time_once(servers: list[Server]) -> None:
    """An upstream that answers no connect: one client waits for a part of connect_timeout, the next ones not at all."""
    with hanging() as address:
        sink = {"connect": [address, servers[0].address], "balance": "first", "connect_timeout": "1s"}
        with Duplex(LISTEN, sink) as duplex:
            began = time.monotonic()
            assert served_by(duplex, 1) == ["s0"]
            assert 0.45 < time.monotonic() - began < 5
            began = time.monotonic()
            assert served_by(duplex, 1) == ["s0"]
            assert time.monotonic() - began < 0.4
            eventually(lambda: len(duplex.records) == 2, "both are over")
            assert dict(duplex.records[0].sinks[0].passed_over)[address] == "Connection timed out (ETIMEDOUT)"


def test_connect_timeout_is_for_all_tries_together() -> None:
    """Where every upstream hangs the client is reset when connect_timeout is over, not later."""
    with hanging() as one, hanging() as other:
        with Duplex(LISTEN, {"connect": [one, other], "connect_timeout": "0.6s"}) as duplex:
            began = time.monotonic()
            assert turned_away(duplex.address)
            assert 0.5 < time.monotonic() - began < 3
            record = duplex.record()
            assert "ETIMEDOUT" in record.reason
            assert (record.sinks[0].tries, len(record.sinks[0].passed_over)) == (2, 1)


def test_a_trial_holds_up_one_client_at_most(servers: list[Server]) -> None:
    """While one session tries an upstream that hangs, all others pass it over."""
    with hanging() as address:
        sink = {"connect": [address, servers[0].address], "balance": "first", "connect_timeout": "2s"}
        with Duplex(LISTEN, sink) as duplex:
            assert served_by(duplex, 1) == ["s0"]
            eventually(lambda: len(duplex.records) == 1, "it is over")
            times: list[float] = []

            def one() -> None:
                began = time.monotonic()
                served_by(duplex, 1)
                times.append(time.monotonic() - began)

            eventually(lambda: one() or max(times) > 0.5, "one was on trial")
            threads = [in_background(one) for _ in range(20)]
            for thread in threads:
                thread.join(PATIENCE)
            assert sum(each > 0.5 for each in times) <= 3, times


def test_a_unix_backlog_that_is_full(tmp_path: Path, servers: list[Server]) -> None:
    """A unix upstream whose backlog is full is passed over at once and not blamed; alone it is waited for."""
    path = tmp_path / "full"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(10):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            if sock.connect_ex(str(path)) == errno.EAGAIN:
                break
        sink = {"connect": [f"unix://{path}", servers[0].address], "balance": "first"}
        with Duplex(LISTEN, sink) as duplex:
            assert served_by(duplex, 3) == ["s0"] * 3
            assert states(duplex) == ["up", "up"]
        with Duplex(LISTEN, {"connect": f"unix://{path}"}) as duplex, connected(duplex.address) as client:
            client.sendall(b"late")
            got = b""
            while not got:  # those who filled the backlog say nothing
                sock = stack.enter_context(accept(listener))
                got = sock.recv(4) if select.select([sock], [], [], 0.2)[0] else b""
            assert got == b"late"


def test_unix_and_tcp_upstreams_side_by_side(tmp_path: Path, servers: list[Server]) -> None:
    """A local socket first and a host behind it: bulk goes both ways over each, by the method that suits it."""
    local = Server("local", tmp_path / "local")
    try:
        sink = {"connect": [local.address, servers[0].address], "balance": "first", "tries": 2}
        with Duplex(LISTEN, sink) as duplex:
            for name in ("local", "s0"):
                with Client(duplex.address) as client:
                    assert client.by == name
                    data = payload(3, 3_000_000)
                    sender = in_background(client.sock.sendall, data)
                    assert_same(receive_exactly(client.sock, len(data)), data)
                    sender.join(PATIENCE)
                local.kill()
            eventually(lambda: len(duplex.records) == 2, "both are over")
            assert [record.sinks[0].upstream for record in duplex.records] == [
                local.address,
                servers[0].address,
            ]
    finally:
        local.kill()


def test_failover_and_back(servers: list[Server]) -> None:
    """`first`: with the first away the second serves; when it is back newcomers go there, and those who are with the
    second stay with it."""
    with (
        Duplex(LISTEN, {"connect": addresses(servers), "balance": "first"}) as duplex,
        contextlib.ExitStack() as stack,
    ):
        assert served_by(duplex, 3) == ["s0"] * 3
        servers[0].kill()
        second = [stack.enter_context(Client(duplex.address)) for _ in range(5)]
        assert [client.by for client in second] == ["s1"] * 5
        servers[0].start()
        eventually(lambda: served_by(duplex, 1) == ["s0"], "the first serves again")
        eventually(lambda: states(duplex)[0] == "up", "and is taken back")
        assert served_by(duplex, 5) == ["s0"] * 5
        for client in second:
            client.works()


def test_source_hash_moves_the_clients_of_the_dead_only(servers: list[Server]) -> None:
    """Clients by their addresses: those of the upstream that is killed move, nobody else, and they come back."""
    hosts = [f"127.0.1.{number}" for number in range(1, 81)]

    def where(duplex: Duplex) -> dict[str, str]:
        found = {}
        for host in hosts:
            with Client(duplex.address, host) as client:
                found[host] = client.by
        return found

    listen = {"listen": "tcp://127.0.0.1:0"}
    with Duplex(listen, {"connect": addresses(servers), "balance": "source_hash"}, engines=2) as duplex:
        before = where(duplex)
        assert set(before.values()) == {"s0", "s1", "s2"}
        assert where(duplex) == before
        servers[0].kill()
        without = where(duplex)
        assert all(without[host] == by for host, by in before.items() if by != "s0")
        assert {without[host] for host, by in before.items() if by == "s0"} == {"s1", "s2"}
        servers[0].start()
        eventually(lambda: where(duplex) == before, "all are back where they were")


def test_flapping(servers: list[Server]) -> None:
    """Two of three upstreams come and go at random while clients come: every one of them is served, nobody who is with
    the third notices, and no descriptor is left."""
    chance = random.Random(7)
    before = descriptors()
    stop = threading.Event()
    failures: list[str] = []
    with Duplex(LISTEN, {"connect": addresses(servers)}, engines=2) as duplex:
        with contextlib.ExitStack() as stack:
            steady = [stack.enter_context(Client(duplex.address)) for _ in range(12)]
            steady = [client for client in steady if client.by == "s2"]
            assert len(steady) == 4

            def come() -> None:
                while not stop.is_set():
                    try:
                        with connected(duplex.address) as sock:
                            hello = sock.recv(HELLO)
                            if not hello.startswith(b"s"):
                                failures.append(f"got {hello!r}")
                    except ConnectionResetError:
                        pass  # its upstream was killed under it
                    except OSError as error:
                        failures.append(repr(error))

            clients = [in_background(come) for _ in range(3)]
            for _ in range(60):
                server = servers[chance.randrange(2)]
                if server._listener is None:
                    server.start()
                else:
                    server.kill()
                for client in steady:
                    client.works(chance.choice([1, 1000, 100_000]))
            stop.set()
            for thread in clients:
                thread.join(PATIENCE)
            assert not failures, failures[:5]
            refused = [r for r in duplex.records if r.result == "failed" and not r.sinks[0].upstream]
            assert not refused, refused[:2]
            assert len(duplex.records) > 100
            for client in steady:
                client.works()
        eventually(lambda: not duplex.route.under_way, "all are over")
        assert all(one.sessions == 0 for one in duplex.route.upstreams.snapshot())
    for server in servers:
        server.kill()
        server.start()
    assert not [thread for thread in clients if thread.is_alive()]
    eventually(lambda: descriptors() == before, f"of {descriptors()} descriptors {before} are left")


# -- checks

QUICK = {"every": "0.1s", "timeout": "0.5s", "fall": 2, "rise": 2}


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


# -- in the program itself


ANY = "tcp://127.0.0.1:0"  # the same one after a reload


def config(here: str, there: list[str], more: str = "") -> str:
    """One duplex route called r."""
    sink = json.dumps({"connect": there, "balance": "round_robin"})[1:-1]
    return (
        f'engines: 2\nroutes:\n  r: {{source: {{listen: "{here}"}}, sink: {{{sink}{more}}}, duplex: true}}\n'
    )


def test_an_upstream_is_drained_by_a_reload(tmp_path: Path, servers: list[Server]) -> None:
    """SIGHUP without one of three: it gets nobody new, and everybody goes on, those who are with it too; with a fourth
    in its place newcomers go there."""
    fourth = Server("s3")
    try:
        with serving(config(ANY, addresses(servers)), tmp_path) as relay, contextlib.ExitStack() as stack:
            (here,) = relay.addresses(1)
            clients = [stack.enter_context(Client(here)) for _ in range(6)]
            assert {client.by for client in clients} == {"s0", "s1", "s2"}
            relay.config.write_text(config(ANY, addresses([servers[0], fourth, servers[2]])))
            relay.signal(signal.SIGHUP)
            relay.said("reloaded")
            newcomers = [stack.enter_context(Client(here)) for _ in range(6)]
            assert {client.by for client in newcomers} == {"s0", "s2", "s3"}
            for client in (*clients, *newcomers):
                client.works()
            for client in clients:
                client.sock.close()
            sessions = relay.sessions(6)
            assert {session["sinks"][0]["upstream"] for session in sessions} == set(addresses(servers))
            assert all(session["result"] == "delivered" for session in sessions)
    finally:
        fourth.kill()


def test_what_a_running_relay_tells_of_upstreams(tmp_path: Path, servers: list[Server]) -> None:
    """Status and figures have each upstream with its state and its sessions; after a reload without one it is leaving
    for as long as it has sessions, and is counted once."""
    admin = f"admin: {{socket: 'unix://{tmp_path}/admin'}}\n"
    servers[2].kill()
    text = admin + config(ANY, addresses(servers), ", health: {every: 0.05s, fall: 2}")
    with serving(text, tmp_path) as relay, contextlib.ExitStack() as stack:
        relay.said("is down")
        relay.said("ready")
        (here,) = relay.addresses(1)
        clients = [stack.enter_context(Client(here)) for _ in range(4)]

        def told() -> list[tuple[str, str, int]]:
            routes = json.loads(asked(tmp_path / "admin", "/api/v1/status")[1])["routes"]
            route = next(route for route in routes if route["upstreams"])
            return [(one["upstream"], one["state"], one["sessions"]) for one in route["upstreams"]]

        one, other, dead = addresses(servers)
        assert told() == [(one, "up", 2), (other, "up", 2), (dead, "down", 0)]
        words = run_relay("status", "--admin", f"unix://{tmp_path}/admin", cwd=tmp_path).stdout.decode()
        assert f"{one}: up for " in words
        assert "Connection refused (ECONNREFUSED)" in words
        relay.config.write_text(admin + config(ANY, [one]))
        relay.signal(signal.SIGHUP)
        relay.said("reloaded")
        eventually(lambda: told() == [(one, "up", 2), (other, "leaving", 2)], "it is leaving")
        eventually(
            lambda: figure(figures(tmp_path / "admin"), "relay_upstream_sessions", upstream=one) == 2,
            "the route that was replaced tells of its upstreams no more",
        )
        found = figures(tmp_path / "admin")
        assert figure(found, "relay_upstream_state", upstream=other, state="leaving") == 1
        assert figure(found, "relay_upstream_state", upstream=one, state="up") == 1
        for client in clients:
            client.sock.close()
        relay.sessions(4)
        eventually(lambda: told() == [(one, "up", 0)], "the other has left")


def test_many_reloads_leave_nothing_behind(tmp_path: Path, servers: list[Server]) -> None:
    """Lists that change again and again, with checks at work and sessions that stay: in the end the process holds what
    it held before, and every session has gone on."""
    text = config(ANY, addresses(servers))
    with serving(text, tmp_path) as relay, contextlib.ExitStack() as stack:
        (here,) = relay.addresses(1)
        relay.said("ready")

        def held() -> tuple[int, int]:
            there = Path(f"/proc/{relay.pid}")
            return len(list((there / "fd").iterdir())), len(list((there / "task").iterdir()))

        with Client(here) as client:
            client.works()
        relay.sessions(1)
        before = held()
        clients = []
        for turn in range(12):
            clients.append(stack.enter_context(Client(here)))
            there = addresses(servers[turn % 3 :] + servers[: turn % 2])
            relay.config.write_text(
                config(ANY, list(dict.fromkeys(there)), ", health: {every: 0.02s, expect: s}")
            )
            relay.signal(signal.SIGHUP)
            eventually(lambda want=turn + 1: reloads(relay) == want, "it is reloaded")
        for client in clients:
            client.works()
            client.sock.close()
        relay.sessions(13)
        relay.config.write_text(text)
        relay.signal(signal.SIGHUP)
        eventually(lambda: reloads(relay) == 13, "it is reloaded")
        eventually(lambda: held() == before, "it holds what it held before")


def reloads(relay: Process) -> int:
    """How many there were so far."""
    with contextlib.suppress(AssertionError):
        relay._read(0.05)
    return sum(line.get("event") == "reload" for line in relay.lines)


def test_a_network_that_cannot_be_reached(tmp_path: Path) -> None:
    """An upstream to which there is no route costs nothing: the next one is tried at once."""
    with network() as net, contextlib.ExitStack() as stack:
        far = stack.enter_context(net.listener())
        there = ["tcp://203.0.113.1:9", f"tcp://{PEER}:{far.getsockname()[1]}"]
        with serving(config("tcp://:0", there), tmp_path, prefix=tuple(net.prefix)) as relay:
            port = relay.port()
            for _ in range(3):
                with net.connected(net.relay, port) as client, accept(far) as server:
                    client.sendall(b"x")
                    assert receive_exactly(server, 1) == b"x"
            first, second, _third = (session["sinks"][0] for session in relay.sessions(3))
            assert "ENETUNREACH" in first["passed_over"][0]["why"]
            assert (first["tries"], second["tries"]) == (2, 1)


def test_a_host_that_vanishes(tmp_path: Path, servers: list[Server]) -> None:
    """A black hole: packets to the first upstream's host just vanish. Checks find it, newcomers go to the second, whose
    sessions nothing touches, and when the cable is in again the first serves again."""
    with network() as net, contextlib.ExitStack() as stack:
        far = stack.enter_context(net.listener())
        with net.on(net.relay):
            near = socket.socket()
        stack.enter_context(near)
        near.bind(("127.0.0.1", 0))
        near.listen(8)

        def serve(listener: socket.socket, name: bytes) -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock = stack.enter_context(listener.accept()[0])
                    with contextlib.suppress(OSError):
                        sock.sendall(name.ljust(HELLO))

        for listener, name in ((far, b"far"), (near, b"near")):
            in_background(serve, listener, name)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
        there = [f"tcp://{PEER}:{far.getsockname()[1]}", f"tcp://127.0.0.1:{near.getsockname()[1]}"]
        more = ", balance: first, connect_timeout: 2s, health: {every: 0.2s, timeout: 0.3s, fall: 2, rise: 1}"
        text = config("tcp://:0", there, more).replace('"balance": "round_robin", ', "")
        text = text.replace(', "balance": "round_robin"', "")
        with serving(text, tmp_path, prefix=tuple(net.prefix)) as relay:
            port = relay.port()

            def by() -> str:
                with net.connected(net.relay, port) as sock:
                    return receive_exactly(sock, HELLO).decode().strip()

            assert by() == "far"
            net.cut()
            relay.said("is down")
            assert by() == "near"
            with net.connected(net.relay, port) as stays:
                receive_exactly(stays, HELLO)
                net.heal()
                relay.said("is up")
                eventually(lambda: by() == "far", "it serves again")
                stays.setblocking(False)
                with pytest.raises(BlockingIOError):
                    stays.recv(1)
