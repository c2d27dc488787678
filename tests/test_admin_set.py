"""Stages that change while streams pass them, and `relay top` on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from admins import Figures, figure, figures
from peers import PATIENCE, accept, eventually, payload, tcp_listener, wait_for
from relays import RELAY, Process, environment, run_relay, serving

SOCKET = "admin.sock"
SLOW = f"""admin: {{socket: 'unix://{SOCKET}'}}
drain: 0s
routes:
  slow:
    source: {{listen: 'tcp://127.0.0.1:0'}}
    stages:
      - throttle: {{rate: 20kB/s, burst: 1kB}}
      - throttle: {{rate: 1GB/s, name: upper}}
      - throttle: 2GB/s
      - meter: {{every: 1h}}
      - limit: {{stop: 100MB}}
    sink: {{file: 'got/{{id}}.bin'}}
  plain: {{source: 'tcp://127.0.0.1:0', sink: 'null:'}}
"""


def streams(tmp_path: Path) -> float:
    """How many are under way on the slow route."""
    return figure(figures(tmp_path / SOCKET), "relay_route_streams", route="slow")


def set_(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    """`relay set` with these words."""
    return run_relay("set", *words, "--admin", SOCKET, cwd=tmp_path)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Process]:
    """A relay with a slow route, ready."""
    with serving(SLOW, tmp_path) as process:
        process.said("ready")
        yield process


def test_a_throttle_changes_under_a_stream(served: Process, tmp_path: Path) -> None:
    """A stream that would take a minute is through at once with another rate, and so is the next one."""
    for stream in range(2):
        with socket.create_connection(("127.0.0.1", served.port()), timeout=PATIENCE) as sock:
            sock.sendall(payload(stream, 1 << 20))
            sock.shutdown(socket.SHUT_WR)
            if not stream:
                eventually(lambda: streams(tmp_path) == 1, "it is there")
                done = set_(tmp_path, "slow", "throttle#1", "rate=100MB/s", "burst=1MB")
                assert done.returncode == 0, done.stderr
                assert done.stdout == b"slow: throttle#1: burst 1000 -> 1000000, rate 20000 -> 100000000\n"
                text = run_relay("status", "--admin", SOCKET, cwd=tmp_path).stdout
                assert b"throttle#1 rate=100000000 burst=1000000" in text
            began = time.monotonic()
            assert sock.recv(1) == b""
            assert time.monotonic() - began < 10
    records = served.sessions(2)
    assert [record["result"] for record in records] == ["delivered", "delivered"]
    for number, record in enumerate(records):
        assert Path(tmp_path, "got", f"{record['id']}.bin").read_bytes() == payload(number, 1 << 20)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("slwo", "throttle", "rate=1B/s"), "there is no route 'slwo'; did you mean 'slow'?"),
        (("slow", "throtle", "rate=1B/s"), "route 'slow' has no stage 'throtle'; did you mean 'throttle'?"),
        (("slow", "throttle", "rate=1B/s"), "has 2 stages 'throttle'; say which: throttle#1 or throttle#2"),
        (("slow", "upper", "rat=1B/s"), "'rat' of 'throttle' cannot be changed; did you mean 'rate'?"),
        (
            ("slow", "upper", "name=x"),
            "'name' of 'throttle' cannot be changed; what can be changed while it runs",
        ),
        (("slow", "upper", "rate=fast"), "rate: expected a rate such as 10MB/s, got 'fast'"),
        (("slow", "limit", "stop=1"), "nothing of 'limit' can be changed while it runs"),
        (("slow", "upper", "rate"), "'rate' is no KEY=VALUE"),
        (("plain", "throttle", "rate=1B/s"), "route 'plain' has no stages"),
    ],
)
def test_what_cannot_be_set_is_said(
    served: Process, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    """An unknown route, stage or key, a value that is none: each is refused with what is there, and 2."""
    done = set_(tmp_path, *words)
    assert done.returncode == 2
    assert said in done.stderr.decode()


def test_a_stage_behind_a_log_changes(tmp_path: Path) -> None:
    """The throttle of a branch that spills changes in the connection that is there."""
    with tcp_listener() as (listening, address):
        config = SLOW.replace(
            "      - meter: {every: 1h}\n",
            f"      - tee: {{stages: [throttle: {{rate: 10kB/s, name: inner}}], to: '{address}', on_slow: spill}}\n",
        ).replace("rate: 20kB/s, burst: 1kB", "rate: 1GB/s")
        with serving(config, tmp_path) as process:
            process.said("ready")
            with socket.create_connection(("127.0.0.1", process.port()), timeout=PATIENCE) as sock:
                sock.sendall(payload(1, 1 << 20))
                sock.shutdown(socket.SHUT_WR)
                with accept(listening) as receiver:
                    receiver.settimeout(PATIENCE)
                    assert set_(tmp_path, "slow", "inner", "rate=1GB/s", "burst=1MB").returncode == 0
                    began = time.monotonic()
                    got = b""
                    while piece := receiver.recv(1 << 20):
                        got += piece
                    assert got == payload(1, 1 << 20)
                    assert time.monotonic() - began < 10


def shown(terminal: int, word: str) -> str:
    """Reads what is drawn until `word` is among it."""
    seen = ""
    while word not in seen:
        wait_for(terminal)
        seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


def test_top_on_a_terminal(served: Process, tmp_path: Path) -> None:
    """`relay top` draws routes and sinks again and again, and ends with 0 when q is pressed; without a terminal it
    says what to use."""
    refused = run_relay("top", "--admin", SOCKET, cwd=tmp_path)
    assert refused.returncode == 2
    assert b"relay status --json" in refused.stderr
    near, far = pty.openpty()
    try:
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 140, 0, 0))
        child = subprocess.Popen(
            [*RELAY, "top", "--admin", SOCKET, "--every", "0.2"],
            stdin=far, stdout=far, stderr=far, cwd=tmp_path, env=environment(TERM="xterm-256color"),
        )  # fmt: skip
        os.close(far)
        far = -1
        with socket.create_connection(("127.0.0.1", served.port()), timeout=PATIENCE) as sock:
            sock.sendall(b"x" * 500)
            text = shown(near, "flowing")
            assert "slow" in text
            assert "got/{id}.bin" in text
        os.write(near, b"q")
        assert child.wait(PATIENCE) == 0
    finally:
        os.close(near)
        if far >= 0:
            os.close(far)


def test_stages_of_both_ways_of_a_duplex_route(tmp_path: Path) -> None:
    """The throttles there and back change under a session that is open; the records say how long connecting took."""
    with tcp_listener() as (listening, address):
        config = f"""admin: {{socket: 'unix://{SOCKET}'}}
