"""`relay send` to receivers that do not behave: they reset, stop reading, refuse, come late, talk back."""

from __future__ import annotations

import resource
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import peers
import pytest
from peers import PATIENCE, accept, assert_same, payload, receive_all, refused_address, reset, tcp_listener
from sends import MIB, RELAY, Receivers, relay, thread

from relay.sending.sending import send


def test_a_receiver_that_resets_harms_nobody_else(data: Path) -> None:
    """One of three resets mid-file: the other two have it whole, the exit code is 1."""

    def resets(listener: socket.socket) -> None:
        sock = accept(listener)
        peers.receive_exactly(sock, 1000)
        reset(sock)

    with tcp_listener() as (listener, bad), Receivers(2) as to, thread(lambda: resets(listener)):
        ended = relay(data, *to.options, "--to", bad, "--rate", "10MB/s")
    assert ended.returncode == 1
    for stream in to.streams:
        assert_same(stream[0], data.read_bytes())
    (failed,) = [line for line in ended.stdout.decode().splitlines() if "failed" in line]
    assert bad in failed
    assert "ECONNRESET" in failed or "EPIPE" in failed


def test_a_reset_after_the_last_byte_was_sent_is_a_failure(tmp_path: Path) -> None:
    """Bytes that fit the receiver's window but were never acknowledged as read to the end do not count."""
    (tmp_path / "in").write_bytes(payload(3, 8 * MIB))

    def resets(listener: socket.socket) -> None:
        sock = accept(listener)
        peers.wait_for(sock)
        reset(sock)  # with unread bytes, long before the end was acknowledged

    with tcp_listener() as (listener, bad):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with thread(lambda: resets(listener)):
            assert send([str(tmp_path / "in")], [bad]) == 5


def test_a_program_that_stops_reading_is_a_failure(data: Path) -> None:
    """socat feeds a `head` that wants 1000 bytes and ends with the rest unread: that is no delivery."""
    argv = ["socat", "-d", "-d", "-u", "TCP-LISTEN:0,bind=127.0.0.1", "SYSTEM:head -c 1000 >/dev/null"]
    with peers.listening(argv, r"listening on AF=2 127\.0\.0\.1:(\d+)") as peer:
        ended = relay(data, "--to", peer.address, "--rate", "20MB/s")
    assert ended.returncode == 5
    assert b"failed" in ended.stdout


def test_a_unix_receiver_that_closes_unread_is_a_failure(tmp_path: Path) -> None:
    """What lies in a unix socket unread when it is closed was not delivered, however little it is."""
    (tmp_path / "in").write_bytes(b"little")

    def closes(listener: socket.socket) -> None:
        with accept(listener) as sock:
            peers.wait_for(sock)

    with peers.unix_listener(tmp_path / "sock") as (listener, address), thread(lambda: closes(listener)):
        assert send([str(tmp_path / "in")], [address]) == 5


def test_too_few_descriptors_are_named(tmp_path: Path) -> None:
    """When no descriptor is left, sinks fail with what to raise; nothing hangs."""
    (tmp_path / "in").write_bytes(b"x")
    everybody = [word for number in range(20) for word in ("--to", tmp_path / f"out{number}")]
    for words in ((tmp_path / "in",), ("-",)):
        for most in (40, 60):
            ended = relay(
                *words, *everybody,
                preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
            )  # fmt: skip
            assert ended.returncode in (1, 5), ended.stderr
            assert b"raise the limit of open files (ulimit -n)" in ended.stdout + ended.stderr


def test_when_everybody_refuses_the_code_is_5(data: Path) -> None:
    """Two refused connections: exit 5, and each line says what to do."""
    ended = relay(data, "--to", refused_address(), "--to", refused_address())
    assert ended.returncode == 5
    assert ended.stdout.decode().count("Connection refused (ECONNREFUSED); is the receiver running") == 2
    assert b"ECONNREFUSED" in ended.stderr


def test_a_refused_stdin_with_a_checksum_does_not_read_on() -> None:
    """When every address refuses, a checksum alone is no reason to read an endless stdin."""
    with Path("/dev/zero").open("rb") as zeros:
        ended = relay("--to", refused_address(), "--checksum", "crc32c", stdin=zeros)
    assert ended.returncode == 5


def test_waiting_finds_a_receiver_that_comes_later(data: Path) -> None:
    """With `--wait` a refused connection is tried again until somebody listens."""
    address = refused_address()
    traced = ["strace", "-f", "-qq", "-e", "trace=connect"]
    argv = [*traced, *RELAY, "send", data, "--to", address, "--wait", "20s"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with peers.running(argv, bufsize=0, **pipes) as process:
        assert process.stderr is not None
        peers.read_until(process.stderr, r"ECONNREFUSED|EINPROGRESS")
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", int(address.rpartition(":")[2])))
            listener.listen()
            with accept(listener) as sock:
                assert_same(receive_all(sock), data.read_bytes())
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0


def test_waiting_comes_to_an_end(data: Path) -> None:
    """Patience is for the time given, and once for an address, not once for a file."""
    began = time.monotonic()
    assert send([str(data)] * 20, [refused_address()], wait="300ms") == 5
    assert 0.3 <= time.monotonic() - began < 3


@pytest.mark.parametrize("options", [("-N",), ()])
def test_netcat_receives_whole(options: Sequence[str], data: Path, tmp_path: Path) -> None:
    """`nc -N -l` half-closes at once and goes on receiving: that is no failure."""
    with peers.nc_receiver(tmp_path / "got", *options) as peer:
        ended = relay(data, "--to", peer.address)
        assert ended.returncode == 0, ended.stdout
        assert peer.wait() == 0
    assert_same((tmp_path / "got").read_bytes(), data.read_bytes())


def test_ncat_receives_whole(data: Path, tmp_path: Path) -> None:
    """`ncat -l` too."""
    with (tmp_path / "got").open("wb") as out:
        port = refused_address().rpartition(":")[2]  # ncat does not say which one it took for 0
        argv = ["ncat", "-v", "-n", "-l", "127.0.0.1", port]
        said = r"Listening on 127\.0\.0\.1:(\d+)"
        with peers.listening(argv, said, stdin=subprocess.DEVNULL, stdout=out) as peer:
            assert relay(data, "--to", peer.address).returncode == 0
            assert peer.wait() == 0
    assert_same((tmp_path / "got").read_bytes(), data.read_bytes())


def test_a_receiver_that_talks_back_gets_everything(data: Path) -> None:
    """What the receiver says is read and thrown away, before, while and after the file comes."""

    def chats(listener: socket.socket) -> None:
        with accept(listener) as sock:
            sock.sendall(b"hello" * 10000)
            assert_same(receive_all(sock), data.read_bytes())
            sock.sendall(b"thanks" * 10000)

    with tcp_listener() as (listener, address), thread(lambda: chats(listener)):
        assert send([str(data)], [address]) == 0
