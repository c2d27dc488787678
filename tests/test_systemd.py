"""What a service manager gives: sockets that it has bound, by name or at their own addresses."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from manager import activated, ask, listener, port_of, route
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    program,
    receive_all,
    send_all,
    tcp_listener,
    there_and_back,
)
from relays import environment, relay, run_relay, serving

from relay.config.data import from_data
from relay.endpoints.address import Address
from relay.errors import ConfigErrors


def stopped(pid: int) -> bool:
    """Whether no thread of it runs any more."""
    states = [
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return set(states) == {"T"}


def test_a_one_way_route_takes_the_socket_of_a_name(tmp_path: Path) -> None:
    """Who connected before relay was started is served, out of the backlog of the socket that was passed."""
    data = payload(1, 300_007)
    with listener() as web, ask(port_of(web), b"") as early:
        with activated(route("systemd://web", '"got-{id}.bin"'), tmp_path, [("web", web)]) as served:
            assert receive_all(early) == b""
            with socket.create_connection(("127.0.0.1", served.port())) as sock:
                send_all(sock, data)
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(sock) == b""
            served.sessions(2)
            assert served.port() == port_of(web)
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    assert_same((tmp_path / "got-2.bin").read_bytes(), data)


def test_a_duplex_route_takes_passed_sockets_of_tcp_and_unix(tmp_path: Path) -> None:
    """Both ways over a tcp and a unix socket that were passed, by name; the unix socket's file is left to its maker."""
    path = tmp_path / "in.sock"
    with socket.socket(socket.AF_UNIX) as local, listener() as web, tcp_listener() as (behind, address):
        local.bind(str(path))
        local.listen()
        text = (
            "routes:\n"
            f'  a: {{source: {{listen: "systemd://web"}}, sink: "{address}", duplex: true}}\n'
            f'  b: {{source: {{listen: "systemd://local"}}, sink: "{address}", duplex: true}}\n'
        )
        with activated(text, tmp_path, [("local", local), ("web", web)]) as served:
            for family, place in (
                (socket.AF_UNIX, str(path)),
                (socket.AF_INET, ("127.0.0.1", port_of(web))),
            ):
                with socket.socket(family) as sock:
                    sock.settimeout(PATIENCE)
                    sock.connect(place)
                    there_and_back(sock, behind)
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
        assert path.is_socket()


def test_a_listener_takes_the_passed_socket_at_its_own_address(tmp_path: Path) -> None:
    """A configuration that names addresses runs with passed sockets as it is; one at another address is its own."""
    with listener() as web:
        text = f"""
routes:
  r: {{source: {{listen: "tcp://127.0.0.1:{port_of(web)}"}}, sink: "null:"}}
  s: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: "null:"}}
"""
        with activated(text, tmp_path, [("whatever", web)]) as served:
            served.said("ready")
            assert served.port() == port_of(web)
            with ask(port_of(web)) as sock:
                assert receive_all(sock) == b""
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
        with ask(port_of(web)) as sock, accept(web) as again:  # the passed socket outlives relay
            assert receive_all(again) == b"question"
            assert sock.fileno() >= 0


def test_who_waits_at_a_passed_socket_is_the_next_relays(tmp_path: Path) -> None:
    """relay ends at once while somebody waits in the backlog: that peer is not reset, and the next relay serves it."""
    with listener() as web, socket.create_connection(("127.0.0.1", port_of(web))) as first:
        first.sendall(b"x")
        limited = route("systemd://web", "out.bin", ", limits: {lifetime: 60s}")
        with activated(limited, tmp_path, [("web", web)]) as served:
            served.said("ready")
            os.kill(served.pid, signal.SIGSTOP)
            eventually(lambda: stopped(served.pid), "every thread has stopped")
            with ask(port_of(web), b"later") as second:
                os.kill(served.pid, signal.SIGKILL)
                served.wait()
                with activated(route("systemd://web", '"got-{id}.bin"'), tmp_path, [("web", web)]) as again:
                    again.sessions(1)
                    assert receive_all(second) == b""
    assert b"later" in [path.read_bytes() for path in tmp_path.glob("got-*.bin")]


