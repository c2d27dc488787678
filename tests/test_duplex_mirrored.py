"""Duplex routes with stages in the real program: servers and clients that nobody here wrote, signals, reloads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from duplexes import BOTH, Duplex, assert_room_again, connected, crowd, in_background, outcome, turned_away
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    payload_file,
    program,
    receive_all,
    receive_exactly,
    refused_address,
    running,
    tcp_listener,
)
from real_servers import free_port, nginx, redis, run
from relays import Process, run_relay, serving
from reloads import reload

RECORDED = {
    "stages": [{"tee": {"to": {"file": "{id}.to"}}}],
    "replies": [{"tee": {"to": {"file": "{id}.back"}, "on_slow": "spill"}}],
}


def config(source: str, sink: Any, stages: dict[str, Any], engines: int = 2) -> str:
    """One duplex route called r, as YAML: JSON is that."""
    route = {"source": {"listen": source}, "sink": sink, "duplex": True, **stages}
    return json.dumps({"engines": engines, "drain": "5s", "routes": {"r": route}})


def over(relay: Process) -> list[dict[str, Any]]:
    """Ends the relay, and waits for it; its sessions."""
    relay.signal(signal.SIGTERM)
    assert relay.wait() == 0
    return [line for line in relay.lines if line.get("event") == "session"]


# -- clients and servers


def test_redis_benchmark_through_a_recording(tmp_path: Path) -> None:
    """Requests of many clients one by one and in pipelines: each direction of each connection is in its file."""
    with (
        redis(tmp_path) as (port, _path),
        serving(config("tcp://127.0.0.1:0", f"tcp://127.0.0.1:{port}", RECORDED), tmp_path) as relay,
    ):
        at = ["-h", "127.0.0.1", "-p", str(relay.port()), "--csv"]
        run("redis-benchmark", *at, "-n", "2000", "-c", "10", "-t", "ping,set,get")
        run("redis-benchmark", *at, "-n", "20000", "-c", "10", "-P", "32", "-t", "set,get,lrange_100")
        said = run("redis-cli", "-h", "127.0.0.1", "-p", str(relay.port()), "echo", "recorded")
        assert said.strip() == "recorded"
        sessions = over(relay)
        assert len(sessions) > 20
        whole = 0
        for one in sessions:
            files = [tmp_path / f"{one['id']}.{way}" for way in ("to", "back")]
            if one["result"] == "delivered":
                whole += 1
                assert [file.stat().st_size for file in files] == [one["bytes"], one["bytes_back"]]
            else:  # redis-benchmark ends some of its connections by a reset
                assert (one["ended_by"], "ECONNRESET" in one["reason"]) == ("source", True)
                assert all(file.with_name(file.name + ".part").exists() for file in files)
        assert whole
        assert any(b"recorded" in file.read_bytes() for file in tmp_path.glob("*.back"))


def test_curl_and_nginx_through_a_recording(tmp_path: Path) -> None:
    """A download and an upload arrive as without relay; the recording holds the file behind its HTTP headers."""
    (tmp_path / "site").mkdir()
    with nginx(tmp_path / "site") as (port, root):
        digest = payload_file(root / "big", 1, 20_000_003)
        with serving(config("tcp://127.0.0.1:0", f"tcp://127.0.0.1:{port}", RECORDED), tmp_path) as relay:
            url = f"http://127.0.0.1:{relay.port()}"
            got = tmp_path / "got"
            curl = ["curl", "-sS", "--fail", "--max-time", "60"]
            run(*curl, "-H", "Accept-Encoding: identity", f"{url}/big", "-o", str(got))
            assert hashlib.sha256(got.read_bytes()).hexdigest() == digest
            run(*curl, "-T", str(got), f"{url}/again")
            assert (root / "again").read_bytes() == got.read_bytes()
            sessions = over(relay)
        assert [one["result"] for one in sessions] == ["delivered"] * 2
        body = got.read_bytes()
        assert (tmp_path / f"{sessions[0]['id']}.back").read_bytes().endswith(body)
        assert (tmp_path / f"{sessions[1]['id']}.to").read_bytes().endswith(body)


def test_socat_asks_and_half_closes(tmp_path: Path) -> None:
    """socat at both ends and at the mirror, unix in front: a half-closed question gets its answer, and is mirrored."""
    socat = program("socat")
    data = payload(2, 3_000_000)
    (tmp_path / "question").write_bytes(data)
    server_port, mirror_port = free_port(), free_port()
    server = [socat, f"TCP4-LISTEN:{server_port},bind=127.0.0.1,reuseaddr", "EXEC:sha256sum"]
    mirror = [
        socat,
        "-u",
        f"TCP4-LISTEN:{mirror_port},bind=127.0.0.1,reuseaddr",
        f"CREATE:{tmp_path}/mirrored",
    ]
    stages = {"stages": [{"tee": {"to": f"tcp://127.0.0.1:{mirror_port}", "on_slow": "spill"}}]}
    text = config(f"unix://{tmp_path}/in", f"tcp://127.0.0.1:{server_port}", stages)
    with running(server), running(mirror) as mirroring, serving(text, tmp_path) as relay:
        relay.addresses(1)
        client = [socat, "-t", "20", "-", f"UNIX-CONNECT:{tmp_path}/in"]
        eventually(lambda: listens(server_port) and listens(mirror_port), "both servers listen")
        with (tmp_path / "question").open("rb") as question:
            done = subprocess.run(client, stdin=question, stdout=-1, check=True, timeout=20)
        assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
        (session,) = relay.sessions(1)
        assert (session["bytes"], session["result"]) == (len(data), "delivered")
        mirroring.wait(PATIENCE)
        assert_same((tmp_path / "mirrored").read_bytes(), data)


def listens(port: int) -> bool:
    """Whether somebody listens there, without a connection that would use up socat's only one."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


