"""What a running relay is asked, and what answering costs it: a server in this process, its engines slow or stuck."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from admins import figure, figures
from mirrors import Mirror
from peers import PATIENCE, eventually, payload, tcp_listener
from relays import serving

from relay.admin import desk as desk_of
from relay.admin import inquiry
from relay.admin.desk import Desk
from relay.admin.inquiry import Round
from relay.admin.ledger import Ledger
from relay.admin.status import RouteStatus, SinkStatus, Status
from relay.config.data import from_data
from relay.engine import Engine
from relay.serving.server import Server


class Asked:
    """A server on a thread of its own, and its desk."""

    def __init__(self, routes: dict[str, Any], **top: Any) -> None:
        self.ledger = Ledger()
        ready = threading.Event()
        config = from_data({"routes": routes, "drain": 0, "engines": 2, **top}, "test")
        self.server = Server(
            config, on_record=self.ledger.add, on_ready=lambda _routes: ready.set(), signals=False
        )
        self.desk = Desk(self.server, self.ledger, "test")
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        assert ready.wait(PATIENCE)

    def close(self) -> None:
        """Ends it."""
        self.server.end()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def port(self, route: str) -> int:
        """Where that route listens."""
        running = next(one for one in self.server.routes if one.name == route)
        return int(running.bound[-1].rpartition(":")[2])


def all_answered(asked: Asked) -> Status | None:
    """A look at it, if no engine was late."""
    status = asked.desk._inquiry.look()
    return None if any(route.unanswered for route in status.routes) else status


Make = Callable[..., Asked]


@pytest.fixture
def serve() -> Iterator[Make]:
    """Makes servers that are ended with the test."""
    made: list[Asked] = []

    def make(routes: dict[str, Any], **top: Any) -> Asked:
        made.append(Asked(routes, **top))
        return made[-1]

    yield make
    for one in made:
        one.close()


INBOX = {"source": "tcp://127.0.0.1:0", "sink": "null:", "method": "copy"}


def test_an_engine_that_is_late_is_told_as_before(serve: Make) -> None:
    """Whoever asks waits for a second and no longer; what an engine did not answer is as it was, and said so."""
    asked = serve({"a": INBOX, "b": INBOX})
    before = asked.desk.status()
    assert not any(route.unanswered for route in before.routes)
    late, other = asked.server.engines
    let_go = threading.Event()
    late.post(lambda: let_go.wait(PATIENCE) and None)
    try:
        began = time.monotonic()
        status = asked.desk._inquiry.look()
        took = time.monotonic() - began
    finally:
        let_go.set()
    assert 0.5 < took < 2
    homes = {route.name: route.home for route in asked.server.routes}
    assert {route.name: route.unanswered for route in status.routes} == {
        name: home is late for name, home in homes.items()
    }
    assert [engine.lag is None for engine in status.engines] == [engine is late for engine in (late, other)]
    after = eventually(lambda: all_answered(asked), "all answer")
    assert [route.name for route in after.routes] == ["a", "b"]


def test_alive_is_who_answers(serve: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is late is given time; one that has not answered for longer than that is not alive."""
    monkeypatch.setattr(desk_of, "ANSWER", 0.05)
    monkeypatch.setattr(desk_of, "STUCK", 0.3)
    asked = serve({"a": INBOX})
    assert asked.desk.live() == (True, "alive")
    let_go = threading.Event()
    asked.server.engines[1].post(lambda: let_go.wait(PATIENCE) and None)
    try:
        assert asked.desk.live() == (True, "alive")
        _good, words = eventually(lambda: (a := asked.desk.live()) and not a[0] and a, "it is found")
        assert words == "engine-1 has not answered for more than 0.3 s"
    finally:
        let_go.set()
    assert eventually(lambda: asked.desk.live()[0], "it is alive again")


def test_looking_leaves_room_between_slices(fds: Any) -> None:
    """A long look is taken in slices: what an engine has to do besides is done in between."""
    engine = Engine("sliced")
    engine.start()
    try:
        order: list[str] = []

        def look() -> Iterator[None]:
            for number in range(40):
                until = time.monotonic() + inquiry.SLICE
                while time.monotonic() < until:
                    pass
                order.append("look")
                if number == 0:
                    engine.later(0.0, lambda: order.append("other"))
                yield

        asking = Round()
        asking.ask(engine, look())
        asking.wait(time.monotonic() + PATIENCE)
        assert order.count("look") == 40
        assert order.index("other") < 10
        assert asking.answered == {engine}
    finally:
        engine.stop()


