"""Duplex routes: what either side does, the other sees as over one connection.

`RELAY_EXAMPLES=N` runs the random schedules N times instead of a few.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from duplexes import (
    Duplex,
    connected,
    descriptors,
    direct,
    in_background,
    listener,
    outcome,
    relayed,
    reset,
    turned_away,
)
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    refused_address,
    tcp_listener,
)
from stories import MIXES, RESETS, SHAPES, STORIES, Ends, client_ends_first, client_resets, play

from relay.endpoints import tcp
from relay.endpoints.pacing import paced
from relay.kernel.exchange import PIPES

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "12"))


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
@pytest.mark.parametrize(("source", "sink"), MIXES)
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_ends_pass_as_over_one_connection(
    tmp_path: Path, story: Callable[..., list[Ends]], source: str, sink: str, method: str, shape: str
) -> None:
    """Through relay both sides see the bytes and the ends that they see without it, with stages or none."""
    with direct(source, tmp_path) as (client, server):
        expected = story(client, server)
    with relayed(source, sink, tmp_path, method=method, **SHAPES[shape]) as (client, server, _duplex):
        assert story(client, server) == expected


@pytest.mark.parametrize("story", RESETS, ids=lambda story: story.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_resets_pass_as_resets(tmp_path: Path, story: Callable[..., list[Ends]], shape: str) -> None:
    """A reset of either side is a reset for the other, after what had arrived, with stages or none."""
    with direct("tcp", tmp_path) as (client, server):
        expected = story(client, server)
    assert expected[-1][1] == "ConnectionResetError"
    with relayed("tcp", "tcp", tmp_path, **SHAPES[shape]) as (client, server, duplex):
        assert story(client, server) == expected
        record = duplex.record()
        assert record.result == "failed"
        assert record.ended_by == ("source" if story.__name__.startswith("client") else "sinks")
        assert "ECONNRESET" in record.reason


def test_a_reset_reaches_a_side_that_does_not_read(tmp_path: Path) -> None:
    """A client that resets while the server takes nothing: the server hears of it within seconds, not never."""
    with relayed("tcp", "tcp", tmp_path) as (client, server, duplex):
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))
        reset(client)
        record = duplex.record()
        assert record.result == "failed"
        assert record.ended_by == "source"
        assert outcome(server)[1] == "ConnectionResetError"


def test_the_end_of_a_unix_peer_is_told(tmp_path: Path) -> None:
    """Unix sockets know no reset: what a tcp client's reset becomes there is an end, and a failed record."""
    with relayed("tcp", "unix", tmp_path) as (client, server, duplex):
        client.sendall(b"half")
        assert receive_exactly(server, 4) == b"half"
        reset(client)
        assert outcome(server) == (b"", "end")
        assert duplex.record().result == "failed"


# -- bytes


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
@pytest.mark.parametrize(("source", "sink"), MIXES)
def test_64_mib_both_ways_at_once(tmp_path: Path, source: str, sink: str, method: str) -> None:
    """Bulk in both directions at once arrives unchanged, and what it borrowed is given back."""
    there, back = payload(21, 64 << 20), payload(22, 64 << 20)
    with relayed(source, sink, tmp_path, method=method) as (client, server, duplex):
        before = duplex.free()[:2]

        def send(sock: socket.socket, data: bytes) -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        threads = [in_background(send, client, there), in_background(send, server, back)]
        got: dict[str, bytes] = {}
        threads.append(in_background(lambda: got.update(server=outcome(server)[0])))
        got["client"] = outcome(client)[0]
        for thread in threads:
            thread.join(PATIENCE)
        assert_same(got["server"], there)
        assert_same(got["client"], back)
        record = duplex.record()
        assert (record.bytes, record.back) == (64 << 20, 64 << 20)
        assert record.result == "delivered"
        assert duplex.free()[:2] == before
        wanted = "copy" if method == "copy" else "splice"
        assert (record.method, record.back_method) == (wanted, wanted)


