"""`relay send` of what comes on stdin: pipes, files, terminals, parts of them."""

from __future__ import annotations

import hashlib
import os
import pty
import subprocess
import termios
from pathlib import Path

import peers
from peers import PATIENCE, assert_same
from sends import RELAY, Receivers, relay, thread


def test_a_piped_stdin_is_teed_to_every_address(data: Path, tmp_path: Path) -> None:
    """One pass over a pipe fills two sockets and a file, and leaves the pipe's checksum in every line."""
    with Receivers(2) as to:
        out = tmp_path / "out"
        ended = relay(
            "-", *to.options, "--to", out, "--checksum", "sha256", input=data.read_bytes(), stdin=None
        )
    assert ended.returncode == 0, ended.stderr
    for got in (to.streams[0][0], to.streams[1][0], out.read_bytes()):
        assert_same(got, data.read_bytes())
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert ended.stdout.decode().count(f"sha256={digest}") == 3


def test_a_redirected_stdin_is_read_from_where_it_stands(data: Path, tmp_path: Path) -> None:
    """A file on stdin is sent from its position on, with `--offset` and `--length` counted from there."""
    with data.open("rb") as stream:
        os.lseek(stream.fileno(), 1000, os.SEEK_SET)
        ended = relay("--to", tmp_path / "out", "--offset", "24", "--length", "5000", stdin=stream)
    assert ended.returncode == 0, ended.stderr
    assert_same((tmp_path / "out").read_bytes(), data.read_bytes()[1024:6024])


def test_a_part_of_a_pipe_leaves_the_rest_in_it(tmp_path: Path) -> None:
    """Of a piped stdin exactly offset and length are read: what follows is for whoever reads next."""
    r, w = os.pipe()
    os.write(w, b"0123456789abcdef")
    os.close(w)
    with os.fdopen(r, "rb", buffering=0) as stream:
        ended = relay("--to", tmp_path / "out", "--offset", "3", "--length", "5", stdin=stream)
        assert (ended.returncode, stream.read(100)) == (0, b"89abcdef")
    assert (tmp_path / "out").read_bytes() == b"34567"


def test_a_pipe_that_ends_before_the_length_is_a_failing_source(tmp_path: Path) -> None:
    """Exit 4, and what came is not taken for the whole."""
    ended = relay("--to", tmp_path / "out", "--length", "100", input=b"too short", stdin=None)
    assert ended.returncode == 4
    assert b"ended 91 bytes early" in ended.stdout
    assert not (tmp_path / "out").exists()


def test_a_terminal_as_stdin_is_copied(tmp_path: Path) -> None:
    """What is typed goes out; ^D ends it."""
    master, slave = pty.openpty()
    try:
        mode = termios.tcgetattr(slave)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, mode)
        argv = [*RELAY, "send", "--to", tmp_path / "out"]
        with peers.running(argv, stdin=slave, stdout=subprocess.PIPE) as process:
            os.write(master, b"typed\n\x04")
            said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert b"copy: a terminal or device is not spliced" in said
    finally:
        os.close(master)
        os.close(slave)
    assert (tmp_path / "out").read_bytes() == b"typed\n"


def test_a_fifo_among_the_files_is_a_stream_like_stdin(tmp_path: Path) -> None:
    """Files, a fifo and stdin in one command arrive in the order given."""
    (tmp_path / "a").write_bytes(b"first")
    os.mkfifo(tmp_path / "b")
    with Receivers(2, connections=3) as to, thread(lambda: _write(tmp_path / "b", b"second")):
        ended = relay(tmp_path / "a", tmp_path / "b", "-", *to.options, input=b"third", stdin=None)
    assert ended.returncode == 0, ended.stderr
    assert to.streams == [[b"first", b"second", b"third"]] * 2


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
