"""A tree of relays on hosts of their own: a root, four in the middle, sixteen leaves, found by DNS.

RELAY_TREE=N sends N MiB in place of 8.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from pathlib import Path

import pytest
import yaml
from hosts import Hosts, hosts
from peers import PATIENCE, assert_same, eventually, payload, receive_all, receive_exactly, send_all
from relays import ROOT, Process, serving

MIB = 1 << 20
SIZE = int(os.environ.get("RELAY_TREE", "8")) * MIB
MIDDLES = 4
LEAVES = 4  # of each in the middle
PORT = 9000


def fan(name: str, receivers: list[str], directory: Path) -> str:
    """A route from port 9000 to all receivers, each through a log on disk."""
    slow = f"on_slow: {{policy: spill, directory: {directory}, max: 1GiB}}"
    *tees, last = [f'{{connect: "tcp://{receiver}:{PORT}", {slow}}}' for receiver in receivers]
    stages = ", ".join(f"{{tee: {{to: {tee}}}}}" for tee in tees)
    return f"""
engines: 1
drain: 5s
routes:
  {name}:
    source: {{listen: "tcp://0.0.0.0:{PORT}"}}
    stages: [{stages}]
    sink: {last}
"""


class Tree:
    """The relays of the tree at work, by host."""

    def __init__(self, net: Hosts, tmp_path: Path, stack: contextlib.ExitStack) -> None:
        self.net = net
        self._path = tmp_path
        self._stack = stack
        self.relays: dict[str, Process] = {}

    def start(self, host: str, text: str) -> Process:
        """A relay on that host."""
        place = self._path / host
        place.mkdir(exist_ok=True)
        made = self._stack.enter_context(serving(text, place, prefix=self.net.prefix(host)))
        self.relays[host] = made
        return made

    def leaf(self, host: str) -> None:
        """One that keeps every connection as a file."""
        sink = f'{{file: "{self._path}/{host}/out/{{id}}"}}'
        self.start(host, f'engines: 1\nroutes: {{leaf: {{source: "tcp://0.0.0.0:{PORT}", sink: {sink}}}}}\n')

    def middle(self, host: str, number: int) -> None:
        """One that fans out to its leaves; whoever takes its place has its log."""
        receivers = [leaf_name(number, leaf) for leaf in range(LEAVES)]
        self.start(host, fan("middle", receivers, self._path / f"log-{number}"))

    def ready(self) -> None:
        """All of them are; two dozen that start at once take their time."""
        for relay in self.relays.values():
            relay.until(
                lambda relay=relay: any(line["message"] == "ready" for line in relay.lines), PATIENCE * 5
            )

    def got(self, host: str) -> list[Path]:
        """The files of a leaf, in the order of its connections, whole or not."""
        found = (self._path / host / "out").glob("*")
        return sorted(found, key=lambda path: int(path.name.partition(".")[0]))

    def acknowledged(self, number: int) -> list[int]:
        """What the logs of one in the middle have noted that their receivers have (relay/log/log.py)."""
        cursors = (self._path / f"log-{number}").glob("*/cursor")
        return [struct.unpack_from("<Q", cursor.read_bytes(), 8)[0] for cursor in cursors]

    def received(self, host: str) -> int:
        """Bytes that a leaf has in its files; -1 while one of them gets its name."""
        try:
            return sum(path.stat().st_size for path in self.got(host))
        except FileNotFoundError:
            return -1


def middle_name(number: int) -> str:
    """The host that is in the middle."""
    return f"middle-{number}"


def leaf_name(middle: int, leaf: int) -> str:
    """A leaf of that one in the middle."""
    return f"leaf-{middle}-{leaf}"


@pytest.mark.timeout(300)
def test_a_tree_delivers_all_of_it_to_every_leaf_when_one_in_the_middle_is_replaced(tmp_path: Path) -> None:
    """One in the middle is killed and replaced, at another address, while the stream goes on; nobody else notices.

    It is killed when it holds nothing that only its kernel knows, and has noted what its leaves have: what is sent
    again after a break is at most what was not. What comes meanwhile waits in the root's log. The root sends the
    stream four times, not sixteen.
    """
    data = payload(7, SIZE)
    half = len(data) // 2
    leaves = [leaf_name(middle, leaf) for middle in range(MIDDLES) for leaf in range(LEAVES)]
    with hosts() as net, contextlib.ExitStack() as stack:
        tree = Tree(net, tmp_path, stack)
        for host in ("root", *map(middle_name, range(MIDDLES)), "spare", *leaves):
            net.add(host)
        for host in leaves:
            tree.leaf(host)
        for number in range(MIDDLES):
            tree.middle(middle_name(number), number)
        root = tree.start(
            "root", fan("root", [middle_name(number) for number in range(MIDDLES)], tmp_path / "log-root")
        )
        tree.ready()
        before = net.sent("root")
        with net.connect("dns", net.names["root"], PORT) as source:
            source.settimeout(PATIENCE)
            send_all(source, data[:half])
            for host in leaves:
                eventually(lambda host=host: tree.received(host) == half, f"{host} has the first half")
            eventually(
                lambda: tree.acknowledged(1) == [half] * LEAVES, "the logs of one in the middle know it"
            )
            killed = tree.relays[middle_name(1)]
            killed.signal(signal.SIGKILL)
            killed.wait()
            send_all(source, data[half:])
            source.shutdown(socket.SHUT_WR)
            root.said("sink tcp://middle-1:9000 is away")
            others = [host for host in leaves if not host.startswith("leaf-1-")]
            for host in others:
                eventually(lambda host=host: tree.received(host) == len(data), f"{host} has all of it")
            net.names[middle_name(1)] = net.names["spare"]
            tree.middle("spare", 1)
            assert receive_all(source) == b""
            (session,) = root.sessions(1)
        for host in leaves:
            eventually(lambda host=host: tree.received(host) >= len(data), f"{host} has all of it")
            assert_same(b"".join(path.read_bytes() for path in tree.got(host)), data)
        assert session["result"] == "delivered"
        assert [sink["bytes"] for sink in session["sinks"]] == [len(data)] * MIDDLES
        sent = net.sent("root") - before
        assert MIDDLES * len(data) <= sent < (MIDDLES + 1) * len(data)
        for host in others:
            assert len(tree.got(host)) == 1
        for name, relay in tree.relays.items():
            if name != middle_name(1):
                relay.signal(signal.SIGTERM)
        assert {name: relay.wait() for name, relay in tree.relays.items() if name != middle_name(1)} == {
            name: 0 for name in tree.relays if name != middle_name(1)
        }


@pytest.mark.timeout(120)
def test_the_tree_of_the_manifests_follows_names(tmp_path: Path) -> None:
    """The very configurations of deploy/kubernetes: what a producer sends is in every branch's files and at the nodes.

    When the root is replaced at another address, its relays of the nodes find the new one by its name.
    """
    (found,) = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "configmap.yaml").read_text())
    first, second = payload(8, 300_001), payload(9, 400_003)

    def text(name: str, host: str) -> str:
        made: str = found["data"][f"{name}.yaml"]
        return made.replace("/sockets/", f"{tmp_path}/{host}/").replace(
            "directory: spill", f"directory: {tmp_path}/log"
        )

    def files(host: str) -> bytes:
        place = tmp_path / host / "received"
        paths = sorted(place.glob("*"), key=lambda path: int(path.name.rpartition("-")[2].partition(".")[0]))
        return b"".join(path.read_bytes() for path in paths)

    with hosts() as net, contextlib.ExitStack() as stack:
        tree = Tree(net, tmp_path, stack)
        branches = [f"branch-{number}" for number in range(MIDDLES)]
        for host in ("root", "again", "node", *branches):
            net.add(host)
        for number, host in enumerate(branches):
            net.names[f"relay-middle-{number}.relay-middle"] = net.names[host]
            tree.start(host, text("middle", host))
        net.names["relay-live"] = net.names["root"]
        tree.start("root", text("root", "root"))
        tree.start("node", text("node", "node"))
        tree.ready()
        with net.connect("dns", net.names["node"], 9001) as viewer:
            viewer.settimeout(PATIENCE)
            for host, data in (("root", first), ("again", second)):
                if host == "again":
                    old = tree.relays.pop("root")
                    old.signal(signal.SIGTERM)
                    assert old.wait() == 0
                    net.names["relay-live"] = net.names["again"]
                    tree.start("again", text("root", "again"))
                    tree.ready()
                with net.connect("dns", net.names[host], PORT) as source:
                    send_all(source, data)
                    source.shutdown(socket.SHUT_WR)
                    assert receive_all(source) == b""
                assert_same(receive_exactly(viewer, len(data)), data)
        for host in branches:
            eventually(lambda host=host: len(files(host)) == len(first + second), f"{host} has all of it")
            assert_same(files(host), first + second)
        assert {"relay-live", "relay-middle-3.relay-middle"} <= set(net.asked)
        for host in ("again", "node", *branches):
            assert tree.relays[host].said("confined: ")