@pytest.mark.parametrize("exhausted", [False, True], ids=["usual", "nothing to borrow"])
@pytest.mark.parametrize("method", ["copy", "zero-copy"])
@pytest.mark.parametrize(("source", "sink"), MIXES)
def test_random_schedules(tmp_path: Path, source: str, sink: str, method: str, exhausted: bool) -> None:
    """Whatever is sent in whatever pieces, read or not, half-closed when: both sides get exactly the other's."""
    for seed in range(EXAMPLES):
        rng = random.Random(seed)
        where = "tcp://127.0.0.1:0" if source == "tcp" else f"unix://{tmp_path}/{seed}"
        with listener(sink, tmp_path, f"sink-{seed}") as (listening, address):
            duplex = Duplex({"listen": where}, {"connect": address}, method=method)
            if exhausted:
                duplex.share(small_buffers=rng.randint(0, 1), large_buffers=0, pipes=rng.randint(0, 1))
            with duplex, connected(duplex.address) as client, accept(listening) as server:
                play(rng, client, server)
                record = duplex.record()
                assert record.result == "delivered", (seed, record.reason)


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
def test_segments_of_one_byte(tmp_path: Path, method: str) -> None:
    """Thousands of one-byte segments that wait for a reader, more than any pipe has slots, all arrive."""
    data = payload(31, 3000)
    with relayed("tcp", "tcp", tmp_path, method=method) as (client, server, _duplex):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(data)):
            client.send(data[i : i + 1])
        assert_same(receive_exactly(server, len(data)), data)
        bulk = payload(32, 3_000_000)  # and after them bulk, still in order
        sender = in_background(client.sendall, bulk)
        assert_same(receive_exactly(server, len(bulk)), bulk)
        sender.join(PATIENCE)


def test_urgent_data_does_no_harm(tmp_path: Path) -> None:
    """Urgent bytes are left out, as by a reader who does not ask for them; what is around them arrives."""
    with relayed("tcp", "tcp", tmp_path) as (client, server, _duplex):
        for round_ in range(50):
            client.sendall(b"before")
            client.send(b"!", socket.MSG_OOB)
            client.sendall(b"after")
            assert receive_exactly(server, 11) == b"beforeafter", round_


def test_descriptors_sent_along_do_no_harm(tmp_path: Path) -> None:
    """A unix peer that sends descriptors with its bytes: the bytes arrive, all of them."""
    with relayed("unix", "unix", tmp_path) as (client, server, _duplex), Path(os.devnull).open() as null:
        for _ in range(20):
            socket.send_fds(client, [b"with"], [null.fileno()])
            client.sendall(b"out")
        assert receive_exactly(server, 140) == b"without" * 20


def test_bytes_that_come_before_the_sink_is_connected_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that speaks, ends and even closes while the upstream's name is looked up loses nothing."""
    answer = threading.Event()
    known = tcp.lookup
    with tcp_listener() as (listening, _address):
        place = (socket.AF_INET, listening.getsockname())

        def slow(host: str, port: int, **more: Any) -> list[tuple[int, Any]]:
            if host != "slow.test":
                return known(host, port, **more)
            assert answer.wait(PATIENCE)
            return [place]

        monkeypatch.setattr(tcp, "lookup", slow)
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": "tcp://slow.test:1"}) as duplex:
            clients = [connected(duplex.address) for _ in range(3)]
            for number, client in enumerate(clients):
                client.sendall(payload(41 + number, 100_000))
                client.close()
            eventually(lambda: duplex.route.under_way, "the clients are there")
            answer.set()
            got = set()
            for _ in clients:
                with accept(listening) as server:
                    got.add(receive_all(server))
            assert got == {payload(41 + number, 100_000) for number in range(3)}
            eventually(lambda: len(duplex.records) == 3, "all are over")
            assert {record.result for record in duplex.records} == {"delivered"}


