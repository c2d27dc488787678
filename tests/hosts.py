"""Hosts on one switch, each in a network namespace of the test's, and a DNS of theirs that the test writes.

    host-0 (10.78.0.10) ... host-n --veth-- switch --veth-- dns (10.78.0.1)

As netns.py, nothing of the machine's own network is touched. `ip netns exec` gives each host the resolv.conf of
/etc/netns/HOST, which is there while the hosts are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from netns import inside, ip
from peers import program

DNS = "10.78.0.1"
_numbers = itertools.count(1)


class Hosts:
    """Made by `hosts`; `names` is what its DNS answers, to be changed at will."""

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self._free = itertools.count(10)
        self.names: dict[str, str] = {}
        self.asked: list[str] = []
        self._spaces: list[str] = []
        self.switch = self._space("switch")
        ip(f"-n {self.switch} link add br0 type bridge", f"-n {self.switch} link set br0 up")

    def _space(self, name: str) -> str:
        space = f"{self._stem}-{name}"
        try:
            ip(f"netns add {space}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        self._spaces.append(space)
        return space

    def add(self, name: str, address: str = "") -> str:
        """A host more; its address, which its name means from now on."""
        space = self._space(name)
        address = address or f"10.78.0.{next(self._free)}"
        port = f"p{len(self._spaces)}"
        ip(
            f"-n {self.switch} link add {port} type veth peer name eth0 netns {space}",
            f"-n {self.switch} link set {port} master br0 up",
            f"-n {space} address add {address}/24 dev eth0",
            f"-n {space} link set lo up",
            f"-n {space} link set eth0 up",
        )
        etc = Path("/etc/netns") / space
        etc.mkdir(parents=True)
        (etc / "resolv.conf").write_text(f"nameserver {DNS}\noptions timeout:1 attempts:3\n")
        self.names[name] = address
        return address

    def prefix(self, name: str) -> list[str]:
        """In front of a command: run it on that host."""
        return [program("ip"), "netns", "exec", f"{self._stem}-{name}"]

    def sent(self, name: str) -> int:
        """Bytes that have left the host's interface so far, headers and all."""
        said = subprocess.run(
            [program("ip"), "-n", f"{self._stem}-{name}", "-s", "-j", "link", "show", "eth0"],
            capture_output=True,
            check=True,
        )
        return int(json.loads(said.stdout)[0]["stats64"]["tx"]["bytes"])

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Sockets that this thread makes in the block belong to that host."""
        with inside(f"/run/netns/{self._stem}-{name}"):
            yield

    def connect(self, name: str, address: str, port: int) -> socket.socket:
        """A socket of that host, connected."""
        with self.on(name):
            sock = socket.socket()
        sock.connect((address, port))
        return sock

    def answer(self, sock: socket.socket) -> None:
        """On a thread: answers questions for addresses until a datagram without a question comes."""
        while True:
            raw, asker = sock.recvfrom(512)
            if len(raw) < 17:
                return
            labels, at = [], 12
            while raw[at]:
                labels.append(raw[at + 1 : at + 1 + raw[at]].decode())
                at += 1 + raw[at]
            kind = struct.unpack_from("!H", raw, at + 1)[0]
            name = ".".join(labels)
            self.asked.append(name)
            address = self.names.get(name)
            found = b""
            if address is not None and kind == 1:
                found = struct.pack("!HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(address)
            code = 0 if address is not None else 3
            head = raw[:2] + struct.pack("!HHHHH", 0x8580 | code, 1, int(bool(found)), 0, 0)
            sock.sendto(head + raw[12 : at + 5] + found, asker)

    def remove(self) -> None:
        """Takes everything away again."""
        for space in self._spaces:
            if Path(f"/run/netns/{space}").exists():
                ip(f"netns del {space}")
            shutil.rmtree(f"/etc/netns/{space}", ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else's are there
            Path("/etc/netns").rmdir()


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """Makes the switch and the DNS; skips the test where that is not possible."""
    if os.geteuid():
        pytest.skip("making network namespaces needs root")
    program("ip")
    made = Hosts(f"tree-{os.getpid()}-{next(_numbers)}")
    try:
        made.add("dns", DNS)
        with made.on("dns"):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((DNS, 53))
        thread = threading.Thread(target=made.answer, args=(sock,))
        thread.start()
        try:
            yield made
        finally:
            with made.on("dns"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
                end.sendto(b"end", (DNS, 53))
            thread.join()
            sock.close()
    finally:
        made.remove()
