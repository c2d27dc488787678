"""File sinks worth trusting: rotation, syncing, O_DIRECT, and appending."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
from file_routes import put, route, send, traced
from peers import PATIENCE, assert_same, connected, eventually, payload, receive_all
from relays import end, relay, serving

from relay.endpoints.line import Lines, Place
from relay.endpoints.written import DIRECT_PIECE, Writing, WrittenFile

# --- rotation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000, 12345])
@pytest.mark.parametrize("direct", ["", ", direct: true"])
def test_files_rotate_at_the_byte(tmp_path: Path, size: int, direct: str) -> None:
    """Every file but the last has exactly the size asked for, none is empty, and together they are the stream."""
    data = payload(size, size)
    with serving(route(f"file: out, rotate: {{size: 1000}}{direct}"), tmp_path) as served:
        send(served, data)
        served.sessions(1)
        end(served)
    count = max(1, -(-size // 1000))
    names = ["out", *(f"out-{number}" for number in range(2, count + 1))]
    files = [(tmp_path / name).read_bytes() for name in names]
    assert [len(file) for file in files[:-1]] == [1000] * (count - 1)
    assert_same(b"".join(files), data)
    assert not list(tmp_path.glob(f"out-{count + 1}*"))
    assert not list(tmp_path.glob("*.part"))


def test_a_suffix_stays_at_the_end(tmp_path: Path) -> None:
    """The number stands before the suffix, and files that are there already are left alone."""
    (tmp_path / "a-2.ts").write_bytes(b"mine")
    with serving(route("file: a.ts, rotate: {size: 10}"), tmp_path) as served:
        send(served, b"0123456789abcde")
        served.sessions(1)
        end(served)
    assert (tmp_path / "a.ts").read_bytes() == b"0123456789"
    assert (tmp_path / "a-2.ts").read_bytes() == b"mine"
    assert (tmp_path / "a-3.ts").read_bytes() == b"abcde"


def test_files_rotate_by_time_also_when_idle(tmp_path: Path) -> None:
    """A file gets its name when its time is over, without a byte more; the next begins with the next byte."""
    with serving(route('file: "f-{time}", rotate: {every: 300ms}'), tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(b"first")
            eventually(lambda: whole(tmp_path) == [b"first"], "the first file gets its name")
            assert not list(tmp_path.glob("*.part"))
            sock.sendall(b"second")
            eventually(lambda: whole(tmp_path) == [b"first", b"second"], "the second, too")
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        served.sessions(1)
        end(served)
    assert whole(tmp_path) == [b"first", b"second"]


def whole(folder: Path) -> list[bytes]:
    """The contents of the files that have their names, oldest first."""
    found = [path for path in folder.glob("f-*") if path.suffix != ".part"]
    return [path.read_bytes() for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]


def test_fsync_never(tmp_path: Path) -> None:
    """By default nothing is synced."""
    _served, trace = traced(tmp_path, 'file: "{id}"', b"x" * 1000)
    assert "sync(" not in trace
    assert "1.part" in trace


def test_fsync_close(tmp_path: Path) -> None:
    """`close` syncs the file before it gets its name, and its directory after."""
    _served, trace = traced(tmp_path, 'file: "{id}", fsync: close', b"x" * 1000)
    calls = [line.split(maxsplit=1)[1].partition("(")[0] for line in trace.splitlines() if "(" in line]
    assert calls == ["fsync", "link", "fsync"]


def test_fsync_every_second_also_when_idle(tmp_path: Path) -> None:
    """A duration syncs so often while bytes come, and once more after the last."""
    log = tmp_path / "trace"
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    config = tmp_path / "relay.yaml"
    config.write_text(route("file: out, fsync: 50ms"))
    prefix = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=fsync"]
    with relay("serve", "--log-format", "json", config, cwd=tmp_path, prefix=prefix) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            for count in range(1, 4):
                sock.sendall(b"x")
                eventually(lambda count=count: log.read_text().count("fsync(") >= count, "it is synced")
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        served.sessions(1)
        (child,) = Path(f"/proc/{served.pid}/task/{served.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        served.wait()
    assert (tmp_path / "out").read_bytes() == b"xxx"


def test_a_sync_that_fails_is_the_sinks_failure(tmp_path: Path) -> None:
    """EIO of fsync fails the file: it keeps its `.part`, is named, and the source is told by a reset."""
    inject = ("-e", "inject=fsync:error=EIO")
    served, _trace = traced(tmp_path, 'file: "{id}", fsync: close', b"x" * 1000, *inject)
    (record,) = served.sessions()
    assert record["result"] == "failed"
    assert "syncing" in record["sinks"][0]["reason"]
    assert "EIO" in record["sinks"][0]["reason"]
    assert record["sinks"][0]["path"] == "1.part"
    assert (tmp_path / "1.part").read_bytes() == b"x" * 1000


# --- O_DIRECT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 4096, DIRECT_PIECE - 1, DIRECT_PIECE, DIRECT_PIECE + 1, 3 * DIRECT_PIECE + 77]
)
def test_direct_writes_the_tail_too(tmp_path: Path, size: int) -> None:
    """Past the page cache, with a tail that is no full block, the file is the stream."""
    data = payload(7, size)
    with serving(route('file: "{id}", direct: true'), tmp_path) as served:
        send(served, data)
        (record,) = served.sessions(1)
        end(served)
    assert_same((tmp_path / "1").read_bytes(), data)
    assert record["sinks"][0]["bytes"] == size
    if size:
        assert record["sinks"][0]["method"] == "copy"


def test_direct_does_use_o_direct(tmp_path: Path) -> None:
    """Full blocks go with O_DIRECT; the tail is written through the cache, and once more with its full block."""
    file = WrittenFile(tmp_path / "f", Writing(in_place=True, direct=True))
    fd = file.open()
    flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
    assert flags & os.O_DIRECT
    data = payload(3, DIRECT_PIECE + 5000)
    put(file, data[:5000])
    assert (tmp_path / "f").stat().st_size == 0
    assert file.unwritten == 5000
    file._synced -= 10
    file.due()
    assert file.unwritten == 0
    assert_same((tmp_path / "f").read_bytes(), data[:5000])
    put(file, data[5000:])
    assert_same((tmp_path / "f").read_bytes(), data[:DIRECT_PIECE])
    file.seal("")
    assert_same((tmp_path / "f").read_bytes(), data)
    file.close()


def test_a_slow_stream_does_not_wait_for_a_full_block(tmp_path: Path) -> None:
    """What is gathered is in the file a second later, though the block is not full."""
    with serving(route('file: "{id}", direct: true'), tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(b"few")
            part = tmp_path / "1.part"
            eventually(lambda: part.exists() and part.read_bytes() == b"few", "the bytes are there")
            sock.sendall(b" more")
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        served.sessions(1)
        end(served)
    assert (tmp_path / "1").read_bytes() == b"few more"


# --- append, and what cannot be combined -------------------------------------------------------------------


def test_append_goes_on_at_the_end(tmp_path: Path) -> None:
    """Streams one after the other are appended to what was there."""
    (tmp_path / "log").write_bytes(b"was there;")
    with serving(route("file: log, append: true"), tmp_path) as served:
        send(served, b"one;")
        send(served, b"two;")
        served.sessions(2)
        end(served)
    assert (tmp_path / "log").read_bytes() == b"was there;one;two;"


def test_two_sinks_of_one_route_and_other_routes_append_at_once(tmp_path: Path) -> None:
    """Only what stands before in the same turns is waited for: not another sink of the stream, not another route."""
    text = """routes:
  r: {source: {listen: "tcp://127.0.0.1:0", connections: one}, sink: {file: log, append: true},
      stages: [{tee: {to: {file: log, append: true}}}]}
  s: {source: {listen: "unix://s", connections: one}, sink: {file: log, append: true}}