def test_a_reload_hands_a_passed_socket_on(tmp_path: Path) -> None:
    """A changed route keeps the passed socket; one that comes back to it after a reload without it finds it again."""
    with listener() as web:
        with activated(route("systemd://web"), tmp_path, [("web", web)]) as served:
            served.said("ready")
            for number, source in enumerate(("systemd://web", "tcp://127.0.0.1:0", "systemd://web")):
                served.config.write_text(route(source, f'"{number}-{{id}}.bin"'))
                served.signal(signal.SIGHUP)
                served.until(
                    lambda number=number: sum("reloaded" in line["message"] for line in served.lines) > number
                )
            with ask(port_of(web)) as sock:
                assert receive_all(sock) == b""
            served.sessions(1)
    assert [path.read_bytes() for path in tmp_path.glob("2-*.bin")] == [b"question"]


def test_names_that_were_not_passed_are_errors_of_the_configuration(tmp_path: Path) -> None:
    """A slip in the name is told at its place; two sockets of one name are told apart; by hand nothing is passed."""
    with listener() as one, listener() as two:
        with activated(route("systemd://wbe"), tmp_path, [("web", one)]) as served:
            assert served.wait() == 3
            assert "relay.yaml:3:24:" in served.text
            assert "did you mean 'web'?" in served.text
        with activated(route("systemd://web"), tmp_path, [("web", one), ("web", two)]) as served:
            assert served.wait() == 3
            assert "systemd://web/0 to systemd://web/1" in served.text
        with activated(route("systemd://web/1"), tmp_path, [("web", one), ("web", two)]) as served:
            assert served.port() == port_of(two)
    with serving(route("systemd://web"), tmp_path) as served:
        assert served.wait() == 4
        assert "start relay by the unit of that socket" in served.text


def test_check_and_plan_know_the_scheme_without_a_socket(tmp_path: Path) -> None:
    """Outside of a unit the configuration is checked and planned; options of files that relay makes are refused."""
    path = tmp_path / "relay.yaml"
    path.write_text(route("systemd://web", more=", limits: {per_peer: 3}"))
    for command in ("check", "plan"):
        done = run_relay(command, path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    path.write_text(route("systemd://web", more=", mode: 0660"))
    done = run_relay("check", path, cwd=tmp_path)
    assert done.returncode == 3
    assert b"'mode' applies to unix sockets that listen on a path only" in done.stderr


def test_a_socket_that_does_not_listen_is_refused(tmp_path: Path) -> None:
    """With Accept=yes a connection is passed, which is no listener: relay says what the unit needs."""
    one, two = socket.socketpair()
    with one, two, activated(route("systemd://web"), tmp_path, [("web", one)]) as served:
        assert served.wait() == 2
        assert "Accept=no" in served.text


def test_sockets_for_another_process_are_left_alone(tmp_path: Path) -> None:
    """LISTEN_PID names somebody else: nothing is taken, and descriptor 3 is what it was."""
    env = {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "web"}
    with serving(route("systemd://web"), tmp_path, env=environment(**env)) as served:
        assert served.wait() == 4


def test_the_scheme_stands_where_something_listens() -> None:
    """A sink listens on a passed socket, too; nobody connects to one, and the address is written as it was read."""
    assert str(Address.parse("systemd://web/1")) == "systemd://web/1"
    from_data({"routes": {"r": {"source": "systemd://in", "sink": {"listen": "systemd://out"}}}}, "test")
    with pytest.raises(ConfigErrors, match="'connect' takes a tcp or unix address"):
        from_data({"routes": {"r": {"source": "null:", "sink": "systemd://out"}}}, "test")
    one = {"source": "systemd://in", "sink": "null:"}
    with pytest.raises(ConfigErrors, match="listened on by route 'r' already"):
        from_data({"routes": {"r": one, "s": one}}, "test")


def test_systemds_own_activator_starts_relay(tmp_path: Path) -> None:
    """systemd-socket-activate listens, starts relay with the first connection, and that connection is served."""
    activate = program("systemd-socket-activate")
    with listener() as free:
        port = port_of(free)
    prefix = [activate, "--fdname=web", "-l", f"127.0.0.1:{port}"]
    for name in ("PATH", "PYTHONPATH"):
        prefix.append(f"--setenv={name}={environment().get(name, '')}")
    config = tmp_path / "relay.yaml"
    config.write_text(route("systemd://web", '"got-{id}.bin"'))
    with relay("serve", "--log-format", "json", config, cwd=tmp_path, prefix=prefix) as served:
        served.until(lambda: any("Listening on" in line for line in served.other))
        with ask(port, b"first") as sock:
            assert receive_all(sock) == b""
        served.sessions(1)
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert (tmp_path / "got-1.bin").read_bytes() == b"first"
