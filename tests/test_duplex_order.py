"""Connections of one client reach a duplex route's sink in the order in which it made them, with any number of engines.

Programs tell their connections apart by it (`iperf3 --bidir`). `RELAY_ROUNDS=N` plays N rounds instead of a few.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from duplexes import Duplex, connected, in_background, listener, outcome
from peers import PATIENCE, accept, eventually, receive_exactly, refused_address, tcp_listener
from real_servers import found, free_port, server
from stories import SHAPES

from relay.endpoints import tcp
from relay.engine import Engine

ROUNDS = int(os.environ.get("RELAY_ROUNDS", "15"))
ENGINES = 4
HERE = {"listen": "tcp://127.0.0.1:0"}


@contextmanager
def held(duplex: Duplex) -> Iterator[None]:
    """All engines but the one that accepts do nothing meanwhile."""
    go = threading.Event()
    for engine in duplex.engines[1:]:
        engine.post(lambda: None if go.wait(PATIENCE) else pytest.fail("nobody let it go"))
    try:
        yield
    finally:
        go.set()


def numbered(duplex: Duplex, count: int, stack: ExitStack) -> list[socket.socket]:
    """So many connections, one after another, each of which sends its number."""
    clients = []
    for number in range(count):
        clients.append(stack.enter_context(connected(duplex.address)))
        clients[-1].sendall(bytes([number]))
    return clients


def in_order(listening: socket.socket, count: int, stack: ExitStack) -> list[int]:
    """The numbers of as many connections as they are accepted."""
    servers = [stack.enter_context(accept(listening)) for _ in range(count)]
    return [receive_exactly(server, 1)[0] for server in servers]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sink", ["tcp", "unix"])
def test_engines_that_are_busy_let_nobody_overtake(tmp_path: Path, sink: str, shape: str) -> None:
    """Connections that are spread over four engines, of which three are held up, reach the sink in their order."""
    count = 40
    with (
        listener(sink, tmp_path, "sink") as (listening, address),
        Duplex(HERE, {"connect": address}, engines=ENGINES, **SHAPES[shape]) as duplex,
        ExitStack() as stack,
    ):
        with held(duplex):
            numbered(duplex, count, stack)
            eventually(lambda: duplex.route.facts().connections == count, "all are accepted")
        assert in_order(listening, count, stack) == list(range(count))
        assert all(len(duplex.route._sessions[engine]) == count // ENGINES for engine in duplex.engines)


def test_names_that_are_looked_up_let_nobody_overtake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that wait for the sink's name to be looked up are connected in their order once it is."""
    count, answer = 40, threading.Event()
    known = tcp.lookup

    def slow(host: str, port: int, **more: Any) -> list[tuple[int, Any]]:
        assert host != "slow.test" or answer.wait(PATIENCE)
        return known("127.0.0.1" if host == "slow.test" else host, port, **more)

    monkeypatch.setattr(tcp, "lookup", slow)
    with (
        tcp_listener() as (listening, address),
        Duplex(HERE, {"connect": address.replace("127.0.0.1", "slow.test")}, engines=ENGINES) as duplex,
        ExitStack() as stack,
    ):
        numbered(duplex, count, stack)
        eventually(lambda: duplex.route.facts().connections == count, "all are accepted")
        assert duplex.route.under_way
        answer.set()
        assert in_order(listening, count, stack) == list(range(count))