"""
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(serving(text, tmp_path))
        served.said("ready")
        other = stack.enter_context(connected(f"unix://{tmp_path}/s"))
        other.sendall(b"other;")
        eventually(lambda: (tmp_path / "log").read_bytes() == b"other;", "its bytes are in the file")
        send(served, b"one;")
        other.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b""
        served.sessions(2)
        end(served)
    assert (tmp_path / "log").read_bytes() == b"other;one;one;"


def test_who_waits_in_a_line(tmp_path: Path) -> None:
    """First come, first served; who gives up is not waited for, and a line that nobody stands in is forgotten."""
    lines = Lines()
    with (tmp_path / "log").open("ab") as file:
        places = [Place(file.fileno(), lines.writer("r")) for _ in range(3)]
        assert places[0].wait("log", lambda: False)
        assert not places[1].wait("log", lambda: True)
        places[1].leave()
        assert not places[2].wait("log", lambda: True)
        last = threading.Thread(target=lambda: places[2].wait("log", lambda: False) and places[2].leave())
        last.start()
        places[0].leave()
        last.join(PATIENCE)
        assert not last.is_alive()
        places[2].leave()
    assert not lines.waiting


def test_a_file_in_place_waits_for_its_other_writer(tmp_path: Path) -> None:
    """Two files of one name: the second begins when the first has ended; neither spoils the other."""
    how = Writing(in_place=True)
    first, second = WrittenFile(tmp_path / "f", how), WrittenFile(tmp_path / "f", how)
    first.open()
    put(first, b"first")
    thread = threading.Thread(target=second.open)
    thread.start()
    assert (tmp_path / "f").read_bytes() == b"first"
    first.seal("")
    first.close()
    thread.join(10)
    put(second, b"2")
    second.close()
    assert (tmp_path / "f").read_bytes() == b"2"


def test_nothing_of_this_is_left_open(tmp_path: Path) -> None:
    """A file whose directory is missing is an error with its errno, and no descriptor stays."""
    file = WrittenFile(tmp_path / "a" / "b" / "c", Writing())
    with pytest.raises(OSError, match="No such file") as caught:
        file.open()
    assert caught.value.errno == errno.ENOENT
    file.close()
