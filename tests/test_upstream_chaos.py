"""Upstreams that are killed, come back, refuse, hang and flap, with real listeners: whoever has a session keeps it,
whoever comes is served."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from duplexes import Duplex, connected, descriptors, in_background, outcome, turned_away
from peers import PATIENCE, accept, assert_same, eventually, hanging, payload, receive_exactly
from upstream_servers import HELLO, LISTEN, Client, Server, addresses, served_by, several, states


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Three that are up; all end with the test."""
    with several(3) as made:
        yield made


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
            assert json.loads(f"{{{record.as_json()}}}") == {"message": record.as_text(), **record.as_dict()}
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
