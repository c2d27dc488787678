"""Servers and clients that nobody here wrote, with a duplex route between them: all works as it does without it.

`RELAY_LARGE=1024` moves that many MiB by HTTP in place of 64; `RELAY_LONG_IDLE=600` leaves a websocket idle for that
many seconds in place of 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from peers import PATIENCE, eventually, payload, payload_file
from real_servers import found, free_port, nginx, postgres, redis, run, server, sshd
from relays import Process, serving

LARGE = int(os.environ.get("RELAY_LARGE", "64")) << 20
LONG_IDLE = float(os.environ.get("RELAY_LONG_IDLE", "1"))


class Through:
    """A relay between: `port` is where clients go."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.port = process.port()

    def sessions(self, *, client_resets: bool = False) -> list[dict[str, Any]]:
        """Those that are over when all is quiet: none may have failed, unless this client ends by resets."""
        self.process.signal(signal.SIGTERM)
        assert self.process.wait() == 0
        sessions = [line for line in self.process.lines if line.get("event") == "session"]
        failed = [one for one in sessions if one["result"] != "delivered"]
        if client_resets:
            gone = ("ECONNRESET", "EPIPE")  # the second, where relay hears of the reset as it writes
            failed = [
                one for one in failed
                if one["ended_by"] != "source" or not any(name in one["reason"] for name in gone)
            ]  # fmt: skip
        assert not failed, failed[:3]
        return sessions


@contextlib.contextmanager
def through(
    to: int | str | Sequence[int], directory: Path, more: str = "", engines: int = 2
) -> Iterator[Through]:
    """A relay to a port, some ports, or an address."""
    if isinstance(to, str):
        there = json.dumps(to)
    else:
        there = json.dumps([f"tcp://127.0.0.1:{port}" for port in ([to] if isinstance(to, int) else to)])
    route = f'{{source: {{listen: "tcp://127.0.0.1:0"}}, duplex: true, sink: {{connect: {there}{more}}}}}'
    directory.mkdir(exist_ok=True)
    with serving(f"engines: {engines}\ndrain: 5s\nroutes:\n  r: {route}\n", directory) as process:
        yield Through(process)


# -- redis


@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_redis_benchmark(tmp_path: Path, over: str) -> None:
    """Requests of many clients, one by one and 64 at once in a pipeline, with values from 3 to 100,000 bytes."""
    with redis(tmp_path) as (port, path):
        to = port if over == "tcp" else f"unix://{path}"
        with through(to, tmp_path / "relay") as relay:
            at = ["-h", "127.0.0.1", "-p", str(relay.port), "--csv"]
            for words in (["-n", "3000", "-c", "20"], ["-n", "40000", "-c", "20", "-P", "64"]):
                said = run("redis-benchmark", *at, *words, "-t", "ping,set,get,lrange_100,mset")
                assert said.count("\n") >= 7, said
            run("redis-benchmark", *at, "-n", "500", "-c", "10", "-P", "8", "-d", "100000", "-t", "set,get")
            sessions = relay.sessions(client_resets=True)
            assert sum(one["bytes"] for one in sessions) > 50_000_000
            assert sum(one["bytes_back"] for one in sessions) > 50_000_000