# -- what a duplex route has besides


def test_another_upstream_is_tried(tmp_path: Path) -> None:
    """The first upstream refuses: the second has the session, the record says who was passed over."""
    with tcp_listener() as (listening, address):
        sink = {"connect": [refused_address(), address], "balance": "first"}
        with Duplex({"listen": "tcp://127.0.0.1:0"}, sink, **BOTH) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                client.sendall(b"hello")
                assert receive_exactly(server, 5) == b"hello"
            record = duplex.record()
        (main,) = (one for one in record.sinks if one.address != "null:")
        assert (record.result, main.upstream, main.tries) == ("delivered", address, 2)
        assert [name for name, _why in main.passed_over] == [sink["connect"][0]]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_proxy_headers_pass_through(tmp_path: Path, version: str) -> None:
    """A header that is accepted names the peer, the one that is sent goes first; no mirror and no count has it."""
    stages = {**BOTH, "stages": [{"tee": {"to": {"file": f"{tmp_path}/{{id}}.to"}}}]}
    source = {"listen": "tcp://127.0.0.1:0", "proxy_protocol": ["127.0.0.0/8"]}
    with tcp_listener() as (listening, address):
        with Duplex(source, {"connect": address, "proxy_protocol": version}, **stages) as duplex:
            with connected(duplex.address) as client:
                client.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 7777 443\r\n")
                with accept(listening) as server:
                    head = b"PROXY TCP4 192.0.2.7 192.0.2.1 7777 443\r\n"
                    if version == "v2":
                        head = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\7\xc0\0\2\1" + bytes.fromhex(
                            "1e6101bb"
                        )
                    assert receive_exactly(server, len(head)) == head  # before the client has said anything
                    client.sendall(b"payload")
                    client.shutdown(socket.SHUT_WR)
                    assert receive_all(server) == b"payload"
            record = duplex.record()
        (path,) = tmp_path.glob("*.to")
        assert path.read_bytes() == b"payload"
        (main,) = (one for one in record.sinks if one.address == address)
        assert (record.peer, record.bytes, main.bytes) == ("192.0.2.7:7777", 7, 7)


def test_a_half_closed_session_is_ended() -> None:
    """After limits.half_closed without a byte, once one side has ended its stream, both are reset, and it is said."""
    with tcp_listener() as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "limits": {"half_closed": "0.3s"}}
        with Duplex(source, {"connect": address}, **BOTH) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                server.settimeout(PATIENCE)
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
                assert outcome(server) == (b"x", "end")
                assert outcome(client) == (b"", "ConnectionResetError")
            assert "limits.half_closed" in duplex.record().reason


