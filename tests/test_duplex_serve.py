"""Duplex routes in the real program: signals, reload, and programs that nobody here wrote."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from duplexes import assert_room_again, connected, crowd, in_background, outcome
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    payload_file,
    program,
    receive_exactly,
    running,
    tcp_listener,
)
from relays import Process, serving
from reloads import reload


def config(source: str, sink: str, more: str = "", engines: int = 2) -> str:
    """One duplex route called r."""
    route = f'{{source: {{listen: "{source}"}}, sink: "{sink}", duplex: true{more}}}'
    return f"engines: {engines}\ndrain: 5s\nroutes:\n  r: {route}\n"


RECORDED = (
    ', stages: [{tee: {to: {file: "{id}.to"}}}], replies: [{tee: {to: {file: "{id}.back"}, on_slow: spill}}]'
)
EITHER = pytest.mark.parametrize("stages", ["", RECORDED], ids=["plain", "staged"])


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Python's own HTTP server over a directory: its address, and the directory."""
    root = tmp_path / "www"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(root))  # type: ignore[arg-type] # as it is called

        def do_POST(self) -> None:
            digest = hashlib.sha256(self.rfile.read(int(self.headers["Content-Length"]))).hexdigest().encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(digest)))
            self.end_headers()
            self.wfile.write(digest)

        def log_message(self, *_arguments: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"tcp://127.0.0.1:{server.server_port}", root
    server.shutdown()
    thread.join()
    server.server_close()


def test_curl_downloads_and_uploads_through_relay(website: tuple[str, Path], tmp_path: Path) -> None:
    """Downloads, a range, an upload and several requests over one connection, all as without relay."""
    address, root = website
    curl = program("curl")
    digest = payload_file(root / "big", 1, 20_000_003)
    (root / "small").write_bytes(b"small")
    with serving(config("tcp://127.0.0.1:0", address), tmp_path) as relay:
        url = f"http://127.0.0.1:{relay.port()}"

        def run(*words: str) -> bytes:
            return subprocess.run([curl, "-sS", "--max-time", "20", *words], stdout=-1, check=True).stdout

        assert hashlib.sha256(run(f"{url}/big")).hexdigest() == digest
        assert run(*[f"{url}/small"] * 5) == b"small" * 5
        assert run("--data-binary", f"@{root / 'big'}", f"{url}/x").decode() == digest
        sessions = relay.sessions(3)
        assert all(session["result"] == "delivered" for session in sessions)
        assert sessions[0]["bytes_back"] > 20_000_003
        assert sessions[2]["bytes"] > 20_000_003


@pytest.mark.parametrize("engines", [1, 2])
def test_socat_over_a_unix_socket(tmp_path: Path, engines: int) -> None:
    """socat at both ends, unix in front and tcp behind: a half-closed question gets its answer."""
    socat = program("socat")
    data = payload(2, 3_000_000)
    (tmp_path / "question").write_bytes(data)
    with tcp_listener() as (listening, address):
        port = address.rpartition(":")[2]
        listening.close()
        server = [socat, f"TCP4-LISTEN:{port},bind=127.0.0.1,reuseaddr", "EXEC:sha256sum"]
        with (
            running(server),
            serving(config(f"unix://{tmp_path}/in", address, engines=engines), tmp_path) as relay,
        ):
            relay.addresses(1)
            client = [socat, "-t", "20", "-", f"UNIX-CONNECT:{tmp_path}/in"]
            with (tmp_path / "question").open("rb") as question:
                done = subprocess.run(client, stdin=question, stdout=-1, check=True, timeout=20)
            assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
            (session,) = relay.sessions(1)
            assert session["bytes"] == len(data)


@EITHER
def test_term_lets_sessions_end_and_exits_with_0(tmp_path: Path, stages: str) -> None:
    """SIGTERM: nobody new comes in, the session under way goes on to its end both ways, the exit code is 0."""
    with (
        tcp_listener() as (listening, address),
        serving(config("tcp://127.0.0.1:0", address, stages), tmp_path) as relay,
    ):
        where = f"tcp://127.0.0.1:{relay.port()}"
        with connected(where) as client, accept(listening) as server:
            server.settimeout(PATIENCE)
            client.sendall(b"x")
            receive_exactly(server, 1)
            relay.signal(signal.SIGTERM)
            relay.said("draining")
            eventually(lambda: sockets_of(relay) == 2, "the listener is closed")
            assert refuses(where)
            data = payload(3, 1_000_000)
            sender = in_background(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            assert_same(outcome(server)[0], data)
            sender.join(PATIENCE)
            server.sendall(b"done")
            server.close()
            assert outcome(client) == (b"done", "end")
        assert relay.wait() == 0
    if stages:
        (session,) = relay.sessions(1)
        assert_same((tmp_path / f"{session['id']}.to").read_bytes(), b"x" + data)
        assert (tmp_path / f"{session['id']}.back").read_bytes() == b"done"


def refuses(address: str) -> bool:
    """Whether nobody listens there."""
    try:
        connected(address).close()
    except ConnectionRefusedError:
        return True
    return False


@EITHER
def test_a_drain_that_is_cut_short_resets_and_exits_with_1(tmp_path: Path, stages: str) -> None:
    """A second SIGTERM resets what is under way, on every engine; the exit code is 1."""
    with (
        tcp_listener() as (listening, address),
        serving(config("tcp://127.0.0.1:0", address, stages), tmp_path) as relay,
    ):
        where = f"tcp://127.0.0.1:{relay.port()}"
        clients = [connected(where) for _ in range(4)]
        servers = [accept(listening) for _ in clients]
        relay.signal(signal.SIGTERM)
        relay.said("draining")
        relay.signal(signal.SIGTERM)
        assert [outcome(sock)[1] for sock in clients] == ["ConnectionResetError"] * 4
        assert relay.wait() == 1
        assert len([line for line in relay.lines if line.get("event") == "session"]) == 4
        for sock in [*clients, *servers]:
            sock.close()


def test_a_reload_leaves_sessions_where_they_are(tmp_path: Path) -> None:
    """SIGHUP with another sink: new connections go there, one under way goes on to where it was."""
    with tcp_listener() as (first, one), tcp_listener() as (second, two):
        with tcp_listener() as (free, here):
            free.close()
        with serving(config(here, one), tmp_path) as relay:
            relay.addresses(1)
            with connected(here) as client, accept(first) as server:
                reload(relay, config(here, two))
                with connected(here) as other, accept(second) as fresh:
                    other.sendall(b"new")
                    assert receive_exactly(fresh, 3) == b"new"
                client.sendall(b"old")
                assert receive_exactly(server, 3) == b"old"
            assert relay.sessions(2)[1]["result"] == "delivered"
            assert no_leftovers(relay)


def no_leftovers(relay: Process) -> bool:
    """Whether the process has no connection any more, once it had time to notice."""

    eventually(lambda: sockets_of(relay) == 1, "only the listener is left")
    return True


def sockets_of(relay: Process) -> int:
    """How many sockets the process has open."""
    there = f"/proc/{relay.pid}/fd"
    count = 0
    for fd in os.listdir(there):  # noqa: PTH208 - only names
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"{there}/{fd}").startswith("socket:")  # noqa: PTH115 - no path in it
    return count


@pytest.mark.parametrize(("engines", "room"), [(1, 40), (3, 60)])
def test_descriptors_that_run_out_do_not_harm_sessions(tmp_path: Path, engines: int, room: int) -> None:
    """At the limit of open files newcomers are refused or wait, sessions go on, and later there is room again."""
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        pytest.skip("prlimit is missing: install util-linux")
    with (
        tcp_listener(backlog=200) as (listening, address),
        serving(
            config("tcp://127.0.0.1:0", address, engines=engines),
            tmp_path,
            prefix=(prlimit, f"--nofile={room}:{room}"),
        ) as relay,
    ):
        where = f"tcp://127.0.0.1:{relay.port()}"
        first = connected(where)
        clients = crowd(where, 40)
        server = accept(listening)
        first.sendall(b"on")
        assert receive_exactly(server, 2) == b"on"
        for sock in clients:
            sock.close()
        first.sendall(b"ward")
        assert receive_exactly(server, 4) == b"ward"
        assert_room_again(where, listening)
        for sock in (first, server):
            sock.close()