def test_ipv6_on_both_sides() -> None:
    """[::1] in front and behind; the record names the peer as [address]:port."""
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with listening:
        port = listening.getsockname()[1]
        with Duplex({"listen": "tcp://[::1]:0"}, {"connect": f"tcp://[::1]:{port}"}) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                client.sendall(b"six")
                assert receive_exactly(server, 3) == b"six"
                name = f"[::1]:{client.getsockname()[1]}"
            assert duplex.record().peer == name


def test_the_method_of_each_direction(tmp_path: Path) -> None:
    """Unless told otherwise bulk is spliced into tcp and copied into unix; the record says what happened."""
    with relayed("tcp", "unix", tmp_path) as (client, server, duplex):
        for from_, to in ((client, server), (server, client)):
            sender = in_background(from_.sendall, bytes(8 << 20))
            assert len(receive_exactly(to, 8 << 20)) == 8 << 20
            sender.join(PATIENCE)
        client.close()
        server.close()
        record = duplex.record()
        assert (record.method, record.back_method) == ("copy", "splice")


@pytest.mark.skipif(not paced(), reason="tcp is not paced here: net.ipv4.tcp_congestion_control is not bbr")
def test_connections_within_this_machine_are_not_paced() -> None:
    """Where the system's tcp is paced, a duplex route's sockets on the loopback device are not."""
    with relayed("tcp", "tcp", Path()) as (_client, _server, duplex):
        engine = duplex.engines[0]

        def look() -> list[bytes]:
            found = []
            for side in engine.exchange().sessions[0].sides:
                sock = socket.socket(fileno=os.dup(side.fd))
                found.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"))
                sock.close()
            return found

        assert engine.call(look) == [b"reno", b"reno"]


# -- time and wake-ups


@pytest.mark.parametrize(("source", "sink"), [("tcp", "tcp"), ("unix", "tcp")])
@pytest.mark.parametrize("size", [1, 64, 4096, 16384, 16385, 100_000])
def test_ping_pong_never_waits_for_a_timer(tmp_path: Path, source: str, sink: str, size: int) -> None:
    """Of many round trips of any size hardly one takes long: no 40 ms of delayed acknowledgements, no 200 ms."""
    times = []
    with relayed(source, sink, tmp_path, method="zero-copy") as (client, server, _duplex):
        for sock in (client, server):
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        message = payload(51, size)
        for _ in range(150):
            began = time.perf_counter()
            client.sendall(message)
            server.sendall(receive_exactly(server, size))
            assert receive_exactly(client, size) == message
            times.append(time.perf_counter() - began)
    times.sort()
    assert times[len(times) // 2] < 0.02, times[-10:]
    assert sum(one > 0.035 for one in times) < 15, times[-20:]


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
def test_a_clogged_side_does_not_spin(tmp_path: Path, method: str) -> None:
    """While the server takes nothing and the client's bytes wait, the loop sleeps."""
    with relayed("tcp", "tcp", tmp_path, method=method) as (client, server, duplex):
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))
        c = duplex.engines[0].c
        woken, turned = c.wakeups, c.exchange.turns
        select.select([], [], [], 0.5)
        assert c.wakeups - woken < 10
        assert c.exchange.turns - turned < 10
        server.settimeout(PATIENCE)
        assert len(server.recv(1000)) > 0


# -- connecting


def test_a_refused_upstream_resets_the_client() -> None:
    """Nobody listens upstream: the client is reset, a record says why, and the next one is served all the same."""
    with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": refused_address()}) as duplex:
        for count in (1, 2):
            assert turned_away(duplex.address)
            eventually(lambda want=count: len(duplex.records) == want, "its record is there")
        record = duplex.records[0]
        assert record.result == "failed"
        assert record.ended_by == "sinks"
        assert "ECONNREFUSED" in record.reason
        assert record.failed_sinks == 1


