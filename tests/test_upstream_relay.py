"""A relay of its own with upstreams: reloads that change their list, status and figures, networks that break."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from admins import asked, figure, figures
from duplexes import in_background
from netns import PEER, network
from peers import accept, eventually, receive_exactly
from relays import Process, run_relay, serving
from reloads import reload
from upstream_servers import HELLO, Client, Server, addresses, several

ANY = "tcp://127.0.0.1:0"  # the same one after a reload


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Three that are up; all end with the test."""
    with several(3) as made:
        yield made


def config(here: str, there: list[str], more: str = "") -> str:
    """One duplex route called r."""
    sink = json.dumps({"connect": there, "balance": "round_robin"})[1:-1]
    return (
        f'engines: 2\nroutes:\n  r: {{source: {{listen: "{here}"}}, sink: {{{sink}{more}}}, duplex: true}}\n'
    )


def test_an_upstream_is_drained_by_a_reload(tmp_path: Path, servers: list[Server]) -> None:
    """SIGHUP without one of three: it gets nobody new, and everybody goes on, those who are with it too; with a fourth
    in its place newcomers go there."""
    fourth = Server("s3")
    try:
        with serving(config(ANY, addresses(servers)), tmp_path) as relay, contextlib.ExitStack() as stack:
            (here,) = relay.addresses(1)
            clients = [stack.enter_context(Client(here)) for _ in range(6)]
            assert {client.by for client in clients} == {"s0", "s1", "s2"}
            reload(relay, config(ANY, addresses([servers[0], fourth, servers[2]])))
            newcomers = [stack.enter_context(Client(here)) for _ in range(6)]
            assert {client.by for client in newcomers} == {"s0", "s2", "s3"}
            for client in (*clients, *newcomers):
                client.works()
            for client in clients:
                client.sock.close()
            sessions = relay.sessions(6)
            assert {session["sinks"][0]["upstream"] for session in sessions} == set(addresses(servers))
            assert all(session["result"] == "delivered" for session in sessions)
    finally:
        fourth.kill()


def test_what_a_running_relay_tells_of_upstreams(tmp_path: Path, servers: list[Server]) -> None:
    """Status and figures have each upstream with its state and its sessions; after a reload without one it is leaving
    for as long as it has sessions, and is counted once."""
    admin = f"admin: {{socket: 'unix://{tmp_path}/admin'}}\n"
    servers[2].kill()
    text = admin + config(ANY, addresses(servers), ", health: {every: 0.05s, fall: 2}")
    with serving(text, tmp_path) as relay, contextlib.ExitStack() as stack:
        relay.said("is down")
        relay.said("ready")
        (here,) = relay.addresses(1)
        clients = [stack.enter_context(Client(here)) for _ in range(4)]

        def told() -> list[tuple[str, str, int]]:
            routes = json.loads(asked(tmp_path / "admin", "/api/v1/status")[1])["routes"]
            route = next(route for route in routes if route["upstreams"])
            return [(one["upstream"], one["state"], one["sessions"]) for one in route["upstreams"]]

        one, other, dead = addresses(servers)
        assert told() == [(one, "up", 2), (other, "up", 2), (dead, "down", 0)]
        words = run_relay("status", "--admin", f"unix://{tmp_path}/admin", cwd=tmp_path).stdout.decode()
        assert f"{one}: up for " in words
        assert "Connection refused (ECONNREFUSED)" in words
        reload(relay, admin + config(ANY, [one]))
        eventually(lambda: told() == [(one, "up", 2), (other, "leaving", 2)], "it is leaving")
        eventually(
            lambda: figure(figures(tmp_path / "admin"), "relay_upstream_sessions", upstream=one) == 2,
            "the route that was replaced tells of its upstreams no more",
        )
        found = figures(tmp_path / "admin")
        assert figure(found, "relay_upstream_state", upstream=other, state="leaving") == 1
        assert figure(found, "relay_upstream_state", upstream=one, state="up") == 1
        for client in clients:
            client.sock.close()
        relay.sessions(4)
        eventually(lambda: told() == [(one, "up", 0)], "the other has left")