# -- signals


def test_a_reload_changes_stages_for_new_sessions(tmp_path: Path) -> None:
    """SIGHUP takes stages away and adds others: a session under way keeps its own, a new one has the new ones."""
    with tcp_listener() as (listening, address):
        here = f"tcp://127.0.0.1:{free_port()}"
        fresh = {"replies": [{"tee": {"to": {"file": "new-{id}"}}}]}
        with serving(config(here, address, RECORDED), tmp_path) as relay:
            relay.addresses(1)
            with connected(here) as client, accept(listening) as server:
                client.sendall(b"old")
                assert receive_exactly(server, 3) == b"old"
                reload(relay, config(here, address, fresh))
                with connected(here) as other, accept(listening) as second:
                    second.sendall(b"new")
                    assert receive_exactly(other, 3) == b"new"
                client.sendall(b"er")
                assert receive_exactly(server, 2) == b"er"
            by_id = {one["id"]: one for one in relay.sessions(2)}
            assert {one["result"] for one in by_id.values()} == {"delivered"}
            assert sorted(path.read_text() for path in tmp_path.glob("*.to")) == ["older"]
            assert [path.read_text() for path in tmp_path.glob("new-*")] == ["new"]


def test_a_reload_leaves_a_session_with_a_fifo_where_it_is(tmp_path: Path) -> None:
    """A fifo is a mirror of the old sessions and of the new ones: a reload ends nobody for it."""
    os.mkfifo(tmp_path / "fifo")
    tee = {"tee": {"to": {"fifo": "fifo"}}}
    with tcp_listener() as (listening, address):
        here = f"tcp://127.0.0.1:{free_port()}"
        reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        try:
            with serving(config(here, address, {"stages": [tee]}), tmp_path) as relay:
                relay.addresses(1)
                with connected(here) as client, accept(listening) as server:
                    client.sendall(b"before")
                    assert receive_exactly(server, 6) == b"before"
                    reload(relay, config(here, address, {"stages": [tee, "meter"]}))
                    with connected(here) as other, accept(listening) as second:
                        other.sendall(b"beside")
                        assert receive_exactly(second, 6) == b"beside"
                    client.sendall(b"after")
                    assert receive_exactly(server, 5) == b"after"
                assert {one["result"] for one in relay.sessions(2)} == {"delivered"}
            assert os.read(reader, 100) == b"beforebesideafter"
        finally:
            os.close(reader)


def test_the_log_of_a_mirror_goes_on_after_a_kill(tmp_path: Path) -> None:
    """relay is killed while a mirror of the replies is away: the next run delivers what its log has."""
    mirror_port = free_port()
    slow = {"policy": "spill", "directory": str(tmp_path / "log")}
    replies = {"replies": [{"tee": {"to": f"tcp://127.0.0.1:{mirror_port}", "on_slow": slow}}]}
    data = payload(9, 2_000_000)
    with tcp_listener() as (listening, address):
        text = config("tcp://127.0.0.1:0", address, replies)
        with serving(text, tmp_path) as relay:
            with connected(f"tcp://127.0.0.1:{relay.port()}") as client, accept(listening) as server:
                sender = in_background(server.sendall, data)
                assert_same(receive_exactly(client, len(data)), data)
                sender.join(PATIENCE)
                eventually(lambda: logged(tmp_path / "log") >= len(data), "all of it is in the log")
                relay.signal(signal.SIGKILL)
                relay.wait()
        with socket.create_server(("127.0.0.1", mirror_port)) as mirror, serving(text, tmp_path) as relay:
            with accept(mirror) as reader:
                assert_same(receive_exactly(reader, len(data)), data)