def test_redis_fails_over_to_its_replica(tmp_path: Path) -> None:
    """Two redis servers behind one address, told apart by what they say of their role: with the master away clients
    reach the replica once it is promoted, and the one that subscribed to it before goes on listening."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        one, _path = first.enter_context(redis(tmp_path / "a"))
        other, _path = stack.enter_context(redis(tmp_path / "b", "--replicaof", "127.0.0.1", str(one)))
        health = '{every: 0.1s, timeout: 1s, fall: 2, rise: 1, send: "INFO replication\\r\\n", expect: "role:master"}'
        more = f", balance: first, health: {health}"
        relay = stack.enter_context(through([one, other], tmp_path / "relay", more))

        def cli(port: int, *words: str) -> str:
            return run("redis-cli", "-h", "127.0.0.1", "-p", str(port), *words).strip()

        relay.process.said("is down")  # the replica is none to write to
        assert cli(relay.port, "set", "key", "value") == "OK"
        eventually(lambda: cli(other, "get", "key") == "value", "it is replicated")
        watcher = subprocess.Popen(
            [found("redis-cli"), "-p", str(other), "subscribe", "news"], stdout=-1, stdin=subprocess.DEVNULL
        )
        stack.callback(watcher.wait)
        stack.callback(watcher.kill)
        first.close()  # the master is gone
        cli(other, "replicaof", "no", "one")
        relay.process.said("is up")
        assert cli(relay.port, "get", "key") == "value"
        assert cli(relay.port, "set", "key", "after") == "OK"
        eventually(lambda: cli(relay.port, "publish", "news", "all is well") == "1", "the watcher hears")


# -- nginx


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Through, Path]]:
    """nginx behind a relay."""
    with nginx(tmp_path) as (port, root), through(port, tmp_path / "relay") as relay:
        yield relay, root


def curl(*words: str | Path) -> str:
    """Runs curl."""
    return run("curl", "-sS", "--fail", "--max-time", "60", *words, patience=90)


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.timeout(60 + LARGE / 10e6)
def test_curl_and_nginx(site: tuple[Through, Path], tmp_path: Path) -> None:
    """A large download and the same back as an upload, a range, answers and requests in chunks, five requests over one
    connection."""
    relay, root = site
    url = f"http://127.0.0.1:{relay.port}"
    digest = payload_file(root / "large", 1, LARGE + 7)
    curl(f"{url}/large", "-o", tmp_path / "down")
    assert sha256(tmp_path / "down") == digest
    curl("-T", tmp_path / "down", f"{url}/up")
    assert sha256(root / "up") == digest
    with (root / "large").open("rb") as file:
        file.seek(1_000_000)
        piece = file.read(3_000_001)
    curl("-r", "1000000-4000000", f"{url}/large", "-o", tmp_path / "piece")
    assert (tmp_path / "piece").read_bytes() == piece
    (root / "text").write_text("words and words\n" * 200_000)
    curl("--compressed", "-D", tmp_path / "head", f"{url}/text", "-o", tmp_path / "text")
    assert "chunked" in (tmp_path / "head").read_text().lower()
    assert (tmp_path / "text").read_bytes() == (root / "text").read_bytes()
    with (tmp_path / "text").open("rb") as text:
        run("curl", "-sS", "--fail", "-T", "-", f"{url}/chunks", stdin=text)
    assert (root / "chunks").read_bytes() == (root / "text").read_bytes()
    (root / "small").write_text("x" * 100)
    said = curl(*[f"{url}/small"] * 5, "-w", "%{num_connects}\n")
    assert [int(count) for count in re.findall(r"(\d)\n", said)] == [1, 0, 0, 0, 0]
    sessions = relay.sessions()
    assert len(sessions) == 6
    assert sessions[0]["bytes_back"] > LARGE
    assert sessions[1]["bytes"] > LARGE


def test_wrk_and_nginx(site: tuple[Through, Path]) -> None:
    """Fifty keep-alive connections as fast as they can for a second: not one error."""
    relay, root = site
    (root / "page").write_bytes(payload(2, 5000))
    said = run("wrk", "-t", "2", "-c", "50", "-d", "1", "--latency", f"http://127.0.0.1:{relay.port}/page")
    assert "Socket errors" not in said, said
    assert "Non-2xx" not in said, said
    requests = re.search(r"(\d+) requests in", said)
    assert requests, said
    assert int(requests[1]) > 500, said
    assert {one["sinks"][0]["tries"] for one in relay.sessions(client_resets=True)} == {1}


def test_http2_in_cleartext(tmp_path: Path) -> None:
    """HTTP/2 with prior knowledge: curl, nghttp with many streams over one connection, and a load of requests."""
    with nginx(tmp_path) as (_port, root):
        digest = payload_file(root / "large", 3, 5_000_003)
        with through(int((root / "h2").read_text()), tmp_path / "relay") as relay:
            url = f"http://127.0.0.1:{relay.port}"
            curl("--http2-prior-knowledge", f"{url}/large", "-o", tmp_path / "down", "-w", "%{http_version}")
            assert sha256(tmp_path / "down") == digest
            said = run("nghttp", "-n", "-s", *[f"{url}/large?{number}" for number in range(5)])
            assert len(re.findall(r" 200 ", said)) == 5, said
            said = run("h2load", "-n", "2000", "-c", "10", "-m", "20", f"{url}/h2")
            assert "2000 succeeded, 0 failed, 0 errored" in said, said
            relay.sessions(client_resets=True)


# -- PostgreSQL


def test_postgresql(tmp_path: Path) -> None:
    """pgbench with prepared statements, simple ones and new connections for each, and COPY in both directions."""
    with postgres() as (port, _directory), through(port, tmp_path / "relay") as relay:
        at = ["-h", "127.0.0.1", "-p", str(relay.port), "-U", "postgres"]
        run("pgbench", *at, "-i", "-q", "-s", "1", "postgres", patience=60)
        for words in (["-t", "60", "-c", "4", "-M", "prepared"], ["-t", "15", "-c", "4", "-C"]):
            said = run("pgbench", *at, *words, "postgres", patience=60)
            assert "number of failed transactions: 0 " in said, said
        rows = tmp_path / "rows"
        rows.write_text("".join(f"{number}\t{'x' * (number % 90)}\n" for number in range(200_000)))

        def sql(text: str, **options: Any) -> str:
            return run("psql", *at, "-v", "ON_ERROR_STOP=1", "-qAt", "-c", text, "postgres", **options)

        sql("create table t (n int primary key, words text)")
        with rows.open("rb") as file:
            sql("copy t from stdin", stdin=file)
        assert sql("select count(*), sum(length(words)) from t").strip() == f"200000|{_letters(200_000)}"
        assert sql("copy (select * from t order by n) to stdout") == rows.read_text()
        assert sum(one["bytes_back"] for one in relay.sessions()) > rows.stat().st_size


def _letters(count: int) -> int:
    return sum(number % 90 for number in range(count))


# -- iperf3


@pytest.mark.parametrize("words", [[], ["-R"], ["--bidir"], ["-P", "8"], ["-R", "-P", "8"]], ids=" ".join)
def test_iperf3(tmp_path: Path, words: list[str]) -> None:
    """Bulk there, back, both ways at once and over eight connections. What is under way when the client says that it
    has sent enough is not counted."""
    port = free_port()
    argv = [found("iperf3"), "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush"]
    with (
        server(argv, port, tmp_path / "iperf3.log", says="Server listening"),
        through(port, tmp_path / "relay", engines=3) as relay,
    ):
        size = ["-n", "128M"] if "--bidir" not in words else ["-t", "1"]
        at = ["-c", "127.0.0.1", "-p", str(relay.port), "-J", *size]
        end = json.loads(run("iperf3", *at, *words))["end"]
        moved = end["sum_received"]["bytes"]
        assert moved > 0.3 * end["sum_sent"]["bytes"] > 30_000_000
        if "--bidir" in words:
            assert end["sum_received_bidir_reverse"]["bytes"] > 1_000_000
        if "-P" in words:
            assert len(end["streams"]) == 8


# -- ssh


def test_ssh_scp_and_rsync(tmp_path: Path) -> None:
    """A command with its input and its exit code, a file by scp and back, a tree by rsync and again after changes."""
    for name in ("scp", "rsync", "ssh"):
        found(name)
    (tmp_path / "ssh").mkdir()
    with sshd(tmp_path / "ssh") as (port, options), through(port, tmp_path / "relay") as relay:
        at = ["-p", str(relay.port), *options, "127.0.0.1"]
        digest = payload_file(tmp_path / "large", 4, 20_000_003)
        with (tmp_path / "large").open("rb") as file:
            assert run("ssh", *at, "sha256sum", stdin=file).split()[0] == digest
        done = subprocess.run(
            [found("ssh"), *at, "exit 7"], stdin=subprocess.DEVNULL, check=False, timeout=PATIENCE
        )
        assert done.returncode == 7
        copy = ["scp", "-q", "-P", str(relay.port), *options]
        run(*copy, tmp_path / "large", f"127.0.0.1:{tmp_path}/there")
        run(*copy, f"127.0.0.1:{tmp_path}/there", tmp_path / "back")
        assert sha256(tmp_path / "back") == digest
        tree = tmp_path / "tree"
        for number in range(200):
            file = tree / f"{number % 7}" / f"file-{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(payload(number, number * 97))
        shell = " ".join(["ssh", "-p", str(relay.port), *options])
        for _ in range(2):
            run("rsync", "-a", "--delete", "-e", shell, f"{tree}/", f"127.0.0.1:{tmp_path}/copy/")
            run("rsync", "-ac", "-e", shell, f"127.0.0.1:{tmp_path}/copy/", f"{tmp_path}/again/")
            shutil.rmtree(tree / "3", ignore_errors=True)
            (tree / "1" / "file-1").write_bytes(payload(7, 70_000))
        names = sorted(path.relative_to(tree) for path in tree.rglob("*"))
        assert names == sorted(path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*"))
        for name in names:
            if (tree / name).is_file():
                assert (tree / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


# -- websockets


@pytest.mark.timeout(LONG_IDLE + 60)
def test_websockets(tmp_path: Path) -> None:
    """Many websockets that are idle for long, then talk: every one is still there; large messages in both directions,
    pings of the servers' own, and each side's goodbye."""
    websockets = pytest.importorskip("websockets", reason="websockets is missing: pip install websockets")
    from websockets.asyncio.client import connect
    from websockets.asyncio.server import ServerConnection, serve

    large = payload(5, 3_000_000)

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def talk(port: int, number: int) -> None:
        async with connect(f"ws://127.0.0.1:{port}", max_size=None, compression=None) as socket:
            await socket.send(f"hello {number}")
            assert await socket.recv() == f"hello {number}"
            await asyncio.sleep(LONG_IDLE)  # what is tested
            await socket.ping()
            await socket.send(f"still {number}")
            assert await socket.recv() == f"still {number}"
            if number < 3:
                await socket.send(large)
                assert await socket.recv() == large

    async def both() -> None:
        async with serve(
            echo, "127.0.0.1", 0, max_size=None, compression=None, ping_interval=0.3
        ) as listening:
            port = next(iter(listening.sockets)).getsockname()[1]
            with contextlib.ExitStack() as stack:
                more = ', dead_after: "1s"'
                relay = await asyncio.to_thread(stack.enter_context, through(port, tmp_path / "relay", more))
                async with asyncio.timeout(LONG_IDLE + 30):
                    await asyncio.gather(*(talk(relay.port, number) for number in range(30)))
                sessions = await asyncio.to_thread(relay.sessions)
                assert len(sessions) == 30
                assert all(session["seconds"] >= LONG_IDLE for session in sessions)

    assert websockets.__version__
    asyncio.run(both())
