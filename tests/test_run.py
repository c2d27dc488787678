"""`relay run` seen from outside: every kind of address, and the codes."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import tty
from pathlib import Path

import pytest
from peers import assert_same, eventually, payload, read_all, receive_all, refused_address, reset
from relays import environment, listening_on, relay, run_relay
from takers import SINKS

SIZE = 3_000_001


# --- kinds of addresses -----------------------------------------------------------------------------------


def test_programs_get_the_record(tmp_path: Path) -> None:
    """Where stderr is no terminal the session's record stands there as a line of JSON, results on stdout."""
    (tmp_path / "in").write_bytes(payload(2, SIZE))
    done = run_relay("run", "in", "--to", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (record["event"], record["level"], record["route"]) == ("session", "info", "run")
    assert (record["bytes"], record["result"]) == (SIZE, "delivered")
    assert record["sinks"][0]["sink"] == "one"


def test_a_route_without_yaml_needs_no_yaml_parser(tmp_path: Path) -> None:
    """`relay run` loads no YAML parser, no progress bars and no other command: each costs time at every start."""
    (tmp_path / "in").write_bytes(payload(2, SIZE))
    argv = [sys.executable, "-X", "importtime", "-m", "relay", "run", "in", "--to", "out"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=True, env=environment())
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines() if "|" in line}
    assert "relay.serving.running" in loaded
    assert not loaded & {
        "yaml",
        "rich",
        "asyncio",
        "relay.config.document",
        "relay.planning.plan",
        "relay.sending.sending",
        "numpy",
    }


def test_a_file_to_two_files(tmp_path: Path) -> None:
    """The README's example: one file becomes two, a line a sink says so on stdout, the code is 0."""
    (tmp_path / "in").write_bytes(payload(1, SIZE))
    done = run_relay("run", "in", "--to", "one", "--to", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"one: {SIZE} bytes in ")
    for name in ("one", "two"):
        assert_same((tmp_path / name).read_bytes(), payload(1, SIZE))
    assert not list(tmp_path.glob("*.part"))


