"""Peers that vanish, links that are slow, partitions that heal: on a network of the test's own (see netns.py)."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import PEER, RELAY, Network, network
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    send_all,
    wait_for,
)
from relays import Process, relay, serving

SLACK = 2.0  # seconds of a busy machine's own
SMALL = 128 << 10  # asked for by a receiver that must not have everything before the cable is pulled


@pytest.fixture
def net() -> Iterator[Network]:
    """The two hosts and their switch."""
    with network() as made:
        yield made


def route(
    port: int, dead_after: float, more: str = "", *, connections: str = "each", duplex: bool = False
) -> str:
    """A route from the relay's host to `port` of the peer's."""
    return f"""
routes:
  r:
    source: {{listen: "tcp://{RELAY}:0", connections: {connections}, dead_after: {dead_after}s}}
    sink: {{connect: "tcp://{PEER}:{port}", dead_after: {dead_after}s{more}}}
    duplex: {str(duplex).lower()}
"""


@contextlib.contextmanager
def relaying(
    net: Network, tmp_path: Path, listener: socket.socket, dead_after: float, more: str = "", **options: Any
) -> Iterator[tuple[Process, socket.socket, socket.socket]]:
    """relay at work on its host; a source there that has connected, and relay's connection to the peer."""
    config = route(listener.getsockname()[1], dead_after, more, **options)
    with (
        serving(config, tmp_path, prefix=net.prefix) as served,
        net.connected(net.relay, served.port()) as source,
        accept(listener) as sink,
    ):
        yield served, source, sink


def vanished(net: Network, source: socket.socket, sink: socket.socket) -> float:
    """Pulls the cable once some bytes went all the way; returns when."""
    send_all(source, b"x" * 1000)
    receive_exactly(sink, 1000)
    net.cut()
    return time.monotonic()


