"""The traps that cost 40 or 200 ms, by the distribution of many latencies: bounds far from what a busy machine adds.

They are: Nagle's algorithm against a delayed acknowledgement, MSG_MORE left on the last batch of a splice, SO_RCVLOWAT
left up after a rush, and bytes held back for a larger send when none is coming.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from duplexes import relayed
from peers import connected, eventually, payload, receive_exactly, send_all
from relays import Relay

MIB = 1 << 20
TRAP = 0.035  # seconds: less than the shortest of them


def fair(times: list[float]) -> None:
    """Hardly any of them is as long as the shortest trap."""
    times.sort()
    late = sum(each >= TRAP for each in times)
    assert late <= len(times) // 20, f"{late} of {len(times)} were late, the last by {times[-1]:.3f} s"
    assert times[len(times) // 2] < TRAP / 2


def without_delay(*socks: socket.socket) -> None:
    """What they send leaves at once: what is late then is relay's doing."""
    for sock in socks:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@pytest.mark.parametrize("method", ["auto", "zero-copy", "copy"])
@pytest.mark.parametrize("sink", ["tcp", "unix"])
def test_questions_in_two_parts_are_answered_at_once(tmp_path: Path, method: str, sink: str) -> None:
    """A header, then a body, then the answer: the second part of neither waits for the first one's acknowledgement."""
    chance = random.Random(1)
    times = []
    with relayed("tcp", sink, tmp_path, method=method) as (client, server, _duplex):
        without_delay(client, server)
        for _ in range(200):
            body = bytes(chance.choice([1, 60, 1400, 4096, 65_535, 65_536, 65_537]))
            began = time.monotonic()
            for one, other in ((client, server), (server, client)):
                send_all(one, b"head")
                writer = threading.Thread(target=send_all, args=(one, body))
                writer.start()
                receive_exactly(other, 4 + len(body))
                writer.join(30)
            times.append(time.monotonic() - began)
    fair(times)


@pytest.mark.parametrize("method", ["auto", "zero-copy", "copy"])
def test_a_message_behind_bulk_comes_at_once(tmp_path: Path, method: str) -> None:
    """Whatever bulk has set up, pipes, buffers, marks: its last odd bytes and the next message come through."""
    times = []
    with relayed("tcp", "tcp", tmp_path, method=method) as (client, server, _duplex):
        without_delay(client, server)
        for turn in range(40):
            size = MIB + (turn * 4099) % 70_000
            feeder = threading.Thread(target=send_all, args=(client, bytes(size)))
            feeder.start()
            receive_exactly(server, size)
            feeder.join(30)
            for _ in range(3):
                began = time.monotonic()
                send_all(client, b"question")
                receive_exactly(server, 8)
                send_all(server, b"answer")
                receive_exactly(client, 6)
                times.append(time.monotonic() - began)
    fair(times)


def written(parts: list[Path], size: int) -> bool:
    """Whether every file has so many bytes."""
    return all(part.exists() and part.stat().st_size == size for part in parts)


@pytest.mark.parametrize("files", [1, 3])
def test_a_message_behind_a_rush_is_in_the_file_at_once(tmp_path: Path, files: int) -> None:
    """SO_RCVLOWAT and what is held back for larger loads are for a rush alone."""
    stages = [{"tee": {"to": f"file://{tmp_path}/f{number}"}} for number in range(1, files)]
    config = {"source": "tcp://127.0.0.1:0", "stages": stages, "sink": f"file://{tmp_path}/f0"}
    parts = [tmp_path / f"f{number}.part" for number in range(files)]
    times = []
    with Relay(config) as relay, connected(relay.bound[-1]) as source:
        without_delay(source)
        sent = 0
        for _ in range(8):
            rush = payload(sent, 3 * MIB + 7)
            send_all(source, rush)
            sent += len(rush)
            for _ in range(5):
                began = time.monotonic()
                send_all(source, b"message")
                sent += 7
                eventually(partial(written, parts, sent), "all files have it")
                times.append(time.monotonic() - began)
        source.shutdown(socket.SHUT_WR)
        relay.wait()
    fair(times[1:])
