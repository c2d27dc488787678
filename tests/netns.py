"""A network of its own: two hosts and the switch between them, each in a network namespace of the test's.

    relay (10.77.0.1) --veth-- switch --veth-- peer (10.77.0.2)

Nothing of the machine's own network is touched. A cable is pulled at the switch, so that neither host sees it: packets
just vanish, as they do when a far host loses power. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import program

CLONE_NEWNET = 0x40000000
RELAY = "10.77.0.1"
PEER = "10.77.0.2"

_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*commands: str) -> None:
    """Runs `ip` for each; CalledProcessError carries what it said."""
    for command in commands:
        subprocess.run([program("ip"), *command.split()], check=True, capture_output=True)


@dataclasses.dataclass(frozen=True)
class Network:
    """The names of its three namespaces."""

    relay: str
    peer: str
    switch: str

    @property
    def prefix(self) -> list[str]:
        """In front of a command: run it on the relay's host."""
        return [program("ip"), "netns", "exec", self.relay]

    def cut(self) -> None:
        """Pulls the peer's cable at the switch: packets vanish from now on."""
        ip(f"-n {self.switch} link set to-peer down")

    def heal(self) -> None:
        """Plugs it in again."""
        ip(f"-n {self.switch} link set to-peer up")

    def slow(self, rate: str) -> None:
        """Towards the peer no more than `rate` (as tc writes it: 8mbit) passes from now on."""
        tc = [program("tc"), "-n", self.switch, "qdisc", "add", "dev", "to-peer", "root", "tbf"]
        subprocess.run([*tc, "rate", rate, "burst", "32kb", "latency", "50ms"], check=True)

    @contextlib.contextmanager
    def on(self, host: str) -> Iterator[None]:
        """Sockets that this thread makes in the block belong to that host."""
        with inside(f"/run/netns/{host}"):
            yield

    def listener(self, receive_buffer: int = 0) -> socket.socket:
        """A listening socket on the peer's host, at a port of the kernel's choice."""
        with self.on(self.peer):
            sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((PEER, 0))
        sock.listen(8)
        return sock

    def connected(self, host: str, port: int) -> socket.socket:
        """A socket of that host (one of the namespaces), connected to `port` of the relay's."""
        with self.on(host):
            sock = socket.socket()
        sock.connect((RELAY, port))
        return sock


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Sockets that this thread makes in the block belong to the network namespace at that path."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(there)
        yield
    finally:
        _enter(own)
        os.close(there)
        os.close(own)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Makes the network, and takes it away again; skips the test where that is not possible."""
    if os.geteuid():
        pytest.skip("making network namespaces needs root")
    program("ip")
    stem = f"relay-{os.getpid()}-{next(_numbers)}"
    net = Network(f"{stem}-relay", f"{stem}-peer", f"{stem}-switch")
    try:
        _make(net)
        yield net
    finally:
        for name in (net.relay, net.peer, net.switch):
            if Path(f"/run/netns/{name}").exists():
                ip(f"netns del {name}")


def _make(net: Network) -> None:
    try:
        ip(*(f"netns add {name}" for name in (net.relay, net.peer, net.switch)))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    commands = [f"-n {net.switch} link add br0 type bridge", f"-n {net.switch} link set br0 up"]
    for host, port, address in ((net.relay, "to-relay", RELAY), (net.peer, "to-peer", PEER)):
        commands += [
            f"-n {net.switch} link add {port} type veth peer name eth0 netns {host}",
            f"-n {net.switch} link set {port} master br0 up",
            f"-n {host} address add {address}/24 dev eth0",
            f"-n {host} link set lo up",
            f"-n {host} link set eth0 up",
        ]
    ip(*commands)
