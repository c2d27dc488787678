"""Duplex routes: what either side does, the other sees as over one connection.

`RELAY_EXAMPLES=N` runs the random schedules N times instead of a few.
"""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from duplexes import Duplex, connected, direct, in_background, listener, outcome, relayed, reset
from peers import PATIENCE, accept, assert_same, eventually, payload, receive_exactly
from stories import MIXES, RESETS, SHAPES, STORIES, Ends, play

from relay.endpoints.pacing import paced

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


def test_the_method_of_each_direction(tmp_path: Path) -> None:
    """Unless told otherwise bulk is spliced into tcp and copied into unix; the record says what happened."""
    with relayed("tcp", "unix", tmp_path) as (client, server, duplex):
        for from_, to in ((client, server), (server, client)):
            sender = in_background(from_.sendall, bytes(64 << 20))
            to.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
            for _ in range(40):  # a reader that is late makes bulk of it, however slow the sender is
                eventually(lambda: not select.select([], [from_], [], 0)[1], "all buffers are full")  # noqa: B023
                receive_exactly(to, 1 << 20)
            assert len(receive_exactly(to, 24 << 20)) == 24 << 20
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
