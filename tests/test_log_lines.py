"""Log lines: whoever logs never waits, what is lost is counted, what is queued is written at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from descriptors import Descriptors
from peers import assert_same, eventually, payload, read_all, receive_all, wait_for
from relays import RELAY, environment

from relay.journal.lines import LineWriter


def lost(count: int) -> str:
    """The line for lines that were lost."""
    return f"lost {count}"


def test_lines_come_in_order(fds: Descriptors) -> None:
    """Every line that fits is written, in order, whole."""
    pipe = fds.pipe()
    writer = LineWriter(pipe.w, lost)
    for number in range(3000):
        writer.put(f"line {number}")
    got = b""
    while got.count(b"\n") < 3000:
        wait_for(pipe.r)
        got += os.read(pipe.r, 65536)
    assert got.decode().splitlines() == [f"line {number}" for number in range(3000)]
    assert writer.flush()


def test_what_does_not_fit_is_counted(fds: Descriptors) -> None:
    """With nobody reading, `put` returns at once; later the count stands where the lines would have been."""
    pipe = fds.pipe(4096, blocking=True)
    writer = LineWriter(pipe.w, lost, most=10_000)
    for number in range(100_000):
        writer.put(f"line {number:06}")
    assert not writer.flush(0.05)
    got = os.read(pipe.r, 65536)
    while b"lost" not in got:
        wait_for(pipe.r)
        got += os.read(pipe.r, 65536)
    assert len(got) < 100_000
    writer.put("after")
    while b"after" not in got:
        wait_for(pipe.r)
        got += os.read(pipe.r, 65536)
    *before, after = got.decode().splitlines()
    number = 0
    for line in before:
        if line.startswith("lost"):
            number += int(line.split()[1])
        else:
            assert line == f"line {number:06}"
            number += 1
    assert number == 100_000
    assert after == "after"
    assert writer.flush()


def test_a_reader_that_goes_away_ends_nothing(fds: Descriptors) -> None:
    """Lines for a pipe without a reader are dropped, one by one; nobody hears of it."""
    pipe = fds.pipe()
    fds.close(pipe.r)
    previous = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    writer = LineWriter(pipe.w, lost)
    for _ in range(100):
        writer.put("nobody")
    assert writer.flush()
    signal.signal(signal.SIGPIPE, previous)


def test_everything_queued_is_written_at_the_end() -> None:
    """A program that logs and ends has logged all of it, and waits a second at most for whoever reads."""
    code = "from relay.journal import logs\nlogs.set_up('json', 'info')\n"
    code += "for i in range(5000): logs.log.info('line %d', i)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment(), timeout=20)
    found = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert found == [f"line {number}" for number in range(5000)]


def test_a_stalled_stderr_stalls_nothing(tmp_path: Path) -> None:
    """With stderr a full pipe that nobody reads, streams go through and relay ends; then the log tells what it lost."""
    config = tmp_path / "relay.yaml"
    config.write_text('routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "{id}"}}}')
    read, write = os.pipe()
    argv = [*RELAY, "serve", "--log-format", "json", str(config)]
    with subprocess.Popen(argv, stderr=write, cwd=tmp_path, env=environment()) as process:
        try:
            os.close(write)
            first = b""
            while b'"ready"' not in first:
                wait_for(read)
                first += os.read(read, 65536)
            listening = next(json.loads(x) for x in first.splitlines() if b'"listening"' in x)
            port = int(listening["address"].rpartition(":")[2])
            data = payload(1, 100_000)
            for _ in range(1200):  # far more session records than a pipe and the queue hold
                with socket.create_connection(("127.0.0.1", port)) as sock:
                    sock.sendall(b"x")
                    sock.shutdown(socket.SHUT_WR)
                    assert receive_all(sock) == b""
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(sock) == b""
            eventually(lambda: (tmp_path / "1201").exists(), "the stream is there")
            assert_same((tmp_path / "1201").read_bytes(), data)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            assert time.monotonic() - began < 5
            rest = read_all(read)
        finally:
            os.close(read)
            process.kill()
    lines = rest.splitlines()
    assert 0 < len(lines) < 1200
    assert all(line.startswith(b"{") for line in lines)


def test_without_stderr_relay_runs(tmp_path: Path) -> None:
    """Started with stderr closed it carries its stream all the same."""
    (tmp_path / "in").write_bytes(b"content")
    command = f"exec 2>&-; exec {' '.join(RELAY)} run file://{tmp_path}/in --to out"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment(), timeout=20, stdin=-3, stdout=-3
    )
    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == b"content"
