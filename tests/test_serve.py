"""`relay serve` seen from outside: a real process, real peers, signals, files and what is left behind."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance import connected, reset
from peers import assert_same, eventually, payload, receive_all, receive_exactly, run, running, wait_for
from relays import Process, environment, relay, run_relay, serving

EACH = """
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0"}}
    sink: {{file: "{file}"}}
"""
LIVE = """
routes:
  r:
    source: {listen: "tcp://127.0.0.1:0"}
    stages: [{tee: {to: {file: "in/{id}.bin"}}}]
    sink: {listen: "tcp://127.0.0.1:0"}
"""


def push(port: int, data: bytes) -> None:
    """Sends a whole stream and waits until relay closes, which it does once all is delivered."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b""


def accepted(port: int, data: bytes) -> bool:
    """Whether relay takes the stream; it refuses with a reset."""
    try:
        push(port, data)
    except ConnectionResetError:
        return False
    return True


def descriptors(process: Process) -> int:
    """How many descriptors the process has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))  # noqa: PTH208 - only their number


def threads(process: Process) -> int:
    """How many threads it has."""
    return len(os.listdir(f"/proc/{process.pid}/task"))  # noqa: PTH208 - only their number


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


# --- unix sockets -----------------------------------------------------------------------------------------


def test_a_unix_socket_is_made_and_removed(tmp_path: Path) -> None:
    """The socket file has the mode that was asked for, and is gone at the end."""
    config = 'routes: {r: {source: {listen: "unix://in.sock", mode: 0620}, sink: "null:"}}'
    config = config.replace("unix://in.sock", f"unix://{tmp_path}/in.sock")
    with serving(config, tmp_path) as served:
        served.addresses(1)
        status = (tmp_path / "in.sock").stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o620
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert not (tmp_path / "in.sock").exists()


def test_a_stale_socket_is_replaced_even_after_a_kill(tmp_path: Path) -> None:
    """kill -9 leaves a socket file that the next start takes over."""
    config = f'routes: {{r: {{source: {{listen: "unix://{tmp_path}/in.sock"}}, sink: out}}}}'
    with serving(config, tmp_path) as served:
        served.addresses(1)
        sock = connected(f"unix://{tmp_path}/in.sock")
        sock.sendall(b"x" * 1000)
        eventually(lambda: (tmp_path / "out").exists() and (tmp_path / "out").stat().st_size, "bytes arrive")
        served.signal(signal.SIGKILL)
        served.wait()
        sock.close()
    assert (tmp_path / "in.sock").exists()
    with serving(config, tmp_path) as served:
        served.addresses(1)
        with connected(f"unix://{tmp_path}/in.sock") as sock:
            sock.sendall(b"again")
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        served.sessions()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"again"


def test_a_killed_relay_leaves_a_part_that_blocks_nobody(tmp_path: Path) -> None:
    """The `.part` of a relay that was killed keeps the next one neither from the path nor from its bytes."""
    config = EACH.format(file="in/{route}.bin")
    part = tmp_path / "in" / "r.bin.part"
    for text in (b"one", b"two"):
        with serving(config, tmp_path) as served:
            port = served.port()
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(text)
                if text == b"one":
                    eventually(lambda: part.exists() and part.stat().st_size, "bytes arrive")
                    served.signal(signal.SIGKILL)
                    served.wait()
                    continue
                sock.shutdown(socket.SHUT_WR)
                receive_all(sock)
            served.sessions()
    whole = [path.read_bytes() for path in (tmp_path / "in").iterdir() if path.suffix == ".bin"]
    assert whole == [b"two"]


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


def test_a_path_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    """An ordinary file where the socket should be stays as it is: exit code 4 and what to do."""
    (tmp_path / "in.sock").write_text("mine")
    config = f'routes: {{r: {{source: {{listen: "unix://{tmp_path}/in.sock"}}, sink: "null:"}}}}'
    with serving(config, tmp_path) as served:
        assert served.wait() == 4
        assert "not a socket" in served.text
    assert (tmp_path / "in.sock").read_text() == "mine"


def test_a_socket_in_use_is_refused(tmp_path: Path) -> None:
    """A second relay on the same unix path or port ends with 4 and leaves the first alone."""
    config = f'routes: {{r: {{source: {{listen: "unix://{tmp_path}/in.sock"}}, sink: "null:"}}}}'
    with serving(config, tmp_path) as first:
        first.addresses(1)
        with serving(config, tmp_path) as second:
            assert second.wait() == 4
            assert "EADDRINUSE" in second.text
        with connected(f"unix://{tmp_path}/in.sock"):
            pass
        first.signal(signal.SIGTERM)
        assert first.wait() == 0


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A port that somebody has is exit code 4, with the address, the errno and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:{port}"}}, sink: "null:"}}}}'
        with serving(config, tmp_path) as served:
            assert served.wait() == 4
            assert f"tcp://127.0.0.1:{port}" in served.text
            assert "EADDRINUSE" in served.text
            assert "choose another port" in served.text


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        (
            "routes:\n  r:\n    source: {listen: 'tcp://127.0.0.1:0'}\n    sink: 'tpc://h:1'\n",
            ":4:11: ",
            "did you mean",
        ),
        ("", ":1:1: ", "empty"),
        ("- a\n- b\n", ":1:1: ", "mapping"),
        ("routes: {r: {source: 'tcp://h:99999', sink: 'null:'}}", ":1:22: ", "99999"),
    ],
)
def test_a_configuration_that_is_wrong(tmp_path: Path, text: str, where: str, said: str) -> None:
    """A wrong configuration is exit code 3, with file, line, column and the word at fault."""
    with serving(text, tmp_path) as served:
        assert served.wait() == 3
        assert f"relay.yaml{where}" in served.text
        assert said in served.text


# --- ending -----------------------------------------------------------------------------------------------


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


def refused(port: int) -> bool:
    """Whether nobody listens on the port any more."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


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


