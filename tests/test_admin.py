"""A real `relay serve` that is asked and told over its admin sockets, by good clients and by bad ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from admins import ADMIN, INBOX, SOCKET, asked, figure, figures, http_port, send
from peers import PATIENCE, eventually, payload, program, tcp_listener
from relays import Process, environment, run_relay, serving


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Process]:
    """A relay with an inbox and both admin listeners, ready."""
    with serving(ADMIN + "drain: 50s\n" + INBOX, tmp_path) as process:
        process.said("ready")
        yield process


# -- asked


def test_the_socket_is_its_owners_alone(served: Process, tmp_path: Path) -> None:
    """The unix socket has mode 0600 from the start, and is removed at the end."""
    status = (tmp_path / SOCKET).stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    served.signal(signal.SIGTERM)
    assert served.wait() == 0
    assert not (tmp_path / SOCKET).exists()


def test_health_over_both_listeners(served: Process, tmp_path: Path) -> None:
    """`relay health` exits with 0 for a relay that is alive, over the unix socket and over http; 1 where none is."""
    for where in (f"unix://{SOCKET}", SOCKET, f"tcp://127.0.0.1:{http_port(served)}"):
        done = run_relay("health", "--admin", where, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, b"alive\n"), done.stderr
    ready = run_relay("health", "--ready", "--admin", SOCKET, cwd=tmp_path)
    assert (ready.returncode, ready.stdout) == (0, b"ready\n")
    missing = run_relay("health", "--admin", "unix://nobody.sock", cwd=tmp_path)
    assert missing.returncode == 1
    assert b"is relay running there?" in missing.stderr


def test_the_place_comes_from_the_environment(served: Process, tmp_path: Path) -> None:
    """Without --admin a command asks at $RELAY_ADMIN; with neither that nor a session's directory it says so."""
    env = environment(RELAY_ADMIN=f"unix://{SOCKET}")
    assert run_relay("health", cwd=tmp_path, env=env).returncode == 0
    lost = run_relay("health", cwd=tmp_path)
    assert lost.returncode == 2
    assert b"write --admin" in lost.stderr


