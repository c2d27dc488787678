"""The tests' own tools: payloads, waits and real programs do what they say."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import peers
import pytest
from descriptors import Descriptors


def test_payload_depends_on_the_seed_alone() -> None:
    """The same seed gives the same bytes whatever the chunks and the size; another seed gives others."""
    whole = peers.payload(1, 3_000_001)
    assert len(whole) == 3_000_001
    assert b"".join(peers.payload_chunks(1, 3_000_001, 4096)) == whole
    assert peers.payload(1, 4096) == whole[:4096]
    assert peers.payload(2, 4096) != whole[:4096]
    assert peers.payload_digest(1, 3_000_001) == hashlib.sha256(whole).hexdigest()


def test_payload_has_no_two_equal_blocks() -> None:
    """No two pages of a payload are equal, so a misplaced one is noticed."""
    data = peers.payload(3, 4 << 20)
    pages = {data[start : start + 4096] for start in range(0, len(data), 4096)}
    assert len(pages) == len(data) // 4096


def test_a_difference_is_located() -> None:
    """assert_same names the first byte that differs."""
    data = peers.payload(4, 100_000)
    peers.assert_same(data, bytes(bytearray(data)))
    with pytest.raises(pytest.fail.Exception, match="first difference is at 77777"):
        peers.assert_same(data[:77777] + bytes([data[77777] ^ 1]) + data[77778:], data)
    with pytest.raises(pytest.fail.Exception, match="got 99999 bytes, expected 100000"):
        peers.assert_same(data[:-1], data)


def test_missing_programs_skip_with_their_package() -> None:
    """A program that is not there skips the test and says what to install."""
    with pytest.raises(pytest.skip.Exception, match="no-such is missing: apt-get install no-such"):
        peers.program("no-such")


def test_eventually_gives_up() -> None:
    """A wait that is never satisfied fails and names what was waited for."""
    with pytest.raises(AssertionError, match="the cows to come home"):
        peers.eventually(lambda: False, "the cows to come home", patience=0.01)


def test_receive_all_has_patience_and_no_more(fds: Descriptors) -> None:
    """receive_all returns at the end of the stream and fails on a silence."""
    near, far = fds.unix_pair()
    near.send(b"bytes")
    with pytest.raises(AssertionError, match="nothing happened"):
        peers.receive_all(far, patience=0.01)
    near.send(b"more")
    near.shutdown(socket.SHUT_WR)
    assert peers.receive_all(far) == b"more"
    assert peers.receive_digest(far) == (0, hashlib.sha256().hexdigest())


Receiver = Callable[[Path], AbstractContextManager[peers.Peer]]


@pytest.mark.parametrize("receiver", [peers.socat_receiver, peers.nc_receiver])
def test_programs_receive(tmp_path: Path, receiver: Receiver) -> None:
    """socat and nc listen on a port of the kernel's choice and write what they get into a file."""
    data, path = peers.payload(5, 1 << 20), tmp_path / "out"
    with receiver(path) as peer:
        with socket.create_connection(("127.0.0.1", peer.port)) as sock:
            peers.send_all(sock, data)
            sock.shutdown(socket.SHUT_WR)
            assert peers.receive_all(sock) == b""
        assert peer.wait() == 0
    peers.assert_same(path.read_bytes(), data)


def test_a_running_program_is_ended(tmp_path: Path) -> None:
    """A program still at work when its block ends is killed and reaped."""
    with peers.socat_receiver(tmp_path / "out") as peer:
        assert peer.process.poll() is None
    assert peer.process.returncode == -9


def test_listeners_say_their_address(tmp_path: Path) -> None:
    """Listeners name themselves as relay's addresses; nobody answers at refused_address."""
    with peers.tcp_listener() as (listener, address), socket.socket() as client:
        assert address == f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        client.connect(listener.getsockname())
        peers.accept(listener).close()
    with peers.unix_listener(tmp_path / "s") as (listener, address):
        assert address == f"unix://{tmp_path}/s"
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", int(peers.refused_address().rpartition(":")[2])))


def test_read_all_reads_pipes_and_files(fds: Descriptors, tmp_path: Path) -> None:
    """read_all returns everything up to the end of a nonblocking pipe and of a regular file."""
    pipe = fds.pipe()
    os.write(pipe.w, b"pipe")
    fds.close(pipe.w)
    assert peers.read_all(pipe.r) == b"pipe"
    (tmp_path / "file").write_bytes(b"file")
    assert peers.read_all(fds.open(tmp_path / "file", os.O_RDONLY)) == b"file"
