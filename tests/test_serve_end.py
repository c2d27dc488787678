"""`relay serve` at its end: signals and deadlines, with streams under way and without; sources that break off."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from peers import connected, eventually, payload, receive_all, receive_exactly, refused, reset, wait_for
from pushes import EACH, LIVE, push
from relays import serving


def test_a_stalled_viewer_that_drops_ends_no_turn(tmp_path: Path) -> None:
    """Under drop a viewer that reads nothing keeps the stream's end from nobody: the next source has its turn."""
    slow = ", on_slow: {policy: drop, after: 50ms}}"
    config = LIVE.replace('sink: {listen: "tcp://127.0.0.1:0"}', 'sink: {listen: "tcp://127.0.0.1:0"' + slow)
    with serving(config, tmp_path) as served:
        live, source = served.addresses(2)
        with connected(live, 4096):
            served.said("joined")
            for data in (payload(9, 12 << 20), b"next"):
                with socket.create_connection(("127.0.0.1", int(source.rpartition(":")[2]))) as sock:
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    assert receive_all(sock, 3.0) == b""
        served.sessions(2)
    assert (tmp_path / "in" / "2.bin").read_bytes() == b"next"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_relay_ends_at_once(tmp_path: Path, number: int) -> None:
    """With nothing under way, idle subscribers or not, a signal ends it in under 2 s with 0."""
    with serving(LIVE, tmp_path) as served:
        live = served.port(0)
        with socket.create_connection(("127.0.0.1", live)) as viewer:
            served.said("joined")
            began = time.monotonic()
            served.signal(number)
            assert receive_all(viewer) == b""
            assert served.wait() == 0
            assert time.monotonic() - began < 2


def test_an_idle_relay_whose_subscriber_says_nothing(tmp_path: Path) -> None:
    """A subscriber that neither reads nor closes does not hold the end up for 2 s."""
    with serving(LIVE, tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port(0))):
            served.said("joined")
            began = time.monotonic()
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
            assert time.monotonic() - began < 2


def test_a_stream_under_way_may_finish(tmp_path: Path) -> None:
    """After SIGTERM nobody new gets in, the stream under way ends whole, and the code is 0."""
    with serving(EACH.format(file="{id}.bin"), tmp_path) as served:
        port = served.port()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"before ")
            eventually(lambda: (tmp_path / "1.bin.part").exists(), "the stream begins")
            served.signal(signal.SIGTERM)
            served.said("draining")
            eventually(lambda: refused(port), "the listener closes")
            sock.sendall(b"after")
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
            assert served.wait() == 0
    assert (tmp_path / "1.bin").read_bytes() == b"before after"


@pytest.mark.parametrize("stages", ["", "stages: [{tee: {to: 'null:'}}],"])
def test_a_stream_with_viewers_may_finish(tmp_path: Path, stages: str) -> None:
    """After SIGTERM the stream under way reaches its viewers, who see its end; relay does not wait for its time."""
    config = f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:0"}}, {stages} sink: {{listen: "tcp://127.0.0.1:0"}}}}}}'
    with serving(config, tmp_path) as served:
        live, port = (int(address.rpartition(":")[2]) for address in served.addresses(2))
        with socket.create_connection(("127.0.0.1", live)) as viewer:
            served.said("joined")
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(b"before ")
                assert receive_exactly(viewer, 7) == b"before "
                served.signal(signal.SIGTERM)
                served.said("draining")
                sock.sendall(b"after")
            began = time.monotonic()
            assert receive_all(viewer) == b"after"
        assert served.wait() == 0
        assert time.monotonic() - began < 5
    assert len(served.sessions()) == 1


def test_a_drain_between_streams_tells_of_none(tmp_path: Path) -> None:
    """Two signals with nothing under way end relay without the record of a stream that never was."""
    with serving(LIVE, tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port(0))):
            served.said("joined")
            served.signal(signal.SIGTERM)
            served.signal(signal.SIGINT)
            assert served.wait() == 0
    assert not [line for line in served.lines if line.get("event") == "session"]


