"""`relay send` of files that cannot be sent or change, to disks that are full; and its exit codes for each."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import forked
import peers
import pytest
from peers import PATIENCE, accept, assert_same, payload, receive_all, refused_address, tcp_listener
from sends import MIB, RELAY, Receivers, relay, thread

from relay.sending.sending import send


def test_what_cannot_be_read_is_named_and_the_rest_is_sent(data: Path, tmp_path: Path) -> None:
    """A missing file and a directory: exit 4, each named once on stderr, and the good file arrives."""
    with Receivers(2) as to:
        ended = relay(tmp_path / "missing", tmp_path, data, *to.options)
    assert ended.returncode == 4
    for streams in to.streams:
        assert_same(streams[0], data.read_bytes())
    said = ended.stderr.decode()
    assert said.count(f"opening {tmp_path}/missing: No such file or directory (ENOENT); check the path") == 1
    assert said.count(f"opening {tmp_path}: Is a directory (EISDIR)") == 1


def test_a_missing_file_makes_nothing(tmp_path: Path) -> None:
    """When the source cannot be opened no sink is: no connection, no `.part`."""
    assert send([str(tmp_path / "missing")], [str(tmp_path / "out"), refused_address()]) == 4
    assert list(tmp_path.iterdir()) == []


@forked.needs_root
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    """EACCES is a failing source: exit 4."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    folder = os.open(tmp_path, os.O_RDONLY)  # nobody else may pass through the folders above it

    def sends() -> int:
        os.fchdir(folder)
        forked.become(61234)
        return send(["secret"], ["null:"], progress="none")

    try:
        tmp_path.chmod(0o755)
        with forked.forked(sends) as child:
            assert child.answer() == 4
    finally:
        os.close(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, 4 * MIB), "it shrank from"),
        (lambda path: path.open("ab").write(b"more"), "it grew from"),
        (lambda path: os.utime(path), "it was written to"),
    ],
    ids=["shrinks", "grows", "written"],
)
def test_a_file_that_changes_is_a_failing_source(
    change: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The receiver sees a reset and no clean end; the exit code is 4 and the line says what changed."""
    path = tmp_path / "in"
    path.write_bytes(payload(5, 16 * MIB))

    def receives(listener: socket.socket) -> None:
        with accept(listener) as sock:
            peers.receive_exactly(sock, 1000)
            change(path)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)

    with tcp_listener() as (listener, address):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        with thread(lambda: receives(listener)):
            assert send([str(path)], [address]) == 4
    assert said in capsys.readouterr().out


def test_a_changed_file_leaves_a_part(tmp_path: Path) -> None:
    """A file sink keeps its `.part` and says so; the name is not given."""
    path = tmp_path / "in"
    path.write_bytes(bytes(3 * MIB))
    argv = [*RELAY, "send", path, "--to", tmp_path / "out", "--rate", "5MB/s"]
    with peers.running(argv, stdout=subprocess.PIPE) as process:
        peers.eventually((tmp_path / "out.part").exists, "the part")
        path.write_bytes(b"other")
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 4
    assert f"what was written stays in {tmp_path}/out.part".encode() in said
    assert not (tmp_path / "out").exists()


def test_a_full_disk_fails_that_sink_alone(data: Path, tmp_path: Path) -> None:
    """At the file size limit the file sink fails, names its `.part`, and the socket gets everything."""
    with Receivers(1) as to:
        ended = relay(
            data, *to.options, "--to", tmp_path / "out",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)),
        )  # fmt: skip
    assert ended.returncode == 1
    assert_same(to.streams[0][0], data.read_bytes())
    said = ended.stdout.decode()
    assert "File too large (EFBIG)" in said
    assert f"what was written stays in {tmp_path}/out.part" in said
    assert said.count("what was written stays") == 1


@forked.needs_root
def test_a_full_filesystem_is_named(data: Path, tmp_path: Path) -> None:
    """ENOSPC: exit 5 when it is the only sink."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is refused: {mounted.stderr.decode().strip()}")
    try:
        ended = relay(data, "--to", small / "out")
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    assert ended.returncode == 5
    assert b"No space left on device (ENOSPC); free some space" in ended.stdout
