"""Bytes of duplex routes in odd shapes, with stages or not: one by one, urgent, with descriptors, there and back."""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from duplexes import BOTH, EITHER, in_background, relayed
from mirrors import Mirror
from peers import PATIENCE, assert_same, eventually, payload, receive_exactly


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "staged"])
def test_segments_of_one_byte(tmp_path: Path, method: str, mirrored: bool) -> None:
    """Thousands of one-byte segments that wait for a reader, more than any pipe has slots, all arrive."""
    data = payload(31, 3000)
    with Mirror(tmp_path) as mirror:
        stages = [{"tee": {"to": mirror.address}}] if mirrored else []
        with relayed("tcp", "tcp", tmp_path, method=method, stages=stages) as (client, server, _duplex):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for i in range(len(data)):
                client.send(data[i : i + 1])
            assert_same(receive_exactly(server, len(data)), data)
            bulk = payload(32, 3_000_000)  # and after them bulk, still in order
            sender = in_background(client.sendall, bulk)
            assert_same(receive_exactly(server, len(bulk)), bulk)
            sender.join(PATIENCE)
            client.close()
            server.close()
            eventually(lambda: mirror.got or not mirrored, "the mirror has it")
        if mirrored:
            assert_same(mirror.got[0], data + bulk)


@pytest.mark.parametrize(
    ("method", "stages"),
    [("auto", {}), ("copy", BOTH), ("zero-copy", BOTH)],
    ids=["plain", "staged-copy", "staged-zero-copy"],
)
def test_urgent_data_does_no_harm(tmp_path: Path, method: str, stages: dict[str, Any]) -> None:
    """Urgent bytes are left out, as by a reader who does not ask for them; what is around them arrives, both ways."""
    with relayed("tcp", "tcp", tmp_path, method=method, **stages) as (client, server, _duplex):
        for round_ in range(50):
            for from_, to in ((client, server), (server, client)):
                from_.sendall(b"before")
                from_.send(b"!", socket.MSG_OOB)
                from_.sendall(b"after")
                assert receive_exactly(to, 11) == b"beforeafter", round_


@EITHER
def test_descriptors_sent_along_do_no_harm(tmp_path: Path, stages: dict[str, Any]) -> None:
    """A unix peer that sends descriptors with its bytes: the bytes arrive, all of them."""
    with relayed("unix", "unix", tmp_path, **stages) as (client, server, _duplex):
        with Path(os.devnull).open() as null:
            for _ in range(20):
                socket.send_fds(client, [b"with"], [null.fileno()])
                client.sendall(b"out")
            assert receive_exactly(server, 140) == b"without" * 20


@pytest.mark.parametrize(
    ("source", "method", "stages"),
    [("tcp", "zero-copy", {}), ("unix", "zero-copy", {}), ("tcp", "auto", BOTH), ("tcp", "zero-copy", BOTH)],
    ids=["plain-tcp", "plain-unix", "staged-auto", "staged-zero-copy"],
)
@pytest.mark.parametrize("size", [1, 64, 4096, 16384, 16385, 100_000])
def test_ping_pong_never_waits_for_a_timer(
    tmp_path: Path, source: str, method: str, stages: dict[str, Any], size: int
) -> None:
    """Of many round trips of any size hardly one takes long: no 40 ms of delayed acknowledgements, no 200 ms."""
    times = []
    with relayed(source, "tcp", tmp_path, method=method, **stages) as (client, server, _duplex):
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


@EITHER
@pytest.mark.parametrize("method", ["copy", "zero-copy"])
def test_a_clogged_side_does_not_spin(tmp_path: Path, method: str, stages: dict[str, Any]) -> None:
    """While the server takes nothing and the client's bytes wait, the loop sleeps."""
    with relayed("tcp", "tcp", tmp_path, method=method, **stages) as (client, server, duplex):
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))
        c = duplex.engines[0].c
        woken, turned = c.wakeups, 0 if stages else c.exchange.turns
        select.select([], [], [], 0.5)
        assert c.wakeups - woken < 10
        assert stages or c.exchange.turns - turned < 10
        server.settimeout(PATIENCE)
        assert len(server.recv(1000)) > 0
