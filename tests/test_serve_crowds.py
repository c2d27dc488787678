"""`relay serve` and many connections: what they leave behind, what one that stalls costs the rest."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
from pathlib import Path

import pytest
from peers import assert_same, connected, eventually, receive_all, reset
from pushes import LIVE, accepted, push
from relays import Process, serving


def descriptors(process: Process) -> int:
    """How many descriptors the process has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: PTH208 - only their number


def threads(process: Process) -> int:
    """How many threads it has."""
    return len(os.listdir(f"/proc/{process.pid}/task"))  # noqa: PTH208 - only their number


def test_connections_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    """After hundreds of sources and viewers that leave in every way, descriptors and threads are as before."""
    with serving(LIVE.replace("in/{id}.bin", "in/{id}.bin"), tmp_path) as served:
        live, source = (int(address.rpartition(":")[2]) for address in served.addresses(2))
        push(source, b"warm")
        served.sessions(1)
        eventually(lambda: threads(served) <= 8, "the first stream's threads end")
        before = descriptors(served)
        for number in range(200):
            viewer = socket.create_connection(("127.0.0.1", live))
            sock = socket.create_connection(("127.0.0.1", source))
            if number % 3 == 0:
                sock.sendall(b"x" * number)
            if number % 2:
                reset(sock)
                viewer.close()
            else:
                sock.close()
                reset(viewer)
        served.sessions(201)
        push(source, b"last")
        served.sessions(202)
        eventually(lambda: descriptors(served) <= before, "descriptors are given back")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


def test_many_connections_at_once(tmp_path: Path) -> None:
    """A thousand connections that all stay open are all served."""
    count = 1000
    with serving('routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: "null:"}}', tmp_path) as served:
        port = served.port()
        before = descriptors(served)
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        for sock in socks:
            sock.sendall(b"x")
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
            assert receive_all(sock) == b""
            sock.close()
        served.sessions(count)
        eventually(lambda: descriptors(served) <= before, "descriptors are given back")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


def test_too_few_descriptors_refuse_newcomers_only(tmp_path: Path) -> None:
    """With 64 descriptors a crowd is served in part; who is in stays in, and later ones get in again."""
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))}
    config = 'routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: "null:"}}'
    with serving(config, tmp_path, **limit) as served:
        port = served.port()
        first = socket.create_connection(("127.0.0.1", port))
        before = descriptors(served)
        first.sendall(b"first")
        eventually(lambda: descriptors(served) > before, "the first one is in")
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        served.said("ulimit")
        for sock in socks:
            sock.close()
        first.sendall(b"again")
        first.shutdown(socket.SHUT_WR)
        assert receive_all(first) == b""
        first.close()
        eventually(lambda: accepted(port, b"later"), "there is room again")
        eventually(
            lambda: served.until(
                lambda: {line["bytes"] for line in served.lines if line.get("event") == "session"} >= {5, 10}
            ),
            "both were delivered",
        )
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


@pytest.mark.parametrize("policy", ["disconnect", "drop"])
def test_a_viewer_that_stalls(tmp_path: Path, policy: str) -> None:
    """A viewer that reads nothing is cut off, or loses whole pieces; another viewer sees every byte."""
    packets, size = 200_000, 188
    data = b"".join(struct.pack(">I", number) + bytes(184) for number in range(packets))
    extra = ", align: 188" if policy == "drop" else ""
    slow = f", on_slow: {{policy: {policy}, after: 200ms{extra}}}}}"
    config = LIVE.replace('sink: {listen: "tcp://127.0.0.1:0"}', 'sink: {listen: "tcp://127.0.0.1:0"' + slow)
    with serving(config, tmp_path) as served:
        live, source = served.addresses(2)
        stalled = connected(live, 4096)
        served.until(lambda: sum("joined" in line["message"] for line in served.lines) == 1)
        with socket.create_connection(("127.0.0.1", int(source.rpartition(":")[2]))) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            served.said("is slow: dropping" if policy == "drop" else "left after")
            eventually(lambda: (tmp_path / "in").exists(), "the file is begun")
            served.signal(signal.SIGTERM)
            got = b""
            if policy == "disconnect":
                with pytest.raises(ConnectionResetError):
                    receive_all(stalled)
            else:
                got = receive_all(stalled)
            stalled.close()
            assert receive_all(sock) == b""
        assert served.wait() == 0
        (record,) = served.sessions()
        assert record["result"] == "delivered"
        assert_same((tmp_path / "in" / "1.bin").read_bytes(), data)
        left = served.said("left after")
    if policy == "disconnect":
        assert "backlog" in left["reason"]
        return
    assert len(got) % size == 0
    numbers = [struct.unpack_from(">I", got, place)[0] for place in range(0, len(got), size)]
    assert numbers == sorted(set(numbers))
    assert len(got) + left["dropped"] == len(data)
    assert left["dropped"] > 0
    assert left["dropped"] % size == 0