def test_who_answers_at_once_ends_no_round(fds: Any) -> None:
    """An engine that answers before another was asked does not end the waiting for that one."""
    quick, slow = Engine("quick"), Engine("slow")
    quick.start()
    slow.start()
    try:
        for _ in range(20):
            asking = Round()
            asking.ask(quick, iter(()))
            eventually(lambda: quick in asking.answered, "the first has answered")  # noqa: B023 - asked at once
            asking.ask(slow, iter(()))
            asking.wait(time.monotonic() + PATIENCE)
            assert asking.answered == {quick, slow}
    finally:
        quick.stop()
        slow.stop()


def test_a_look_that_fails_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """A bug in looking holds up nobody who asks."""
    engine = Engine("failing")
    engine.start()

    def look() -> Iterator[None]:
        yield
        raise ZeroDivisionError

    try:
        asking = Round()
        asking.ask(engine, look())
        asking.wait(time.monotonic() + PATIENCE)
        assert asking.answered == {engine}
    finally:
        engine.stop()


def test_duplex_sessions_are_summed_up(serve: Make) -> None:
    """Of many sessions both directions are summed while they are open and when they are over, exactly."""
    with tcp_listener() as (listening, address):
        asked = serve({"d": {"source": "tcp://127.0.0.1:0", "duplex": True, "sink": address}})
        clients, servers = [], []
        try:
            for _ in range(50):
                clients.append(socket.create_connection(("127.0.0.1", asked.port("d")), timeout=PATIENCE))
                servers.append(listening.accept()[0])
            for number, (client, server) in enumerate(zip(clients, servers, strict=True)):
                client.sendall(b"x" * number)
                server.sendall(b"y" * 2 * number)
            total = sum(range(50))

            def route() -> RouteStatus:
                return asked.desk.status().routes[0]

            eventually(lambda: (route().bytes, route().bytes_back) == (total, 2 * total), "all has passed")
            assert route().streams == 50
            assert sum(hop.streams for hop in route().hops) == 100
        finally:
            for sock in (*clients, *servers):
                sock.close()
        eventually(lambda: sum(route().sessions.values()) == 50, "all are over")
        assert (route().bytes, route().bytes_back, route().streams) == (total, 2 * total, 0)


def test_mirrors_of_duplex_sessions_are_told_while_they_are_open(serve: Make, tmp_path: Path) -> None:
    """The sinks of tees of both ways, each once however many sessions have it: its state, what it has and what it did
    not get while sessions are open, the same when they are over, and in metrics without a label more."""
    count, size = 12, 3000
    with (
        tcp_listener() as (listening, address),
        Mirror(tmp_path) as mirror,
        Mirror(tmp_path, deaf=True) as deaf,
    ):
        waits = {"policy": "spill", "then": "drop", "max": "1MB"}
        back = [
            {"tee": {"to": f"{tmp_path}/{{id}}.replies", "name": "kept"}},
            {"tee": {"to": deaf.address, "on_slow": waits, "name": "deaf"}},
        ]
        there = [{"tee": {"to": mirror.address, "name": "copy"}}]
        route = {
            "source": "tcp://127.0.0.1:0", "duplex": True, "sink": address, "stages": there, "replies": back,
        }  # fmt: skip
        asked = serve({"d": route})
        clients, servers = [], []

        def told() -> dict[str, SinkStatus]:
            return {sink.sink: sink for sink in asked.desk.status().routes[0].sinks}

        def sent() -> tuple[int, ...]:
            found = told()
            return tuple(found[name].bytes for name in ("copy", "kept", address))

        assert [sink.state for sink in told().values()] == ["none"] * 4
        try:
            for _ in range(count):
                clients.append(socket.create_connection(("127.0.0.1", asked.port("d")), timeout=PATIENCE))
                servers.append(listening.accept()[0])
            for client, server in zip(clients, servers, strict=True):
                client.sendall(bytes(size))
                server.sendall(bytes(2 * size))
            whole = (count * size, 2 * count * size, count * size)
            eventually(lambda: sent() == whole, "mirrors and sink have it all")
            found = told()
            assert (found["copy"].state, found["kept"].state) == ("open", "open")
            assert (found["deaf"].policy, found["deaf"].reason) == ("spill", "")
            hops = {hop.hop: hop.streams for hop in asked.desk.status().routes[0].hops}
            assert (hops["copy"], hops["kept"], hops[address], hops["source"]) == (count,) * 4
            scraped = asked.desk.metrics("")[0].decode()
            assert 'relay_sink_sent_bytes_total{route="d",sink="copy"} 36000.0' in scraped
            assert set(re.findall(r'sink="([^"]*)"', scraped)) == {"copy", "kept", "deaf", address}
        finally:
            for sock in (*clients, *servers):
                sock.close()
        eventually(lambda: sum(asked.desk.status().routes[0].sessions.values()) == count, "all are over")
        assert sent() == whole
        assert {sink.state for sink in told().values()} == {"none"}