def test_many_reloads_leave_nothing_behind(tmp_path: Path, servers: list[Server]) -> None:
    """Lists that change again and again, with checks at work and sessions that stay: in the end the process holds what
    it held before, and every session has gone on."""
    text = config(ANY, addresses(servers))
    with serving(text, tmp_path) as relay, contextlib.ExitStack() as stack:
        (here,) = relay.addresses(1)
        relay.said("ready")

        def held() -> tuple[int, int]:
            there = Path(f"/proc/{relay.pid}")
            return len(list((there / "fd").iterdir())), len(list((there / "task").iterdir()))

        with Client(here) as client:
            client.works()
        relay.sessions(1)
        before = held()
        clients = []
        for turn in range(12):
            clients.append(stack.enter_context(Client(here)))
            there = addresses(servers[turn % 3 :] + servers[: turn % 2])
            relay.config.write_text(
                config(ANY, list(dict.fromkeys(there)), ", health: {every: 0.02s, expect: s}")
            )
            relay.signal(signal.SIGHUP)
            eventually(lambda want=turn + 1: reloads(relay) == want, "it is reloaded")
        for client in clients:
            client.works()
            client.sock.close()
        relay.sessions(13)
        relay.config.write_text(text)
        relay.signal(signal.SIGHUP)
        eventually(lambda: reloads(relay) == 13, "it is reloaded")
        eventually(lambda: held() == before, "it holds what it held before")


def reloads(relay: Process) -> int:
    """How many there were so far."""
    with contextlib.suppress(AssertionError):
        relay._read(0.05)
    return sum(line.get("event") == "reload" for line in relay.lines)


def test_a_network_that_cannot_be_reached(tmp_path: Path) -> None:
    """An upstream to which there is no route costs nothing: the next one is tried at once."""
    with network() as net, contextlib.ExitStack() as stack:
        far = stack.enter_context(net.listener())
        there = ["tcp://203.0.113.1:9", f"tcp://{PEER}:{far.getsockname()[1]}"]
        with serving(config("tcp://:0", there), tmp_path, prefix=tuple(net.prefix)) as relay:
            port = relay.port()
            for _ in range(3):
                with net.connected(net.relay, port) as client, accept(far) as server:
                    client.sendall(b"x")
                    assert receive_exactly(server, 1) == b"x"
            first, second, _third = (session["sinks"][0] for session in relay.sessions(3))
            assert "ENETUNREACH" in first["passed_over"][0]["why"]
            assert (first["tries"], second["tries"]) == (2, 1)


def test_a_host_that_vanishes(tmp_path: Path, servers: list[Server]) -> None:
    """A black hole: packets to the first upstream's host just vanish. Checks find it, newcomers go to the second, whose
    sessions nothing touches, and when the cable is in again the first serves again."""
    with network() as net, contextlib.ExitStack() as stack:
        far = stack.enter_context(net.listener())
        with net.on(net.relay):
            near = socket.socket()
        stack.enter_context(near)
        near.bind(("127.0.0.1", 0))
        near.listen(8)

        def serve(listener: socket.socket, name: bytes) -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock = stack.enter_context(listener.accept()[0])
                    with contextlib.suppress(OSError):
                        sock.sendall(name.ljust(HELLO))

        for listener, name in ((far, b"far"), (near, b"near")):
            in_background(serve, listener, name)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
        there = [f"tcp://{PEER}:{far.getsockname()[1]}", f"tcp://127.0.0.1:{near.getsockname()[1]}"]
        more = ", balance: first, connect_timeout: 2s, health: {every: 0.2s, timeout: 0.3s, fall: 2, rise: 1}"
        text = config("tcp://:0", there, more).replace('"balance": "round_robin", ', "")
        text = text.replace(', "balance": "round_robin"', "")
        with serving(text, tmp_path, prefix=tuple(net.prefix)) as relay:
            port = relay.port()

            def by() -> str:
                with net.connected(net.relay, port) as sock:
                    return receive_exactly(sock, HELLO).decode().strip()

            assert by() == "far"
            net.cut()
            relay.said("is down")
            assert by() == "near"
            with net.connected(net.relay, port) as stays:
                receive_exactly(stays, HELLO)
                net.heal()
                relay.said("is up")
                eventually(lambda: by() == "far", "it serves again")
                stays.setblocking(False)
                with pytest.raises(BlockingIOError):
                    stays.recv(1)
