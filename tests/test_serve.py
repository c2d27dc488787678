"""`relay serve` seen from outside, a real process with real peers: the main job."""

from __future__ import annotations

import hashlib
import signal
import socket
from pathlib import Path

import pytest
from peers import assert_same, payload, receive_all, receive_exactly, reset, running
from pushes import EACH, LIVE, push
from relays import serving

# --- the main job -----------------------------------------------------------------------------------------


def test_the_first_minute(tmp_path: Path) -> None:
    """Without a configuration: the stream becomes a file of its own, and nc sees the same bytes live."""
    text = (Path(__file__).parent.parent / "configs" / "default.yaml").read_text()
    config = text.replace(":9000", ":0").replace(":9001", ":0")
    data = payload(1, 5 << 20)
    with serving(config, tmp_path) as served, (tmp_path / "seen").open("wb") as seen:
        live, source = served.addresses(2)
        assert [line["role"] for line in served.lines if line["event"] == "listening"] == ["sink", "source"]
        port = live.rpartition(":")[2]
        with running(["nc", "-v", "-n", "127.0.0.1", port], stdout=seen, stdin=-3, stderr=-3) as watcher:
            served.said("joined")
            push(int(source.rpartition(":")[2]), data)
            (record,) = served.sessions()
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
            watcher.wait(10)
        (file,) = (tmp_path / "relay-inbox").iterdir()
        assert_same(file.read_bytes(), data)
        assert_same((tmp_path / "seen").read_bytes(), data)
    assert record["sinks"][0]["path"] == f"relay-inbox/{file.name}"


def test_the_record_of_a_session(tmp_path: Path) -> None:
    """One JSON line says route, peer, bytes a sink, seconds, methods, who ended it and how."""
    with serving(LIVE, tmp_path) as served:
        port = served.port(1)
        with socket.create_connection(("127.0.0.1", port)) as sock:
            name = "{}:{}".format(*sock.getsockname())
            sock.sendall(b"x" * 1000)
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        (record,) = served.sessions()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert record["route"] == "r"
    assert record["peer"] == name
    assert record["bytes"] == 1000
    assert 0 < record["seconds"] < 20
    assert record["method"] == "splice"
    assert record["ended_by"] == "source"
    assert record["result"] == "delivered"
    file, live = record["sinks"]
    assert (file["bytes"], file["method"], file["result"], file["path"]) == (
        1000,
        "splice",
        "delivered",
        "in/1.bin",
    )
    assert live["address"].startswith("tcp://127.0.0.1:")


def test_each_connection_has_a_pipeline_of_its_own(tmp_path: Path) -> None:
    """With `each`, connections are served side by side and each ends for itself."""
    with serving(EACH.format(file="in/{id}.bin"), tmp_path) as served:
        port = served.port()
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        for number, sock in enumerate(socks):
            sock.sendall(bytes([number]) * 10)
        for sock in reversed(socks):
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
            sock.close()
        served.sessions(5)
        served.signal(signal.SIGINT)
        assert served.wait() == 0
    found = sorted(path.read_bytes() for path in (tmp_path / "in").iterdir())
    assert found == [bytes([number]) * 10 for number in range(5)]


def test_connections_take_turns(tmp_path: Path) -> None:
    """With `one`, a waiting connection is logged and served next, in a file of its own; viewers see both."""
    with serving(LIVE, tmp_path) as served:
        live, source = (int(address.rpartition(":")[2]) for address in served.addresses(2))
        with socket.create_connection(("127.0.0.1", live)) as viewer:
            served.said("joined")
            first = socket.create_connection(("127.0.0.1", source))
            first.sendall(b"first,")
            assert receive_exactly(viewer, 6) == b"first,"
            second = socket.create_connection(("127.0.0.1", source))
            second.sendall(b"second")
            served.said("waits for its turn")
            first.close()
            assert receive_exactly(viewer, 6) == b"second"
            second.close()
            served.sessions(2)
            served.signal(signal.SIGTERM)
            assert receive_all(viewer) == b""
        assert served.wait() == 0
    assert (tmp_path / "in" / "1.bin").read_bytes() == b"first,"
    assert (tmp_path / "in" / "2.bin").read_bytes() == b"second"


def test_a_header_that_cannot_be_read_fails_its_turn_only(tmp_path: Path) -> None:
    """In a route that takes turns a stream that cannot begin is refused; the next one may begin again."""
    config = LIVE.replace("stages: [", "stages: [{header: {file: h}}, ")
    with serving(config, tmp_path) as served:
        port = served.port(1)
        with socket.create_connection(("127.0.0.1", port)) as sock, pytest.raises(ConnectionResetError):
            receive_all(sock)
        (record,) = served.sessions(1)
        assert record["result"] == "failed"
        assert "reading the header from h" in record["reason"]
        (tmp_path / "h").write_bytes(b"head ")
        push(port, b"body")
        served.sessions(2)
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert (tmp_path / "in" / "2.bin").read_bytes() == b"head body"


def test_two_routes_side_by_side(tmp_path: Path) -> None:
    """Routes do not disturb each other: one is reset again and again, the other carries its stream."""
    config = """
routes:
  calm: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "calm-{id}"}}
  wild: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "wild-{id}"}}
"""
    data = payload(6, 2 << 20)
    with serving(config, tmp_path) as served:
        calm, wild = (int(address.rpartition(":")[2]) for address in served.addresses(2))
        with socket.create_connection(("127.0.0.1", calm)) as sock:
            for start in range(0, len(data), 1 << 16):
                sock.sendall(data[start : start + (1 << 16)])
                other = socket.create_connection(("127.0.0.1", wild))
                other.sendall(b"x")
                reset(other)
            sock.shutdown(socket.SHUT_WR)
            assert receive_all(sock) == b""
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    (file,) = (path for path in tmp_path.glob("calm-*"))
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(data).digest()
