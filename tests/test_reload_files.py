"""SIGHUP and files: one writer at a time, opened anew after a mv, appended one stream after another."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from peers import assert_same, eventually, payload, receive_all, receive_exactly
from relays import end, serving
from reloads import connect, finish, free_port, reload


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    """A standing route that spills is ended, its log kept, before the changed one opens it: every byte in order."""
    port, away = free_port(), free_port()
    data = payload(5, 3 << 20)
    text = (
        f"routes:\n  r:\n    source: {{listen: 'tcp://127.0.0.1:{port}', connections: one}}\n"
        f"    stages: [{{throttle: {{rate: RATE}}}}]\n"
        f"    sink: {{connect: 'tcp://127.0.0.1:{away}', on_slow: {{policy: spill, directory: spill}}}}\n"
    )
    with serving(text.replace("RATE", "1GB/s"), tmp_path) as served:
        served.port()
        sock = connect(port)
        sock.sendall(data)
        finish(sock)
        served.sessions(1)
        reload(served, text.replace("RATE", "2GB/s"))
        sock = connect(port)
        sock.sendall(b"more")
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", away))
            listener.listen()
            sink, _peer = listener.accept()
            assert_same(receive_exactly(sink, len(data) + 4, 30), data + b"more")
            finish(sock)
            end(served)
            sink.close()


def test_a_file_in_place_has_one_writer(tmp_path: Path) -> None:
    """A changed route that writes in place begins its file when the old one has let go of it."""
    port = free_port()
    text = f"routes: {{r: {{source: {{listen: 'tcp://127.0.0.1:{port}'}}, sink: out, method: METHOD}}}}"
    with serving(text.replace("METHOD", "auto"), tmp_path) as served:
        served.port()
        old = connect(port)
        old.sendall(b"x" * 100_000)
        out = tmp_path / "out"
        eventually(lambda: out.exists() and out.stat().st_size == 100_000, "the file grows")
        reload(served, text.replace("METHOD", "copy"))
        with pytest.raises(ConnectionResetError):
            receive_all(old)
        old.close()
        sock = connect(port)
        sock.sendall(b"new")
        finish(sock)
        served.sessions(2)
        end(served)
    assert (tmp_path / "out").read_bytes() == b"new"


def test_files_are_opened_anew(tmp_path: Path) -> None:
    """After a mv and SIGHUP, files that are appended to or written in place begin again under their names."""
    text = (
        "routes: {r: {source: {listen: 'tcp://127.0.0.1:0'},"
        " stages: [{tee: {to: {file: log, append: true}}}], sink: plain}}"
    )
    with serving(text, tmp_path) as served, connect(served.port()) as sock:
        sock.sendall(b"before")
        for name in ("log", "plain"):
            path = tmp_path / name
            eventually(lambda path=path: path.exists() and path.stat().st_size == 6, "bytes arrive")
            (tmp_path / name).rename(tmp_path / f"{name}.1")
        reload(served, text)
        for name in ("log", "plain"):
            eventually(lambda name=name: (tmp_path / name).exists(), "the file is there again")
        sock.sendall(b"after")
        reload(served, text)  # nothing was moved: nothing changes
        sock.sendall(b"wards")
        finish(sock)
        served.sessions(1)
        end(served)
    for name in ("log", "plain"):
        assert (tmp_path / f"{name}.1").read_bytes() == b"before"
        assert (tmp_path / name).read_bytes() == b"afterwards"


def test_streams_that_take_turns_are_appended_one_after_another(tmp_path: Path) -> None:
    """While the stream of a changed route goes on, the next one waits to append to the same file: neither stands
    inside the other, and both are whole."""

    def route(rate: int) -> str:
        return (
            f"routes: {{r: {{source: {{listen: 'tcp://127.0.0.1:{port}', connections: one}},"
            f" stages: [{{throttle: {{rate: {rate}MB/s}}}}], sink: {{file: log, append: true}}}}}}"
        )

    port, log = free_port(), tmp_path / "log"
    with serving(route(100), tmp_path) as served, connect(served.port()) as before:
        before.sendall(b"the stream before ")
        eventually(lambda: log.exists() and log.stat().st_size == 18, "its bytes are in the file")
        reload(served, route(200))
        with connect(port) as after:
            after.sendall(b"and the next")
            after.shutdown(socket.SHUT_WR)
            served.said("the next one waits")
            before.sendall(b"goes on ")
            finish(before)
            assert receive_all(after) == b""
        served.sessions(2)
        end(served)
    assert log.read_bytes() == b"the stream before goes on and the next"


def test_a_stream_that_waits_to_append_ends_with_relay(tmp_path: Path) -> None:
    """A drain that is cut short ends a stream that waits for its place in the file, too; nothing stands inside the
    other."""
    port, log = free_port(), tmp_path / "log"
    text = (
        f"routes: {{r: {{source: {{listen: 'tcp://127.0.0.1:{port}', connections: one}},"
        " sink: {file: log, append: true}}}"
    )
    with serving(text, tmp_path) as served, connect(served.port()) as before:
        before.sendall(b"before")
        eventually(lambda: log.exists() and log.stat().st_size == 6, "its bytes are in the file")
        reload(served, text.replace("one}", "one, dead_after: 7s}"))
        with connect(port) as after:
            after.sendall(b"after")
            served.said("the next one waits")
            served.signal(signal.SIGTERM)
            served.said("draining")
            served.signal(signal.SIGTERM)
            assert served.process.wait(20) == 1
    assert log.read_bytes() in (b"before", b"beforeafter")


def test_a_file_that_cannot_be_opened_anew_goes_on(tmp_path: Path) -> None:
    """Where its directory is gone the file that was moved away is written on, and a warning says so."""
    (tmp_path / "d").mkdir()
    text = "routes: {r: {source: {listen: 'tcp://127.0.0.1:0'}, sink: {file: d/e/log, append: true}}}"
    (tmp_path / "d" / "e").mkdir()
    with serving(text, tmp_path) as served, connect(served.port()) as sock:
        sock.sendall(b"before ")
        log = tmp_path / "d/e/log"
        eventually(lambda: log.exists() and log.stat().st_size == 7, "bytes arrive")
        (tmp_path / "d").rename(tmp_path / "moved")
        served.signal(signal.SIGHUP)
        served.said("written on")
        sock.sendall(b"after")
        finish(sock)
        end(served)
    assert (tmp_path / "moved/e/log").read_bytes() == b"before after"


def test_without_a_file_only_files_are_opened_anew(tmp_path: Path) -> None:
    """A configuration from stdin cannot be read again: SIGHUP says so and harms nobody."""
    from relays import relay

    read, write = os.pipe()
    os.write(write, b"routes: {r: {source: {listen: 'tcp://127.0.0.1:0'}, sink: 'null:'}}")
    os.close(write)
    with relay("serve", "--log-format", "json", "-", cwd=tmp_path, stdin=read) as served:
        os.close(read)
        port = served.port()
        served.signal(signal.SIGHUP)
        served.said("no configuration file")
        finish(connect(port))
        served.sessions(1)
        end(served)
