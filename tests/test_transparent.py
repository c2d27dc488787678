"""Sinks that are connected to from the address of the source's peer."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from duplexes import Duplex, outcome
from forked import needs_root
from netns import PEER, RELAY, Network, ip, network
from peers import accept, assert_same, payload, program, receive_all, tcp_listener
from relays import environment, serving

from relay.config.load import loads
from relay.endpoints.proxy_header import make
from relay.errors import ConfigErrors

IP_TRANSPARENT = 19
FOREIGN = "192.0.2.7"


def is_permitted() -> bool:
    """Whether this process may use IP_TRANSPARENT."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        except OSError:
            return False
    return True


needs_transparent = pytest.mark.skipif(
    not is_permitted(), reason="CAP_NET_ADMIN or CAP_NET_RAW is missing: IP_TRANSPARENT is refused"
)


@pytest.fixture
def net() -> Iterator[Network]:
    """The relay's host and the peer's, with a switch between them; what comes to the relay's is all its own."""
    with network() as made:
        ip(
            f"-n {made.peer} route add {FOREIGN}/32 via {RELAY}",
            f"-n {made.relay} rule add iif eth0 lookup 100",
            f"-n {made.relay} route add local default dev lo table 100",
        )
        yield made


@needs_transparent
@pytest.mark.parametrize("stages", [[], [{"meter": {}}]], ids=["plain", "stages"])
def test_the_server_sees_the_clients_address(stages: list[Any]) -> None:
    """A client's own address is where the server's connection comes from; its port is one of the kernel's choice."""
    with tcp_listener() as (listening, address):
        sink = {"connect": address, "transparent": True}
        with Duplex("tcp://127.0.0.1:0", sink, stages=stages) as duplex:
            at = ("127.0.0.1", int(duplex.address.rpartition(":")[2]))
            with socket.create_connection(at, source_address=("127.0.0.77", 0)) as client:
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
                with accept(listening) as server:
                    assert server.getpeername()[0] == "127.0.0.77"
                    assert receive_all(server) == b"x"
                assert receive_all(client) == b""
            assert duplex.record().result == "delivered"


@needs_transparent
def test_an_address_of_nobody_here(net: Network, tmp_path: Path) -> None:
    """On a real network, from an address that is not relay's: both ways and a half-close pass."""
    data, back = payload(1, 2_000_000), payload(2, 1_000_000)
    with net.listener() as listening:
        config = (
            f'routes: {{r: {{source: {{listen: "tcp://{RELAY}:0", proxy_protocol: "{RELAY}"}}, duplex: true, '
            f'sink: {{connect: "tcp://{PEER}:{listening.getsockname()[1]}", transparent: true}}}}}}'
        )
        with serving(config, tmp_path, prefix=net.prefix) as served:
            with net.connected(net.relay, served.port()) as client:
                client.sendall(make("v2", f"{FOREIGN}:4711", f"{RELAY}:1"))
                with accept(listening) as server:
                    assert server.getpeername()[0] == FOREIGN
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    assert_same(receive_all(server), data)
                    server.sendall(back)
                    server.shutdown(socket.SHUT_WR)
                    assert_same(receive_all(client), back)
            (record,) = served.sessions(1)
            assert (record["peer"], record["result"]) == (f"{FOREIGN}:4711", "delivered")


@needs_transparent
def test_two_families_do_not_meet() -> None:
    """An IPv6 client cannot be shown to an IPv4 server: the session fails, and the record says why."""
    with tcp_listener() as (_listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "proxy_protocol": "127.0.0.1"}
        with Duplex(source, {"connect": address, "transparent": True}) as duplex:
            at = ("127.0.0.1", int(duplex.address.rpartition(":")[2]))
            with socket.create_connection(at) as client:
                client.sendall(make("v1", "[2001:db8::1]:1", "[2001:db8::2]:2"))
                assert outcome(client)[1] == "ConnectionResetError"
            reason = duplex.record().reason
            assert errno.errorcode[errno.EAFNOSUPPORT] in reason
            assert "address family" in reason


@needs_root
def test_without_the_capability(tmp_path: Path) -> None:
    """check says what is missing, and so does the record of a session that could not be connected."""
    prefix = [program("setpriv"), "--bounding-set=-net_raw,-net_admin", "--"]
    with tcp_listener() as (_listening, address):
        config = (
            'routes: {r: {source: "tcp://127.0.0.1:0", duplex: true, '
            f'sink: {{connect: "{address}", transparent: true}}}}}}'
        )
        with serving(config, tmp_path, prefix=prefix) as served:
            with socket.create_connection(("127.0.0.1", served.port())) as client:
                assert outcome(client)[1] == "ConnectionResetError"
            (record,) = served.sessions(1)
            assert "EPERM" in record["reason"]
            assert "CAP_NET_RAW" in record["reason"]
        checked = subprocess.run(
            [*prefix, sys.executable, "-m", "relay", "check", str(served.config)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert "CAP_NET_RAW" in checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ("source: 'tcp://:1', sink: {connect: 'tcp://h:1', transparent: true}", "needs 'duplex: true'"),
        (
            "source: 'unix:///x', duplex: true, sink: {connect: 'tcp://h:1', transparent: true}",
            "unix peer has none",
        ),
        (
            "source: 'tcp://:1', duplex: true, sink: {connect: 'unix:///x', transparent: true}",
            "connect to tcp only",
        ),
    ],
)
def test_what_cannot_be_is_refused(route: str, said: str) -> None:
    """Each is refused in plain words."""
    with pytest.raises(ConfigErrors) as caught:
        loads(f"routes: {{r: {{{route}}}}}", "f", to_run=True)
    assert said in str(caught.value.errors[0])


@needs_transparent
def test_many_at_once_share_no_port(net: Network, tmp_path: Path) -> None:
    """Fifty sessions from one foreign address at a time each have a connection of their own."""
    with net.listener() as listening:
        listening.listen(64)
        config = (
            f'routes: {{r: {{source: {{listen: "tcp://{RELAY}:0", proxy_protocol: "{RELAY}"}}, duplex: true, '
            f'sink: {{connect: "tcp://{PEER}:{listening.getsockname()[1]}", transparent: true}}}}}}'
        )
        with serving(config, tmp_path, prefix=net.prefix) as served:
            clients, servers = [], []
            for number in range(50):
                clients.append(net.connected(net.relay, served.port()))
                clients[-1].sendall(make("v1", f"{FOREIGN}:{number + 1}", f"{RELAY}:1") + bytes([number]))
                servers.append(accept(listening))
            assert len({server.getpeername() for server in servers}) == 50
            assert sorted(server.recv(1) for server in servers) == [bytes([number]) for number in range(50)]
            for sock in [*clients, *servers]:
                sock.close()
            assert {record["result"] for record in served.sessions(50)} <= {"delivered", "failed"}