def test_status_tells_what_flows(served: Process, tmp_path: Path) -> None:
    """A stream under way is in the status with its bytes, its sink and its method; when over, as a session."""
    port = served.port()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        sock.sendall(payload(1, 100_000))

        def route() -> dict[str, object]:
            done = run_relay("status", "--json", "--admin", SOCKET, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            found: dict[str, object] = json.loads(done.stdout)["routes"][0]
            return found

        flowing = eventually(lambda: (r := route())["bytes"] == 100_000 and r, "the bytes are there")
        assert flowing["state"] == "flowing"
        assert flowing["streams"] == 1
        assert flowing["sinks"][0]["address"] == "inbox/{id}.bin"
        assert flowing["details"][0]["peer"].startswith("127.0.0.1:")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    served.sessions()
    data = eventually(
        lambda: (d := json.loads(asked(tmp_path / SOCKET, "/api/v1/status")[1]))["recent"] and d, "it is over"
    )
    assert data["routes"][0]["sessions"]["delivered"] == 1
    assert data["routes"][0]["sinks"][0]["bytes"] == 100_000
    assert data["recent"][0]["result"] == "delivered"
    text = run_relay("status", "--admin", SOCKET, cwd=tmp_path).stdout.decode()
    assert "inbox: waiting on tcp://127.0.0.1:" in text
    assert "1 delivered" in text


def test_readiness_ends_where_the_drain_begins(served: Process, tmp_path: Path) -> None:
    """From the start of a drain /readyz says 503 and /livez 200, until the last stream is over."""
    assert asked(tmp_path / SOCKET, "/readyz") == (200, "ready\n")
    with socket.create_connection(("127.0.0.1", served.port()), timeout=PATIENCE) as sock:
        sock.sendall(b"under way")
        eventually(lambda: figure(figures(tmp_path / SOCKET), "relay_route_streams") == 1, "it has come")
        done = run_relay("drain", "--admin", SOCKET, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, b"draining, 50 s at most\n")
        assert asked(tmp_path / SOCKET, "/readyz") == (503, "draining\n")
        assert asked(tmp_path / SOCKET, "/livez") == (200, "alive\n")
        assert run_relay("health", "--ready", "--admin", SOCKET, cwd=tmp_path).returncode == 1
        again = run_relay("drain", "--admin", SOCKET, cwd=tmp_path)
        assert again.stdout == b"it is draining already\n"
        refused = run_relay("reload", "--admin", SOCKET, cwd=tmp_path)
        assert refused.returncode == 1
        assert b"draining" in refused.stderr
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert served.wait() == 0


# -- told


def test_reload_tells_the_outcome(served: Process, tmp_path: Path) -> None:
    """`relay reload` says what changed; a refused configuration is 3, with every reason and its place."""
    served.config.write_text(
        served.config.read_text() + "  more: {source: 'tcp://127.0.0.1:0', sink: 'null:'}\n"
    )
    done = run_relay("reload", "--admin", SOCKET, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"reloaded: added more; 1 unchanged\n")
    served.config.write_text("routes: {a: {source: '-', snk: x}}\nengines: many\n")
    refused = run_relay("reload", "--admin", SOCKET, cwd=tmp_path)
    assert refused.returncode == 3
    assert b"relay.yaml:1:27: " in refused.stderr
    assert b"relay.yaml:2:10: " in refused.stderr
    assert b"the configuration stays as it was" in refused.stderr
    names = [one["name"] for one in json.loads(asked(tmp_path / SOCKET, "/api/v1/routes")[1])["routes"]]
    assert names == ["inbox", "more"]


def test_a_reload_that_cannot_open_a_route_is_refused(served: Process, tmp_path: Path) -> None:
    """A new route whose port is taken is the reason that is told."""
    with tcp_listener() as (_sock, address):
        served.config.write_text(
            served.config.read_text() + f"  more: {{source: '{address}', sink: 'null:'}}\n"
        )
        refused = run_relay("reload", "--admin", SOCKET, cwd=tmp_path)
    assert refused.returncode == 3
    assert b"EADDRINUSE" in refused.stderr


def test_nothing_is_told_over_http(served: Process, tmp_path: Path) -> None:
    """Over tcp, or from a page in a browser, nothing changes anything."""
    port = http_port(served)
    for order in ("reload", "drain", "set"):
        assert asked(port, f"/api/v1/{order}", {})[0] == 403
        assert asked(tmp_path / SOCKET, f"/api/v1/{order}", {}, headers={"Origin": "http://x"})[0] == 403
        assert asked(tmp_path / SOCKET, f"/api/v1/{order}")[0] == 405
    assert asked(port, "/readyz")[0] == 200


# -- figures


def test_the_figures_are_those_of_the_records(served: Process, tmp_path: Path) -> None:
    """After transfers /metrics says exactly what the session records say."""
    port = served.port()
    for number in range(3):
        send(port, payload(number, 50_000 * (number + 1)))
    records = served.sessions(3)
    eventually(
        lambda: figure(figures(tmp_path / SOCKET), "relay_sessions_total") == 3, "all sessions are counted"
    )
    found = figures(tmp_path / SOCKET)
    assert figure(found, "relay_route_received_bytes_total", route="inbox") == sum(
        r["bytes"] for r in records
    )
    sinks = [sink for record in records for sink in record["sinks"]]
    for name, key in (("sent_bytes", "bytes"), ("dropped_bytes", "dropped"), ("lost_bytes", "lost")):
        assert figure(found, f"relay_sink_{name}_total", sink="inbox/{id}.bin") == sum(s[key] for s in sinks)
    took = figure(found, "relay_session_duration_seconds_sum")
    assert took == pytest.approx(sum(record["seconds"] for record in records), abs=1e-5)
    assert figure(found, "relay_sessions_total", result="delivered", ended_by="source", reason="none") == 3
    assert not any("127.0.0.1" in value for _name, labels in found for _key, value in labels)


def test_promtool_likes_the_figures(served: Process, tmp_path: Path) -> None:
    """`promtool check metrics` has nothing to say against /metrics."""
    send(served.port(), b"something")
    served.sessions()
    text = asked(tmp_path / SOCKET, "/metrics")[1]
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text.encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_counters_never_go_back(served: Process, tmp_path: Path) -> None:
    """While streams come and go, and the route is exchanged by a reload, no counter falls between two scrapes."""
    port = served.port()
    before = figures(tmp_path / SOCKET)
    for number in range(12):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            sock.sendall(payload(number, 300_000))
            if number % 4 == 3:
                served.config.write_text(
                    served.config.read_text()
                    .replace(INBOX, INBOX + "    method: copy\n")
                    .replace("method: copy\n    method: copy\n", "")
                )
                served.signal(signal.SIGHUP)
            for _ in range(3):
                after = figures(tmp_path / SOCKET)
                for key, value in before.items():
                    if key[0].endswith(("_total", "_count", "_bucket")):
                        assert after.get(key, value) >= value, key
                before = {**before, **after}


def test_a_scrape_in_mid_reload(served: Process, tmp_path: Path) -> None:
    """While reloads follow each other every scrape is answered, with the routes that stay."""
    text = served.config.read_text()
    for number in range(10):
        served.config.write_text(text + f"  more{number}: {{source: 'tcp://127.0.0.1:0', sink: 'null:'}}\n")
        served.signal(signal.SIGHUP)
        for _ in range(3):
            found = figures(tmp_path / SOCKET)
            assert figure(found, "relay_ready") == 1
            assert figure(found, "relay_route_received_bytes_total", route="inbox") == 0


# -- bad clients


def test_a_client_that_hangs_harms_nobody(served: Process, tmp_path: Path) -> None:
    """Three times as many clients as there is room for say nothing: others are answered, streams flow."""
    hanging = []
    try:
        for number in range(48):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(tmp_path / SOCKET))
            if number % 2:
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost")
            hanging.append(sock)
        began = time.monotonic()
        assert asked(tmp_path / SOCKET, "/livez") == (200, "alive\n")
        assert time.monotonic() - began < 4
        send(served.port(), payload(1, 1 << 20))
    finally:
        for sock in hanging:
            sock.close()
    assert served.sessions()[0]["result"] == "delivered"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5_000 + b"\r\n", 431),
        (b"POST /api/v1/set HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST /api/v1/set HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"POST /api/v1/set HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST /api/v1/set HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]", 400),
        (b"POST /api/v1/set HTTP/1.1\r\nContent-Length: 3\r\n\r\n{{{", 400),
        (b"POST /api/v1/drain HTTP/1.1\r\nContent-Length: 7\r\n\r\n{\"a\":1}", 400),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n\r\n", 405),
    ],
)  # fmt: skip
def test_a_bad_request_has_a_clear_answer(
    served: Process, tmp_path: Path, request_: bytes, status: int
) -> None:
    """Requests that are too large, broken or meaningless are answered with what is wrong, and change nothing."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(tmp_path / SOCKET))
        sock.sendall(request_)
        got = b""
        while piece := sock.recv(65536):
            got += piece
    assert str(status).encode() in got[:200], got
    assert asked(tmp_path / SOCKET, "/readyz")[0] == 200


def test_a_name_that_was_pointed_here_is_not_answered(served: Process) -> None:
    """Over http a Host that is neither an address nor localhost is refused: a page may have had it pointed here."""
    port = http_port(served)
    assert asked(port, "/api/v1/status", headers={"Host": "evil.example"})[0] == 403
    for host in ("localhost", f"127.0.0.1:{port}", "[::1]:80"):
        assert asked(port, "/livez", headers={"Host": host})[0] == 200


def test_nobody_can_ask_who_may_not(served: Process, tmp_path: Path) -> None:
    """Another user of this machine cannot connect to the unix socket."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / SOCKET)!r})"
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o001 == 0 and str(directory).startswith("/tmp/"):
            directory.chmod(0o711)
    done = subprocess.run(
        ["/usr/bin/python3", "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True,
        check=False, cwd="/",
    )  # fmt: skip
    assert b"PermissionError" in done.stderr, done.stderr