drain: 0s
routes:
  web:
    source: {{listen: 'tcp://127.0.0.1:0'}}
    duplex: true
    stages: [throttle: {{rate: 10kB/s, burst: 1kB}}]
    replies: [throttle: {{rate: 10kB/s, burst: 1kB}}]
    sink: {{connect: '{address}'}}
"""
        with serving(config, tmp_path) as process:
            process.said("ready")
            with socket.create_connection(("127.0.0.1", process.port()), timeout=PATIENCE) as client:
                with accept(listening) as server:
                    server.settimeout(PATIENCE)
                    for number, (giver, taker) in enumerate(((client, server), (server, client)), 1):
                        giver.sendall(payload(number, 500_000))
                        giver.shutdown(socket.SHUT_WR)
                        done = set_(tmp_path, "web", f"throttle#{number}", "rate=1GB/s", "burst=1MB")
                        assert done.returncode == 0, done.stderr
                        began = time.monotonic()
                        got = b""
                        while piece := taker.recv(1 << 20):
                            got += piece
                        assert got == payload(number, 500_000)
                        assert time.monotonic() - began < 10
            (record,) = process.sessions()
            assert 0 < record["sinks"][0]["connect_seconds"] < 5
            found = eventually(lambda: over(tmp_path), "it is counted")
            assert figure(found, "relay_route_received_bytes_total") == 500_000
            assert figure(found, "relay_route_returned_bytes_total") == 500_000
            assert figure(found, "relay_sink_connect_duration_seconds_count") == 1


def over(tmp_path: Path) -> Figures | None:
    """The figures, once a session is over."""
    found = figures(tmp_path / SOCKET)
    return found if any(name == "relay_sessions_total" for name, _labels in found) else None