def test_a_turn_is_over_when_its_files_have_it(tmp_path: Path) -> None:
    """The record of a turn counts all that a file in place was given; a file that fails late is in it, too."""
    os.mkfifo(tmp_path / "slow")
    config = 'routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: slow}}}'
    with serving(config, tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(b"content")
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(20)
            with (tmp_path / "slow").open("rb") as reader:
                assert receive_all(sock) == b""
                assert os.read(reader.fileno(), 100) == b"content"
        (record,) = served.sessions()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert record["sinks"][0]["bytes"] == 7


@pytest.mark.parametrize("how", ["second signal", "deadline"])
@pytest.mark.parametrize("live", [False, True])
def test_a_drain_cut_short(tmp_path: Path, how: str, live: bool) -> None:
    """A second signal, or the deadline, ends a stream under way: exit 1, the source reset, `.part` named."""
    config = (LIVE if live else EACH.format(file="in/{id}.bin")) + (
        "drain: 200ms\n" if how == "deadline" else ""
    )
    with serving(config, tmp_path) as served:
        port = served.port(int(live))
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"before ")
            part = tmp_path / "in" / "1.bin.part"
            eventually(lambda: part.exists() and part.stat().st_size, "the stream begins")
            served.signal(signal.SIGTERM)
            served.said("draining")
            if how == "second signal":
                served.signal(signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)
        assert served.wait() == 1
        (record,) = served.sessions()
    assert record["ended_by"] == "relay"
    assert record["result"] == "failed"
    assert record["sinks"][0]["path"] == "in/1.bin.part"
    assert part.read_bytes() == b"before "
    assert not (tmp_path / "in" / "1.bin").exists()


def test_a_reset_source_leaves_the_part(tmp_path: Path) -> None:
    """A source that breaks off leaves its `.part`, is named in the record, and harms nobody after it."""
    with serving(LIVE, tmp_path) as served:
        port = served.port(1)
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(b"broken")
        part = tmp_path / "in" / "1.bin.part"
        eventually(lambda: part.exists() and part.stat().st_size == 6, "the stream begins")
        reset(sock)
        (record,) = served.sessions()
        assert "ECONNRESET" in record["reason"]
        assert record["sinks"][0]["result"] == "failed"
        assert record["sinks"][0]["path"] == "in/1.bin.part"
        push(port, b"whole")
        served.sessions(2)
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert part.read_bytes() == b"broken"
    assert (tmp_path / "in" / "2.bin").read_bytes() == b"whole"


@pytest.mark.parametrize(("sink", "code"), [("out", 0), ("missing/dir/out", 5), ("tcp://127.0.0.1:1", 5)])
def test_finite_routes_end_by_themselves(tmp_path: Path, sink: str, code: int) -> None:
    """A route whose source is a file ends when it is done, with the codes of send."""
    (tmp_path / "in").write_bytes(b"content")
    config = f'routes: {{r: {{source: in, sink: "{sink}"}}}}'
    with serving(config, tmp_path) as served:
        assert served.wait() == code
    if not code:
        assert (tmp_path / "out").read_bytes() == b"content"


def test_a_finite_route_without_its_source(tmp_path: Path) -> None:
    """A source file that is missing is exit code 4; nothing is made."""
    with serving("routes: {r: {source: nothing, sink: out}}", tmp_path) as served:
        assert served.wait() == 4
        assert "ENOENT" in served.text
    assert not (tmp_path / "out").exists()


def test_half_open_peers_keep_nothing_from_ending(tmp_path: Path) -> None:
    """Sources that connect and say nothing are under way, and are reset when the drain is over."""
    with serving(EACH.format(file="{id}") + "drain: 100ms\n", tmp_path) as served:
        port = served.port()
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        eventually(lambda: len(list(tmp_path.glob("*.part"))) == 20, "all are served")
        served.signal(signal.SIGTERM)
        assert served.wait() == 1
        for sock in socks:
            wait_for(sock)
            sock.close()


def test_a_reader_that_goes_away_is_no_sigpipe(tmp_path: Path) -> None:
    """A stdout whose reader has gone fails that sink; relay lives to say so and ends with its code."""
    read, write = os.pipe()
    os.close(read)
    source = tmp_path / "in"
    source.write_bytes(b"x" * 100_000)
    with serving('routes: {r: {source: in, sink: "-"}}', tmp_path, stdout=write) as served:
        os.close(write)
        assert served.wait() == 5
        assert "EPIPE" in served.text