def test_an_empty_file(tmp_path: Path) -> None:
    """No bytes are a stream as well: the sink exists and is empty."""
    (tmp_path / "in").touch()
    assert run_relay("run", "in", "--to", "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize("kind", ["pipe", "file", "socket", "terminal", "null"])
def test_stdin_of_every_kind(tmp_path: Path, kind: str) -> None:
    """`-` reads a pipe, a file from where it stands, a socket, a terminal, /dev/null."""
    data = b"line\n" * 500
    master = -1
    near: int
    if kind == "pipe":
        near, write = os.pipe()
        os.write(write, data)
        os.close(write)
    elif kind == "file":
        (tmp_path / "in").write_bytes(b"skipped" + data)
        near = os.open(tmp_path / "in", os.O_RDONLY)
        os.lseek(near, 7, os.SEEK_SET)
    elif kind == "socket":
        first, second = socket.socketpair()
        second.sendall(data)
        second.close()
        near = first.detach()
    elif kind == "terminal":
        master, near = pty.openpty()
        os.write(master, data + b"\x04")
    else:
        near, data = os.open(os.devnull, os.O_RDONLY), b""
    done = run_relay("run", "-", "--to", "out", cwd=tmp_path, stdin=near)
    os.close(near)
    if master >= 0:
        os.close(master)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("kind", ["pipe", "file", "append", "socket", "terminal", "null"])
def test_stdout_of_every_kind(tmp_path: Path, kind: str) -> None:
    """`-` writes to a pipe, a file, one opened to append, a socket, a terminal, /dev/null; the line goes to stderr."""
    data = b"line\n" * 200
    (tmp_path / "in").write_bytes(data)
    out = tmp_path / "out"
    read = -1
    if kind == "pipe":
        read, near = os.pipe()
    elif kind in ("file", "append"):
        out.write_bytes(b"before")
        near = os.open(out, os.O_WRONLY | (os.O_APPEND if kind == "append" else os.O_TRUNC))
    elif kind == "socket":
        first, second = socket.socketpair()
        near, read = first.detach(), second.detach()
    elif kind == "terminal":
        read, near = pty.openpty()
        tty.setraw(near)
    else:
        near = os.open(os.devnull, os.O_WRONLY)
    done = run_relay("run", "in", "--to", "-", cwd=tmp_path, stdout=near)
    assert done.returncode == 0, done.stderr
    assert b"1000 bytes" in done.stderr
    if kind == "terminal":
        got = b""
        while len(got) < len(data):
            got += os.read(read, 65536)
    os.close(near)
    if kind in ("pipe", "socket"):
        got = read_all(read)
    elif kind in ("file", "append"):
        got = out.read_bytes()
        data = b"before" + data if kind == "append" else data
    elif kind == "null":
        got = data
    if read >= 0:
        os.close(read)
    assert got == data
    if kind in ("append", "terminal"):
        assert b", copy), delivered; copy: " in done.stderr


def test_an_inherited_descriptor(tmp_path: Path) -> None:
    """fd://N is read and written where it is."""
    (tmp_path / "in").write_bytes(b"content")
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        done = run_relay(
            "run",
            f"fd://{source.fileno()}",
            "--to",
            f"fd://{sink.fileno()}",
            cwd=tmp_path,
            pass_fds=(source.fileno(), sink.fileno()),
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == b"content"


def test_a_listening_source_takes_one_connection(tmp_path: Path) -> None:
    """tcp://127.0.0.1:0 says its port, takes one connection and ends with it."""
    with relay("run", "tcp://127.0.0.1:0", "--to", "out", cwd=tmp_path) as process:
        with socket.create_connection(("127.0.0.1", listening_on(process))) as sock:
            sock.sendall(b"content")
            sock.shutdown(socket.SHUT_WR)
            assert receive_all(sock) == b""
        assert process.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"content"


def test_a_unix_source_and_a_fifo_sink(tmp_path: Path) -> None:
    """unix:///path listens and removes its file; fifo:///path makes the fifo and waits for its reader."""
    fifo = tmp_path / "out.fifo"
    sock_path = tmp_path / "in.sock"
    with relay("run", f"unix://{sock_path}", "--to", f"fifo://{fifo}", cwd=tmp_path) as process:
        eventually(sock_path.exists, "relay listens")
        with socket.socket(socket.AF_UNIX) as sock:
            eventually(lambda: sock.connect_ex(str(sock_path)) == 0, "relay accepts")
            sock.sendall(b"content")
            sock.shutdown(socket.SHUT_WR)
            eventually(fifo.exists, "the fifo is made")
            assert fifo.read_bytes() == b"content"
        assert process.wait() == 0
    assert not sock_path.exists()


def test_a_unix_and_a_tcp_sink(tmp_path: Path) -> None:
    """A sink connects to unix and tcp; both get the stream and its end."""
    data = payload(2, SIZE)
    (tmp_path / "in").write_bytes(data)
    with (
        SINKS["unix"](tmp_path) as one,
        SINKS["tcp6"](tmp_path) as two,
        relay("run", "in", "--to", one.sink["connect"], "--to", two.sink["connect"], cwd=tmp_path) as process,
    ):
        one.take()
        two.take()
        assert_same(one.taken(), data)
        assert_same(two.taken(), data)
        assert process.wait() == 0


# --- codes ------------------------------------------------------------------------------------------------


def test_one_sink_of_two_fails(tmp_path: Path) -> None:
    """Exit code 1: the refused sink is named with its errno, the other is whole."""
    (tmp_path / "in").write_bytes(b"content")
    address = refused_address()
    done = run_relay("run", "in", "--to", "out", "--to", address, cwd=tmp_path)
    assert done.returncode == 1
    assert (tmp_path / "out").read_bytes() == b"content"
    assert f"{address}: 0 bytes" in done.stdout.decode()
    assert "ECONNREFUSED" in done.stdout.decode()


def test_every_sink_fails(tmp_path: Path) -> None:
    """Exit code 5."""
    (tmp_path / "in").write_bytes(b"content")
    done = run_relay("run", "in", "--to", refused_address(), "--to", tmp_path, cwd=tmp_path)
    assert done.returncode == 5
    assert b"EISDIR" in done.stdout


def test_the_source_fails(tmp_path: Path) -> None:
    """Exit code 4, nothing is made."""
    done = run_relay("run", "missing", "--to", "out", cwd=tmp_path)
    assert done.returncode == 4
    assert b"ENOENT" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_source_that_resets(tmp_path: Path) -> None:
    """Exit code 4; what came is left as `.part`."""
    with relay("run", "tcp://127.0.0.1:0", "--to", "out", cwd=tmp_path) as process:
        sock = socket.create_connection(("127.0.0.1", listening_on(process)))
        sock.sendall(b"some")
        eventually(lambda: (tmp_path / "out.part").exists(), "it begins")
        eventually(lambda: (tmp_path / "out.part").stat().st_size == 4, "bytes arrive")
        reset(sock)
        assert process.wait() == 4
        assert "ECONNRESET" in process.text
    assert (tmp_path / "out.part").read_bytes() == b"some"


@pytest.mark.parametrize(
    ("words", "code"), [(["tpc://h:1"], 2), (["in", "--to", "tcp://h:70000"], 2), ([], 2)]
)
def test_words_that_make_no_route(tmp_path: Path, words: list[str], code: int) -> None:
    """A wrong address is refused with its words; a missing one is a usage error."""
    done = run_relay("run", *words, cwd=tmp_path)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_ends_it(tmp_path: Path, number: int) -> None:
    """SIGINT is 130, SIGTERM 143; the source is reset, the `.part` stays."""
    with relay("run", "tcp://127.0.0.1:0", "--to", "out", cwd=tmp_path) as process:
        with socket.create_connection(("127.0.0.1", listening_on(process))) as sock:
            sock.sendall(b"some")
            eventually(lambda: (tmp_path / "out.part").exists(), "it begins")
            eventually(lambda: (tmp_path / "out.part").stat().st_size == 4, "bytes arrive")
            process.signal(number)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)
        assert process.wait() == 128 + number
    assert (tmp_path / "out.part").read_bytes() == b"some"