def logged(directory: Path) -> int:
    """Bytes of all segments in a spill directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(("engines", "room"), [(1, 80), (3, 100)])
def test_descriptors_that_run_out_do_not_harm_sessions(tmp_path: Path, engines: int, room: int) -> None:
    """At the limit of open files newcomers are refused or wait, sessions go on, and later there is room again."""
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        pytest.skip("prlimit is missing: install util-linux")
    with (
        tcp_listener(backlog=200) as (listening, address),
        serving(
            config("tcp://127.0.0.1:0", address, BOTH, engines=engines),
            tmp_path,
            prefix=(prlimit, f"--nofile={room}:{room}"),
        ) as relay,
    ):
        where = f"tcp://127.0.0.1:{relay.port()}"
        first = connected(where)
        server = accept(listening)
        first.sendall(b"on")
        assert receive_exactly(server, 2) == b"on"
        clients = crowd(where, 40)
        first.sendall(b"ward")
        assert receive_exactly(server, 4) == b"ward"
        for sock in clients:
            sock.close()
        assert_room_again(where, listening)
        first.sendall(b"still")
        assert receive_exactly(server, 5) == b"still"
        for sock in (first, server):
            sock.close()


def test_a_refused_upstream_is_in_the_journal(tmp_path: Path) -> None:
    """A session that never was is a record of its own, as without stages."""
    text = config("tcp://127.0.0.1:0", refused_address(), RECORDED)
    with serving(text, tmp_path) as relay:
        assert turned_away(f"tcp://127.0.0.1:{relay.port()}")
        (session,) = relay.sessions(1)
        assert (session["result"], session["ended_by"]) == ("failed", "sinks")
        assert "ECONNREFUSED" in session["reason"]
        assert not list(tmp_path.glob("*.to*"))


def test_status_tells_what_moved_until_the_mirrors_are_done(tmp_path: Path) -> None:
    """`relay status` counts a session's bytes both ways while it is open, while its mirror is late, and afterwards."""

    def status() -> dict[str, Any]:
        done = run_relay("status", "--json", "--admin", "unix://admin.sock", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (route,) = json.loads(done.stdout)["routes"]
        return {key: route[key] for key in ("streams", "bytes", "bytes_back")}

    with socket.create_server(("127.0.0.1", 0)) as mirror, tcp_listener() as (listening, address):
        late = {"to": f"tcp://127.0.0.1:{mirror.getsockname()[1]}", "on_slow": "spill"}
        given = json.loads(config("tcp://127.0.0.1:0", address, {"replies": [{"tee": late}]}))
        text = json.dumps({**given, "admin": {"socket": "unix://admin.sock"}})
        data = payload(4, 20_000_000)
        with serving(text, tmp_path) as relay:
            with connected(f"tcp://127.0.0.1:{relay.port()}") as client, accept(listening) as server:
                client.sendall(b"question")
                assert receive_exactly(server, 8) == b"question"
                sender = in_background(server.sendall, data)
                assert_same(receive_exactly(client, len(data)), data)
                sender.join(PATIENCE)
                assert status() == {"streams": 1, "bytes": 8, "bytes_back": len(data)}
            eventually(lambda: status()["streams"] == 0, "its sockets are closed")
            assert status() == {"streams": 0, "bytes": 8, "bytes_back": len(data)}
            assert not [line for line in relay.lines if line.get("event") == "session"]
            with accept(mirror) as reader:
                assert_same(receive_all(reader), data)
            assert relay.sessions(1)[0]["result"] == "delivered"
            assert status() == {"streams": 0, "bytes": 8, "bytes_back": len(data)}


def test_a_stage_of_either_direction_can_be_set(tmp_path: Path) -> None:
    """`relay set` takes the brake off the replies while they pass; a new session has the new rate from the start."""
    stages = {"stages": [{"throttle": {"rate": "1GB/s"}}], "replies": [{"throttle": {"rate": "10kB/s"}}]}
    with tcp_listener() as (listening, address):
        given = json.loads(config("tcp://127.0.0.1:0", address, stages))
        text = json.dumps({**given, "admin": {"socket": "unix://admin.sock"}})
        with serving(text, tmp_path) as relay:
            for round_ in range(2):
                with connected(f"tcp://127.0.0.1:{relay.port()}") as client, accept(listening) as server:
                    sender = in_background(server.sendall, bytes(3_000_000))
                    assert len(receive_exactly(client, 1000)) == 1000
                    if not round_:
                        words = ("set", "r", "throttle#2", "rate=1GB/s", "--admin", "unix://admin.sock")
                        done = run_relay(*words, cwd=tmp_path)
                        assert done.returncode == 0, done.stderr
                    receive_exactly(client, 3_000_000 - 1000)
                    sender.join(PATIENCE)