def test_a_name_that_nobody_knows_resets_the_client() -> None:
    """An upstream whose name cannot be looked up: the client is reset, a record says why."""
    with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": "tcp://nowhere.invalid:9"}) as duplex:
        assert turned_away(duplex.address)
        assert "nowhere.invalid" in duplex.record().reason


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address of a name refuses, the second answers."""
    with tcp_listener() as (listening, address):
        port = listening.getsockname()[1]
        dead = int(refused_address().rpartition(":")[2])
        places = [(socket.AF_INET, ("127.0.0.1", dead)), (socket.AF_INET, ("127.0.0.1", port))]
        known = tcp.lookup
        monkeypatch.setattr(
            tcp, "lookup", lambda host, *a, **k: places if host == "somewhere.test" else known(host, *a, **k)
        )
        sink = {"connect": f"tcp://somewhere.test:{port}"}
        with Duplex({"listen": "tcp://127.0.0.1:0"}, sink) as duplex, connected(duplex.address) as client:
            with accept(listening) as server:
                client.sendall(b"hello")
                assert receive_exactly(server, 5) == b"hello"
        assert address.endswith(str(port))


def test_the_socket_options_of_every_connection(tmp_path: Path) -> None:
    """Both connections have keepalive by dead_after and no Nagle delay, the accepted one from its listener."""
    sides: list[socket.socket] = []
    with relayed("tcp", "tcp", tmp_path) as (_client, _server, duplex):
        engine = duplex.engines[0]

        def look() -> list[list[int]]:
            c = engine.exchange().sessions[0].sides
            found = []
            for side in (c[0], c[1]):
                sock = socket.socket(fileno=os.dup(side.fd))
                sides.append(sock)
                options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
                options += [(socket.IPPROTO_TCP, o) for o in (socket.TCP_KEEPIDLE, socket.TCP_KEEPCNT, 44)]
                found.append([sock.getsockopt(*option) for option in options if _known(sock, option)])
            return found

        accepted, connecting = engine.call(look)
        assert accepted == connecting
        assert accepted[:2] == [1, 1]
        assert accepted[2] < 15
    for sock in sides:
        sock.close()


def _known(sock: socket.socket, option: tuple[int, int]) -> bool:
    try:
        sock.getsockopt(*option)
    except OSError as error:
        return error.errno != errno.ENOPROTOOPT
    return True


# -- limits and numbers


def test_an_idle_session_is_ended(tmp_path: Path) -> None:
    """limits.idle ends a session in which nothing moves, both ends with a reset, and says so."""
    with tcp_listener() as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "limits": {"idle": "0.3s"}}
        with Duplex(source, {"connect": address}) as duplex, connected(duplex.address) as client:
            with accept(listening) as server:
                client.sendall(b"x")
                receive_exactly(server, 1)
                began = time.monotonic()
                assert outcome(client) == (b"", "ConnectionResetError")
                assert 0.2 < time.monotonic() - began < 2
                assert outcome(server) == (b"", "ConnectionResetError")
            record = duplex.record()
            assert record.ended_by == "relay"
            assert "limits.idle" in record.reason


def test_limits_of_connections_count_sessions() -> None:
    """One more than limits.connections is reset at once; when one has left there is room again."""
    with tcp_listener() as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "limits": {"connections": 1}}
        with Duplex(source, {"connect": address}) as duplex:
            with connected(duplex.address), accept(listening):
                assert turned_away(duplex.address)
            eventually(lambda: duplex.records, "the first has left")
            with connected(duplex.address) as third, accept(listening) as server:
                third.sendall(b"in")
                assert receive_exactly(server, 2) == b"in"


def test_sessions_spread_over_engines() -> None:
    """With three engines each carries some of the sessions, and every record arrives."""
    with tcp_listener() as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, engines=3) as duplex:
            clients = [connected(duplex.address) for _ in range(30)]
            servers = [accept(listening) for _ in clients]
            for number, client in enumerate(clients):
                client.sendall(f"{number:03}".encode())
            said = sorted(receive_exactly(server, 3) for server in servers)
            assert said == sorted(f"{number:03}".encode() for number in range(30))
            assert all(len(duplex.route._sessions[engine]) == 10 for engine in duplex.engines)
            for sock in [*clients, *servers]:
                sock.close()
            eventually(lambda: len(duplex.records) == 30, "every record is there")
            assert not duplex.route.under_way


def test_2000_idle_sessions() -> None:
    """Two thousand sessions take two descriptors each and no pipe; all of them come back."""
    count = 2000
    with tcp_listener(backlog=4096) as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0"}
        with Duplex(source, {"connect": address}, method="zero-copy") as duplex:
            with connected(duplex.address), accept(listening):
                pass  # what is made once is made
            eventually(lambda: len(duplex.records) == 1, "the first is over")
            before = descriptors()
            clients, servers = [], []
            for number in range(count):
                clients.append(connected(duplex.address))
                clients[-1].sendall(f"{number:04}".encode())
                servers.append(accept(listening))
                assert receive_exactly(servers[-1], 4) == f"{number:04}".encode()
            assert descriptors() == before + 4 * count  # two of them are the test's own
            for sock in [*clients, *servers]:
                sock.close()
            eventually(lambda: len(duplex.records) == count + 1, "all are over")
            assert descriptors() == before


# -- ending


def test_drain_lets_sessions_go_on() -> None:
    """A route that drains accepts nobody, and ends when the last session has."""
    with tcp_listener() as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                duplex.drain()
                eventually(
                    lambda: all(one.bound is None for one in duplex.route.reception), "it accepts nobody"
                )
                with pytest.raises(ConnectionRefusedError):
                    connected(duplex.address)
                client.sendall(b"still")
                assert receive_exactly(server, 5) == b"still"
                assert duplex.route.under_way
            duplex.over()
            assert duplex.record().result == "delivered"


def test_abort_resets_both_sides(tmp_path: Path) -> None:
    """A route that is aborted resets every client and every server, and says who did."""
    with relayed("tcp", "tcp", tmp_path) as (client, server, duplex):
        client.sendall(b"x")
        receive_exactly(server, 1)
        duplex.engines[0].post(lambda: duplex.route.abort("no more"))
        assert outcome(client)[1] == outcome(server)[1] == "ConnectionResetError"
        record = duplex.record()
        assert (record.ended_by, record.result, record.reason) == ("relay", "failed", "no more")


def test_a_record_as_json_is_the_same_either_way(tmp_path: Path) -> None:
    """The template that thousands of records a second go through says what the record itself says."""
    import json

    stories: list[Any] = [client_ends_first, client_resets]
    for number, story in enumerate(stories):
        directory = tmp_path / str(number)
        directory.mkdir()
        with relayed("tcp", "tcp", directory) as (client, server, duplex):
            story(client, server)
            record = duplex.record()
            assert json.loads(f"{{{record.as_json()}}}") == record.as_dict()


def test_a_pipe_outlives_the_session_that_held_bytes_in_it(tmp_path: Path) -> None:
    """Session after session is reset with its pipe full: the pipe is empty and free again, and bulk is spliced on."""
    data = payload(23, 4 << 20)

    def over(count: int) -> bool:
        return len(duplex.records) >= count

    with listener("tcp", tmp_path, "sink") as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, method="zero-copy") as duplex:
            for number in range(1, PIPES + 3):
                with connected(duplex.address) as client, accept(listening):
                    client.settimeout(0.1)
                    with pytest.raises(TimeoutError):  # nobody reads: everything on the way fills up
                        client.sendall(bytes(64 << 20))
                    reset(client)
                eventually(partial(over, number), "the session is over")
            made = duplex.free()[2]
            assert made > 0
            with connected(duplex.address) as client, accept(listening) as server:
                sender = in_background(client.sendall, data)
                assert_same(receive_exactly(server, len(data)), data)
                sender.join(PATIENCE)
            eventually(partial(over, PIPES + 3), "the last session is over")
            assert duplex.records[-1].method == "splice"
            assert duplex.free()[2] == made