# --- files ------------------------------------------------------------------------------------------------


def test_a_path_with_placeholders_never_overwrites(tmp_path: Path) -> None:
    """A name that is taken gets -2, then -3."""
    (tmp_path / "r.bin").write_text("mine")
    with serving(EACH.format(file="{route}.bin"), tmp_path) as served:
        port = served.port()
        push(port, b"one")
        push(port, b"two")
        served.sessions(2)
    assert (tmp_path / "r.bin").read_text() == "mine"
    assert (tmp_path / "r-2.bin").read_bytes() == b"one"
    assert (tmp_path / "r-3.bin").read_bytes() == b"two"


def test_a_plain_path_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    """The old content stands until the new one is whole; a symlink keeps its target's place."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "out").symlink_to("real")
    config = EACH.format(file="out").replace('0"}', '0", connections: each}')
    with serving(config, tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(b"new")
            eventually(lambda: any(p.suffix == ".part" for p in tmp_path.iterdir()), "it is written")
            assert (tmp_path / "out").read_text() == "old"
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        served.sessions()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_one_level_of_directory_is_made(tmp_path: Path) -> None:
    """A directory that is missing is made, two are not."""
    with serving(EACH.format(file="a/b/{id}"), tmp_path) as served:
        port = served.port()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)
        assert "ENOENT" in served.sessions()[0]["sinks"][0]["reason"]
    assert not (tmp_path / "a").exists()


def test_what_a_unix_peer_is_called_makes_no_path(tmp_path: Path) -> None:
    """{peer} in a path is reduced to letters, digits, dots, dashes and underscores."""
    with serving(EACH.format(file="in/{peer}/../{peer}").replace("/../", "-"), tmp_path) as served:
        push(served.port(), b"x")
        served.sessions()
    (file,) = (tmp_path / "in").iterdir()
    assert file.name.replace("127.0.0.1-", "").replace("-", "").isdigit()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    made = run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place])
    if made.returncode:
        pytest.skip(f"mount is refused here: {made.stderr.decode()}")
    yield place
    run(["umount", place])


def test_a_full_disk_fails_that_sink_alone(tmp_path: Path, small_disk: Path) -> None:
    """ENOSPC fails the file that met it and names its `.part`; the other file is whole."""
    data = payload(3, 4 << 20)
    config = EACH.format(file="whole-{id}").replace(
        "    sink", "    stages: [{tee: {to: 'small/{id}'}}]\n    sink"
    )
    config = config.replace("{{", "{").replace("}}}}", "}}")
    with serving(config, tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)
        (record,) = served.sessions()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert record["result"] == "partial"
    assert "ENOSPC" in record["sinks"][0]["reason"]
    assert "free some space" in record["sinks"][0]["reason"]
    assert record["sinks"][0]["path"] == "small/1.part"
    assert_same((tmp_path / "whole-1").read_bytes(), data)


def test_a_file_size_limit_fails_that_sink_alone(tmp_path: Path) -> None:
    """RLIMIT_FSIZE is EFBIG for the file, no death by SIGXFSZ."""
    config = 'routes: {r: {source: "-", stages: [{tee: {to: limited}}], sink: "null:"}}'
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))}
    source = tmp_path / "source"
    source.write_bytes(payload(4, 3 << 20))
    with source.open("rb") as stdin, serving(config, tmp_path, stdin=stdin, **limit) as served:
        assert served.wait() == 1
        (record,) = served.sessions()
    assert "EFBIG" in record["sinks"][0]["reason"]
    assert record["sinks"][1]["bytes"] == 3 << 20


# --- enemies ----------------------------------------------------------------------------------------------


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


def test_a_large_configuration_is_refused_quickly(tmp_path: Path) -> None:
    """100 MB of configuration are refused with code 3, without eating the machine."""
    path = tmp_path / "huge.yaml"
    with path.open("wb") as stream:
        stream.write(b"routes:\n")
        stream.truncate(100_000_000)
    done = run_relay("serve", path, cwd=tmp_path)
    assert done.returncode == 3
    assert str(path) in done.stderr.decode()


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


def test_relay_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    """The built-in default is found without a configuration; a taken port says which."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 9001))
        except OSError:
            pass  # somebody else has it: as good
        else:
            taken.listen()
        with relay("serve", cwd=tmp_path, env=environment()) as served:
            assert served.wait() == 4
            assert "tcp://127.0.0.1:9001" in served.text