def test_refusals_count_on_through_a_reload(tmp_path: Path) -> None:
    """A route that is exchanged has refused what it has refused: the figure goes on."""
    config = (
        "admin: {socket: 'unix://admin.sock'}\ndrain: 0s\nroutes:\n"
        "  r: {source: {listen: 'tcp://127.0.0.1:0', limits: {deny: ['127.0.0.1']}}, sink: 'null:'}\n"
    )

    def refused() -> float:
        return figure(figures(tmp_path / "admin.sock"), "relay_route_refused_connections_total")

    def come(port: int) -> None:
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock,
        ):
            sock.recv(1)

    with serving(config, tmp_path) as process:
        process.said("ready")
        port = process.port()
        for _ in range(3):
            come(port)
        eventually(lambda: refused() == 3, "three are counted")
        process.config.write_text(config.replace("sink: 'null:'", "sink: 'null:', method: copy"))
        process.signal(signal.SIGHUP)
        process.said("reloaded: changed r")
        come(port)
        eventually(lambda: refused() == 4, "the fourth is counted beside them")


def test_what_subscribers_got_counts_on(serve: Make) -> None:
    """The bytes of all subscribers are summed, of those who left too."""
    asked = serve({"b": {"source": "tcp://127.0.0.1:0", "sink": {"listen": "tcp://127.0.0.1:0"}}})
    into, out = (int(where.rpartition(":")[2]) for where in reversed(asked.server.routes[0].bound))

    def sink() -> SinkStatus:
        return asked.desk._inquiry.look().routes[0].sinks[0]

    with socket.create_connection(("127.0.0.1", into), timeout=PATIENCE) as source:
        for number in range(1, 4):
            with socket.create_connection(("127.0.0.1", out), timeout=PATIENCE) as reader:
                eventually(lambda: sink().subscribers == 1, "it has joined")
                source.sendall(b"x" * 1000)
                assert len(reader.recv(1000, socket.MSG_WAITALL)) == 1000
                reader.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )  # it leaves by a reset
                eventually(lambda: sink().given == 1000 * number, "it is counted")  # noqa: B023 - asked at once
            eventually(lambda: sink().subscribers == 0, "it has left")
            assert sink().given == 1000 * number
    for _ in range(20):  # the session ends meanwhile
        assert sink().bytes == 3000
    eventually(lambda: asked.desk._inquiry.look().routes[0].sessions["delivered"] == 1, "the session is over")
    assert sink().bytes == 3000


def test_a_stream_is_not_held_up_by_scrapes(serve: Make) -> None:
    """While it is asked without a pause a stream of many streams' route passes whole, and nobody is late."""
    asked = serve({"a": INBOX})
    over = threading.Event()
    counts: list[int] = []

    def scrape() -> None:
        while not over.is_set():
            asked.desk._last = None
            counts.append(len(asked.desk.metrics("")[0]))

    with Connections(asked.port("a"), 60) as idle:
        eventually(lambda: asked.desk.status().routes[0].streams == len(idle), "all are there")
        thread = threading.Thread(target=scrape)
        thread.start()
        try:
            with socket.create_connection(("127.0.0.1", asked.port("a")), timeout=PATIENCE) as sock:
                for _ in range(64):
                    sock.sendall(payload(1, 1 << 20))
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
        finally:
            over.set()
            thread.join()
    assert len(counts) >= 3
    assert asked.ledger.totals(["a"])["a"].bytes >= 64 << 20


class Connections:
    """So many connections to a port."""

    def __init__(self, port: int, count: int) -> None:
        self._socks = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(count)]

    def __enter__(self) -> list[socket.socket]:
        return self._socks

    def __exit__(self, *_error: object) -> None:
        for sock in self._socks:
            sock.close()


def test_a_log_that_is_behind_says_for_how_long(serve: Make, tmp_path: Path) -> None:
    """A sink that is away has its backlog and the age of it in the status; both are gone when it has all."""
    with tcp_listener() as (listening, address):
        listening.close()
        slow = {"policy": "spill", "directory": str(tmp_path / "s")}
        asked = serve({"a": {"source": "tcp://127.0.0.1:0", "sink": {"connect": address, "on_slow": slow}}})
        with socket.create_connection(("127.0.0.1", asked.port("a")), timeout=PATIENCE) as sock:
            sock.sendall(payload(1, 200_000))
            sink = eventually(
                lambda: (one := asked.desk.status().routes[0].sinks[0]).backlog == 200_000 and one, "it waits"
            )
            assert sink.state == "away"
            assert sink.spill is not None
            assert sink.spill.directory.startswith(str(tmp_path / "s"))
            first = sink.spill.age

            def older() -> bool:
                spill = asked.desk.status().routes[0].sinks[0].spill
                return spill is not None and spill.bytes == 200_000 and spill.age > first + 0.2

            eventually(older, "it ages")