def test_an_end_while_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that wait for a name are reset when the route is given up, each with its record."""
    answer = threading.Event()
    known = tcp.lookup

    def slow(host: str, port: int, **more: Any) -> list[tuple[int, Any]]:
        assert host != "slow.test" or answer.wait(PATIENCE)
        return known("127.0.0.1" if host == "slow.test" else host, port, **more)

    monkeypatch.setattr(tcp, "lookup", slow)
    with Duplex(HERE, {"connect": "tcp://slow.test:9"}, engines=ENGINES) as duplex, ExitStack() as stack:
        clients = numbered(duplex, 8, stack)
        eventually(lambda: duplex.route.facts().connections == 8, "all are accepted")
        duplex.engines[0].post(lambda: duplex.route.abort("no more"))
        assert [outcome(client) for client in clients] == [(b"", "ConnectionResetError")] * 8
        duplex.over()
        assert {(one.result, one.reason) for one in duplex.records} == {("failed", "no more")}
        assert len(duplex.records) == 8
        answer.set()


@contextmanager
def elsewhere(duplex: Duplex) -> Iterator[socket.socket]:
    """A client whose session is not on the engine that accepts; it sends a byte."""
    duplex.engines[0].call(lambda: next(duplex.route._spread))
    with connected(duplex.address) as client:
        client.sendall(b"x")
        yield client


@pytest.mark.parametrize("away", ["tcp", "unix"])
def test_a_first_connect_that_fails_is_followed_by_another(tmp_path: Path, away: str) -> None:
    """A connect that was begun for another engine and failed, at once or later: another upstream is tried, and what is
    told of both is as if that engine had begun it."""
    gone = refused_address() if away == "tcp" else f"unix://{tmp_path}/nobody"
    with (
        tcp_listener() as (listening, address),
        Duplex(HERE, {"connect": [gone, address], "balance": "first"}, engines=2) as duplex,
    ):
        with elsewhere(duplex), accept(listening) as server:
            assert receive_exactly(server, 1) == b"x"
            assert len(duplex.route._sessions[duplex.engines[1]]) == 1
        sink = duplex.record().sinks[0]
        assert (sink.upstream, sink.tries, [name for name, _why in sink.passed_over]) == (address, 2, [gone])
        first, second = duplex.route.upstreams.snapshot()
        assert (first.state, first.sessions, first.served, first.fails) == ("ejected", 0, 0, 1)
        assert (second.state, second.sessions, second.served) == ("up", 0, 1)


def test_a_first_connect_that_hears_nothing_is_given_up() -> None:
    """A connect that was begun for another engine has its share of the time to connect, then another upstream is
    tried."""
    with (
        tcp_listener(backlog=0) as (full, silent),
        tcp_listener() as (listening, address),
        ExitStack() as stack,
    ):
        for _ in range(3):  # its backlog is full: the kernel answers no more
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        sink = {"connect": [silent, address], "balance": "first", "connect_timeout": "1s"}
        with Duplex(HERE, sink, engines=2) as duplex:
            with elsewhere(duplex), accept(listening) as server:
                assert receive_exactly(server, 1) == b"x"
            told = duplex.record().sinks[0]
            assert (told.upstream, told.tries) == (address, 2)
            assert "ETIMEDOUT" in dict(told.passed_over)[silent]


def test_many_rounds_of_connections_in_order(tmp_path: Path) -> None:
    """Clients that each make a few connections, one after another, again and again, from many threads at once, while
    bytes flow: nobody's connections reach the sink in another order than his."""
    who, each = 6, 5
    with (
        listener("unix", tmp_path, "sink") as (listening, address),
        Duplex(HERE, {"connect": address}, engines=ENGINES) as duplex,
    ):
        listening.listen(1024)  # one that finds the backlog full is tried again, behind others
        came: list[bytes] = []

        def serve() -> None:
            for _ in range(ROUNDS * who * each):
                with accept(listening) as server:
                    came.append(receive_exactly(server, 4))

        def play(client: int) -> None:
            for turn in range(ROUNDS):
                with ExitStack() as stack:
                    for number in range(each):
                        sock = stack.enter_context(connected(duplex.address))
                        sock.sendall(bytes([client, number]) + turn.to_bytes(2, "big"))

        threads = [in_background(serve), *(in_background(play, client) for client in range(who))]
        for thread in threads:
            thread.join(PATIENCE + ROUNDS)
        for client in range(who):
            order = [(turn, number) for turn in range(ROUNDS) for number in range(each)]
            said = [(int.from_bytes(one[2:], "big"), one[1]) for one in came if one[0] == client]
            assert said == order


@contextmanager
def stuttering(duplex: Duplex) -> Iterator[None]:
    """Every engine but the one that accepts does nothing now and then, for a while."""
    over, chance = threading.Event(), random.Random(7)

    def stutter(engine: Engine) -> None:
        if not over.wait(chance.uniform(0, 0.02)):
            engine.later(chance.uniform(0, 0.01), partial(stutter, engine))

    for engine in duplex.engines[1:]:
        engine.post(partial(stutter, engine))
    try:
        yield
    finally:
        over.set()


def test_iperf3_both_ways_again_and_again(tmp_path: Path) -> None:
    """`iperf3 --bidir -P 2`, which knows its four streams by the order of their connections, moves bytes on each of
    them in every round through four engines that stutter."""
    port, log = free_port(), tmp_path / "iperf3.log"
    argv = [found("iperf3"), "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush"]
    with (
        server(argv, port, log, says="Server listening"),
        Duplex(HERE, {"connect": f"tcp://127.0.0.1:{port}"}, engines=ENGINES) as duplex,
        stuttering(duplex),
    ):
        to = duplex.address.rpartition(":")[2]
        for turn in range(ROUNDS // 2):
            eventually(
                lambda turn=turn: log.read_text().count("Server listening") > turn, "it is ready again"
            )
            words = ["-c", "127.0.0.1", "-p", to, "--bidir", "-P", "2", "-b", "20M", "-n", "2M", "-J"]
            done = subprocess.run(
                [argv[0], *words], stdin=subprocess.DEVNULL, stdout=-1, timeout=PATIENCE, check=False
            )
            told = json.loads(done.stdout)
            assert done.returncode == 0, told["error"]
            moved = [one["receiver"]["bytes"] for one in told["end"]["streams"]]
            assert len(moved) == 4
            assert all(moved), f"round {turn}: of a stream that one end sends on the other does, too: {moved}"
