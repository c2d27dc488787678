"""Where the admin sockets of a real `relay serve` are: places that are taken, stale, missing, or others could reach."""

from __future__ import annotations

import errno
import json
import signal
import socket
import threading
from pathlib import Path

from admins import ADMIN, INBOX, SOCKET, asked
from peers import tcp_listener
from relays import environment, run_relay, serving

from relay.endpoints import unix
from relay.endpoints.address import Address
from relay.endpoints.listening import Bound
from relay.errors import SourceError


def test_a_metrics_port_that_is_taken(tmp_path: Path) -> None:
    """relay says which address is taken, and ends with 4 before any route is open."""
    with tcp_listener() as (_sock, address):
        with serving(f"admin: {{http: '{address}'}}\n" + INBOX, tmp_path) as process:
            assert process.wait() == 4
    assert f"listening on {address}: Address already in use (EADDRINUSE)" in process.text
    assert "inbox: listening" not in process.text


def test_a_path_that_is_no_socket(tmp_path: Path) -> None:
    """A file at the admin socket's path is left as it is, and relay ends with 4."""
    (tmp_path / SOCKET).write_text("mine")
    with serving(ADMIN + INBOX, tmp_path) as process:
        assert process.wait() == 4
    assert "the path exists and is not a socket" in process.text
    assert (tmp_path / SOCKET).read_text() == "mine"


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """What a relay that was killed left behind is in nobody's way."""
    with serving(ADMIN + INBOX, tmp_path) as first:
        first.said("ready")
        first.signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / SOCKET).exists()
    with serving(ADMIN + INBOX, tmp_path) as second:
        second.said("ready")
        assert asked(tmp_path / SOCKET, "/readyz")[0] == 200


def test_of_those_who_find_a_stale_socket_one_replaces_it(tmp_path: Path) -> None:
    """Many that begin at once at the same stale socket: one listens, the others find it answering and say so."""
    address = Address.parse(f"unix://{tmp_path}/stale.sock")
    for _ in range(30):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(address.path)
        found: list[Bound | SourceError] = []
        together = threading.Barrier(4)

        def begin(found: list[Bound | SourceError] = found, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                found += unix.bind(address, mode=0o600)
            except SourceError as error:
                found.append(error)

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (bound,) = [one for one in found if isinstance(one, Bound)]
        assert bound.reachable
        assert [one.errno for one in found if isinstance(one, SourceError)] == [errno.EADDRINUSE] * 3
        bound.close()


def test_two_relays_of_one_user(tmp_path: Path) -> None:
    """The first has the socket of the user's session; the second says so clearly and goes on without."""
    env = environment(XDG_RUNTIME_DIR=str(tmp_path))
    with serving(INBOX, tmp_path, env=env) as first:
        first.said("ready")
        (tmp_path / "other").mkdir()
        with serving(INBOX, tmp_path / "other", env=env) as second:
            line = second.said("there is no admin socket")
            assert line["level"] == "warning"
            assert "EADDRINUSE" in line["message"]
            second.said("ready")
            told = json.loads(run_relay("status", "--json", cwd=tmp_path, env=env).stdout)
            assert told["pid"] == first.pid
            second.signal(signal.SIGTERM)
            assert second.wait() == 0
        assert asked(tmp_path / "relay.sock", "/readyz")[0] == 200


def test_no_socket_where_nobody_asked_for_one(tmp_path: Path) -> None:
    """With `admin: {}` nothing is opened, whatever the environment says."""
    env = environment(XDG_RUNTIME_DIR=str(tmp_path))
    with serving("admin: {}\n" + INBOX, tmp_path, env=env) as process:
        process.said("ready")
        assert not (tmp_path / "relay.sock").exists()


def test_nothing_is_reached_from_elsewhere_by_default(tmp_path: Path) -> None:
    """An http address that is not this machine's own is refused, unless `remote: true` says that it is meant."""
    path = tmp_path / "a.yaml"
    for address in ("tcp://0.0.0.0:9464", "tcp://:9464", "tcp://10.0.0.1:9464", "tcp://metrics.example:9464"):
        path.write_text(f"admin: {{http: '{address}'}}\n" + INBOX)
        refused = run_relay("check", path, cwd=tmp_path)
        assert refused.returncode == 3
        assert b"a.yaml:1:15: " in refused.stderr
        assert b"can be reached from elsewhere" in refused.stderr
        path.write_text(f"admin: {{http: '{address}', remote: true}}\n" + INBOX)
        assert run_relay("check", path, cwd=tmp_path).returncode == 0
    for address in ("tcp://127.0.0.1:9464", "tcp://[::1]:9464", "tcp://localhost:9464"):
        path.write_text(f"admin: {{http: '{address}'}}\n" + INBOX)
        assert run_relay("check", path, cwd=tmp_path).returncode == 0


def test_check_and_plan_know_the_admin_sockets(tmp_path: Path) -> None:
    """`relay check` says what this machine lacks for them, `relay plan` counts their descriptors."""
    path = tmp_path / "a.yaml"
    path.write_text(INBOX)
    without = json.loads(run_relay("plan", "--format", "json", path, cwd=tmp_path).stdout)
    path.write_text("admin: {socket: 'unix://missing/a.sock', http: 'tcp://127.0.0.1:9464'}\n" + INBOX)
    done = run_relay("check", path, cwd=tmp_path)
    assert done.returncode == 0
    assert b"admin: unix://missing/a.sock: the directory missing cannot be used" in done.stderr
    counted = json.loads(run_relay("plan", "--format", "json", path, cwd=tmp_path).stdout)
    assert counted["needs"]["descriptors"] - without["needs"]["descriptors"] == 2 + 1 + 16