class Feeder:
    """Sends a payload from a thread of its own, since nobody may be there to take it; then ends the stream."""

    def __init__(self, sock: socket.socket, data: bytes) -> None:
        self._thread = threading.Thread(target=self._run, args=(sock, data))
        self._thread.start()

    def _run(self, sock: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            send_all(sock, data)
            sock.shutdown(socket.SHUT_WR)

    def join(self) -> None:
        """It has sent all, or its connection has ended."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def pass_time(seconds: float) -> None:
    """The behaviour under test is one over time."""
    until = time.monotonic() + seconds
    eventually(lambda: time.monotonic() >= until, "time passes")


def test_a_peer_that_vanishes_while_busy_is_found_within_dead_after(net: Network, tmp_path: Path) -> None:
    """With bytes outstanding a peer that is suddenly not there fails its sink after dead_after, in words."""
    with (
        net.listener() as listener,
        relaying(net, tmp_path, listener, 2) as (served, source, sink),
    ):
        cut_at = vanished(net, source, sink)
        send_all(source, b"y" * 20_000)
        (record,) = served.sessions()
        took = time.monotonic() - cut_at
    (said,) = record["sinks"]
    assert said["result"] == "failed"
    assert "writing to tcp://10.77.0.2" in said["reason"]
    assert "silent for 2 s with 19.5 KiB unacknowledged (ETIMEDOUT)" in said["reason"]
    assert said.get("lost", 0) == 20_000
    assert 1.9 < took < 2 + SLACK


def test_a_peer_that_vanishes_while_idle_is_found_within_dead_after(net: Network, tmp_path: Path) -> None:
    """With nothing outstanding keepalive finds the sink's peer that is not there any more."""
    with (
        net.listener() as listener,
        relaying(net, tmp_path, listener, 2) as (served, source, sink),
    ):
        cut_at = vanished(net, source, sink)
        (record,) = served.sessions()
        took = time.monotonic() - cut_at
    (said,) = record["sinks"]
    assert said["result"] == "failed"
    assert said.get("lost", 0) == 0
    assert took < 2 + SLACK


def test_a_source_that_vanishes_is_found_within_dead_after(net: Network, tmp_path: Path) -> None:
    """A source's peer that is not there any more fails the stream: its sink is told that it is not whole."""
    with net.listener() as listener, net.listener() as unused:
        config = route(listener.getsockname()[1], 2)
        with serving(config, tmp_path, prefix=net.prefix) as served:
            port = served.port()
            with net.connected(net.peer, port) as source, accept(listener) as sink:
                cut_at = vanished(net, source, sink)
                (record,) = served.sessions()
                took = time.monotonic() - cut_at
        del unused
    assert record["result"] == "failed"
    assert "reading from" in record["reason"]
    assert took < 2 + SLACK


def test_a_peer_that_vanishes_with_its_window_shut_is_found(net: Network, tmp_path: Path) -> None:
    """A receiver that has stalled and then vanishes leaves window probes unanswered, and is found by that."""
    with (
        net.listener(receive_buffer=8192) as listener,
        relaying(net, tmp_path, listener, 2) as (served, source, sink),
    ):
        feeder = Feeder(source, payload(1, 8 << 20))
        served.said("it holds the source")  # its window has been shut for a while
        net.cut()
        cut_at = time.monotonic()
        (record,) = served.sessions()
        took = time.monotonic() - cut_at
        feeder.join()
        assert sink.fileno() >= 0
    assert "silent for" in record["sinks"][0]["reason"]
    assert 1.0 < took < 3 + SLACK


def test_a_peer_with_its_window_shut_lives(net: Network, tmp_path: Path) -> None:
    """A receiver that reads nothing for several times dead_after is slow, not dead: it gets every byte."""
    data = payload(2, 4 << 20)
    with (
        net.listener(receive_buffer=8192) as listener,
        relaying(net, tmp_path, listener, 1) as (served, source, sink),
    ):
        feeder = Feeder(source, data)
        served.said("it holds the source")
        pass_time(4)
        assert_same(receive_all(sink), data)
        sink.close()
        (record,) = served.sessions()
        feeder.join()
    assert record["result"] == "delivered"


def test_a_partition_that_heals_in_time_loses_nothing(net: Network, tmp_path: Path) -> None:
    """Packets vanish for a third of dead_after, then come again: same connection, every byte."""
    data = payload(3, 4 << 20)
    with (
        net.listener(receive_buffer=SMALL) as listener,
        relaying(net, tmp_path, listener, 6) as (served, source, sink),
    ):
        feeder = Feeder(source, data)
        start = receive_exactly(sink, 1 << 20)
        net.cut()
        pass_time(2)
        net.heal()
        assert_same(start + receive_all(sink), data)
        sink.close()
        (record,) = served.sessions()
        feeder.join()
    (said,) = record["sinks"]
    assert (said["result"], said.get("reconnects", 0), said.get("lost", 0)) == ("delivered", 0, 0)


def test_a_partition_that_heals_late_loses_nothing_under_spill(net: Network, tmp_path: Path) -> None:
    """The connection is given up, a later one goes on with what was not acknowledged: all bytes, in order."""
    data = payload(4, 4 << 20)
    with (
        net.listener(receive_buffer=SMALL) as listener,
        relaying(net, tmp_path, listener, 1, ", on_slow: spill") as (served, source, sink),
    ):
        feeder = Feeder(source, data)
        first = receive_exactly(sink, 1 << 20)
        net.cut()
        feeder.join()  # the log takes it all: nobody is held
        served.said("is away")
        net.heal()
        with accept(listener) as second:
            rest = receive_all(second)
            second.close()
            (record,) = served.sessions()
        sink.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while piece := sink.recv(1 << 20):
                first += piece
    assert_same(first, data[: len(first)])
    assert_same(rest, data[len(data) - len(rest) :])
    assert len(first) + len(rest) >= len(data)
    assert record["result"] == "delivered"


def test_a_network_that_cannot_be_reached_is_named(net: Network, tmp_path: Path) -> None:
    """Without a route the sink's error names the operation, the address, the errno and what to look at."""
    to = "tcp://192.0.2.1:9"
    with relay("run", "null:", "--to", to, cwd=tmp_path, prefix=net.prefix) as process:
        assert process.wait() == 5
        said = process.text
    unreachable = (
        f"connecting to {to}: Network is unreachable (ENETUNREACH); is there a route to that network?"
    )
    assert unreachable in said


@pytest.mark.parametrize("policy", ["drop", "spill"])
def test_a_slow_link(net: Network, tmp_path: Path, policy: str) -> None:
    """Beside a receiver behind a slow link another gets all at its own pace; the slow one what its policy says."""
    # large fragments fill a pipe of 1 MiB with up to 8 MiB: only beyond that is anybody slow
    data = payload(5, 6 << 20 if policy == "spill" else 24 << 20)
    net.slow("16mbit")
    slow = "{policy: drop, after: 50ms, align: 188}" if policy == "drop" else "spill"
    with net.listener(receive_buffer=65536) as listener:
        port = listener.getsockname()[1]
        config = f"""
routes:
  r:
    source: {{listen: "tcp://{RELAY}:0"}}
    stages: [{{tee: {{to: {{connect: "tcp://{PEER}:{port}"}}, on_slow: {slow}}}}}]
    sink: {{file: "{{id}}.bin"}}
"""
        with (
            serving(config, tmp_path, prefix=net.prefix) as served,
            net.connected(net.relay, served.port()) as source,
            accept(listener) as sink,
        ):
            feeder = Feeder(source, data)
            feeder.join()
            got = receive_all(sink)
            sink.close()
            (record,) = served.sessions()
    assert_same((tmp_path / "1.bin").read_bytes(), data)
    said, file = record["sinks"]
    assert file["result"] == said["result"] == "delivered"
    assert said["bytes"] == len(got)
    assert said["bytes"] + said.get("dropped", 0) == len(data)
    assert said.get("lost", 0) == 0
    if policy == "spill":
        assert_same(got, data)
    else:
        assert said.get("dropped", 0) > 0
        assert said.get("dropped", 0) % 188 in (0, len(data) % 188)


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_duplex_peer_that_vanishes_is_found_within_dead_after(
    net: Network, tmp_path: Path, busy: bool
) -> None:
    """The sink's host of a duplex session vanishes, with bytes under way or without: the client is reset in time."""
    with (
        net.listener(SMALL) as listener,
        relaying(net, tmp_path, listener, 2, duplex=True) as (served, client, server),
    ):
        client.sendall(b"hello")
        assert receive_exactly(server, 5) == b"hello"
        net.cut()
        began = time.monotonic()
        if busy:
            client.sendall(payload(1, 100_000))
        client.settimeout(PATIENCE)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert 1 < time.monotonic() - began < 2 * 2 + SLACK
        (session,) = served.sessions(1)
        assert session["result"] == "failed"
        assert ("dead_after" if busy else "ETIMEDOUT") in session["reason"]


def test_a_duplex_peer_with_its_window_shut_lives(net: Network, tmp_path: Path) -> None:
    """A peer of a duplex session that reads nothing for longer than dead_after is slow, not dead."""
    with (
        net.listener(SMALL) as listener,
        relaying(net, tmp_path, listener, 2, duplex=True) as (_served, client, server),
    ):
        client.settimeout(5.0)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))  # far more than all queues hold
        assert receive_exactly(server, 1_000_000) == bytes(1_000_000)


def test_nothing_is_left_of_the_network() -> None:
    """What the tests make is gone when they end, and the machine's own network is as it was."""
    own = Path("/proc/net/dev").read_text().split("\n", 2)[2].count("\n")
    with network() as made:
        assert Path("/proc/net/dev").read_text().split("\n", 2)[2].count("\n") == own
        names = (made.relay, made.peer, made.switch)
        assert all(Path(f"/run/netns/{name}").exists() for name in names)
        with made.on(made.peer), socket.socket() as sock:
            sock.bind((PEER, 0))
            sock.listen(1)
            with pytest.raises(OSError, match=r"."), socket.create_connection((PEER, 1), 0.01):
                wait_for(sock)
    assert not any(Path(f"/run/netns/{name}").exists() for name in names)
