"""`relay send` delivers: every way across, to every kind of end, whole and at its pace; checksums."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import peers
import pytest
from peers import PATIENCE, accept, assert_same, payload, receive_all, refused_address, tcp_listener
from sends import MIB, Receivers, relay, thread

from relay.endpoints.digest import new_digest
from relay.sending.sending import send

# --- delivered --------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_its_result_says_how(data: Path) -> None:
    """One file to one receiver: exit 0, the same bytes, one line with bytes, rate and method on stdout."""
    with Receivers(1) as to:
        ended = relay(data, *to.options)
    assert ended.returncode == 0, ended.stderr
    assert_same(to.streams[0][0], data.read_bytes())
    (line,) = ended.stdout.decode().splitlines()
    size = data.stat().st_size
    assert re.search(rf"{size} bytes in \d+\.\d\d s \(.*/s, sendfile\), delivered$", line), line


def test_an_empty_file_arrives_as_an_empty_stream(tmp_path: Path) -> None:
    """A file without bytes is a connection that ends cleanly, and exit 0."""
    (tmp_path / "empty").touch()
    with Receivers(1) as to:
        assert send([str(tmp_path / "empty")], to.addresses) == 0
    assert to.streams == [[b""]]


def test_a_stdin_without_bytes_arrives_as_an_empty_stream() -> None:
    """No FILE means stdin; /dev/null there is an empty stream."""
    with Receivers(2) as to:
        assert relay(*to.options).returncode == 0
    assert to.streams == [[b""], [b""]]


def test_many_files_go_to_many_addresses_in_order(tmp_path: Path) -> None:
    """Each file is a connection of its own at each address, in the order given; a line for every pair."""
    contents = [payload(seed, size) for seed, size in ((1, 5), (2, 0), (3, MIB + 1), (4, 70000))]
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.bin")
        files[-1].write_bytes(content)
    with Receivers(3, connections=4) as to:
        ended = relay(*files, *to.options)
    assert ended.returncode == 0, ended.stderr
    assert to.streams == [contents] * 3
    lines = ended.stdout.decode().splitlines()
    assert len(lines) == 12
    assert len({line.split(": ")[0] for line in lines}) == 12


def test_each_address_has_its_own_pace(data: Path) -> None:
    """A receiver that does not read holds nobody: the other has the file while that one has nothing."""
    got = threading.Event()

    def quick(listener: socket.socket) -> None:
        with accept(listener) as sock:
            assert_same(receive_all(sock), data.read_bytes())
            got.set()

    def stalled(listener: socket.socket) -> None:
        with accept(listener) as sock:
            assert got.wait(PATIENCE)
            assert_same(receive_all(sock), data.read_bytes())

    with tcp_listener() as (one, fast), tcp_listener() as (two, slow):
        two.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with thread(lambda: quick(one)), thread(lambda: stalled(two)):
            assert send([str(data)], [slow, fast]) == 0


@pytest.mark.parametrize("method", ["auto", "sendfile", "splice", "vmsplice", "copy"])
@pytest.mark.parametrize("kind", ["tcp", "unix", "file", "fifo"])
def test_every_method_delivers_the_same_bytes(
    method: str, kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forced or not, every way to every kind of end is byte-identical; what was impossible is said."""
    got: list[bytes] = []

    def from_listener(listener: socket.socket) -> None:
        with accept(listener) as sock:
            got.append(receive_all(sock))

    with contextlib.ExitStack() as stack:
        if kind == "tcp":
            listener, address = stack.enter_context(tcp_listener())
            stack.enter_context(thread(lambda: from_listener(listener)))
        elif kind == "unix":
            listener, address = stack.enter_context(peers.unix_listener(tmp_path / "sock"))
            stack.enter_context(thread(lambda: from_listener(listener)))
        elif kind == "fifo":
            os.mkfifo(tmp_path / "fifo")
            address = f"fifo://{tmp_path}/fifo"
            stack.enter_context(thread(lambda: got.append((tmp_path / "fifo").read_bytes())))
        else:
            address = str(tmp_path / "out.bin")
        assert send([str(data)], [address], method=method) == 0
    if kind == "file":
        got.append((tmp_path / "out.bin").read_bytes())
    assert_same(got[0], data.read_bytes())
    said = capsys.readouterr().out
    if method == "sendfile" and kind == "file":
        assert ", splice)" in said
        assert "splice: sendfile takes a file straight to one socket" in said
    elif method != "auto":
        assert f", {method})" in said


@pytest.mark.parametrize("options", [{"rate": "100MB/s"}, {"on_slow": "disconnect"}, {"checksum": "xxh3"}])
def test_options_change_no_byte(options: dict[str, str], data: Path, tmp_path: Path) -> None:
    """A rate, a policy, a checksum: the file is the same."""
    assert send([str(data)], [str(tmp_path / "out")], **options) == 0  # type: ignore[arg-type]
    assert_same((tmp_path / "out").read_bytes(), data.read_bytes())


def test_a_rate_is_kept(tmp_path: Path) -> None:
    """1 MB at 2 MB/s takes no less than the rate allows, its burst of a tenth of a second apart."""
    (tmp_path / "in").write_bytes(bytes(1_000_000))
    began = time.monotonic()
    assert send([str(tmp_path / "in")], ["null:"], rate="2MB/s") == 0
    assert time.monotonic() - began > 0.35


def test_offset_and_length_choose_a_part(data: Path, tmp_path: Path) -> None:
    """`--offset` leaves out the beginning, `--length` the rest."""
    out = tmp_path / "out"
    assert send([str(data)], [str(out)], offset="1MiB", length=12345) == 0
    assert_same(out.read_bytes(), data.read_bytes()[MIB : MIB + 12345])
    assert send([str(data)], [str(out)], offset=data.stat().st_size) == 0
    assert out.read_bytes() == b""


def test_a_length_that_is_not_there_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less than `--length` in a file, or an `--offset` beyond its end, fails the source; no file is made."""
    out = tmp_path / "out"
    assert send([str(data)], [str(out)], length="1GB") == 4
    assert send([str(data)], [str(out)], offset="1GB") == 4
    assert not out.exists()
    said = capsys.readouterr().out
    assert "not 1000000000; check --offset and --length" in said
    assert "beyond its end; check --offset" in said


@pytest.mark.parametrize("policy", ["block", "drop", "disconnect", "spill"])
def test_every_policy_delivers_to_who_keeps_pace(policy: str, data: Path) -> None:
    """Teed or not, receivers that read get every byte, whatever would happen if they did not."""
    with Receivers(2, connections=2) as to:
        ended = relay(data, "-", *to.options, "--on-slow", policy, input=data.read_bytes(), stdin=None)
    assert ended.returncode == 0, ended.stderr
    for streams in to.streams:
        assert_same(streams[0], data.read_bytes())
        assert_same(streams[1], data.read_bytes())


def test_a_spill_does_not_wait_for_ever(data: Path) -> None:
    """A receiver that refuses fails when `--wait` is over, also through a log; the other one has it all."""
    with Receivers(1) as to:
        words = ["--to", refused_address(), "--on-slow", "spill", "--wait", "300ms"]
        ended = relay(*to.options, *words, input=data.read_bytes(), stdin=None)
    assert ended.returncode == 1, ended.stderr
    assert_same(to.streams[0][0], data.read_bytes())
    assert b"ECONNREFUSED" in ended.stdout


def test_stdout_as_a_sink_moves_the_results_to_stderr(data: Path) -> None:
    """`--to -` writes the bytes and nothing else to stdout."""
    ended = relay(data, "--to", "-")
    assert ended.returncode == 0
    assert_same(ended.stdout, data.read_bytes())
    assert b"delivered" in ended.stderr


# --- checksums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "blake3", "xxh3", "crc32c"])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_checksum_is_right_or_the_code_is_6(
    algorithm: str, source: str, data: Path, tmp_path: Path
) -> None:
    """The digest of what was sent is shown; given right it changes nothing, given wrong the code is 6."""
    digest = new_digest(algorithm)
    digest.update(data.read_bytes()[100:])
    right = digest.hexdigest()
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    words = ["--to", "null:", "--to", tmp_path / "out", "--offset", "100", "--checksum"]
    for given, code in ((algorithm, 0), (f"{algorithm}={right.upper()}", 0), (f"{algorithm}={wrong}", 6)):
        if source == "file":
            ended = relay(data, *words, given)
        else:
            ended = relay(*words, given, input=data.read_bytes(), stdin=None)
        assert ended.returncode == code, ended.stderr
        assert ended.stdout.decode().count(f"{algorithm}={right}") == 2
        if code:
            assert f"{algorithm} is {right}, but {wrong} was given" in ended.stderr.decode()


def test_a_failing_sink_is_told_before_a_wrong_checksum(data: Path) -> None:
    """5 comes before 6, and 6 before 1."""
    wrong = "crc32c=00000000"
    assert send([str(data)], [refused_address()], checksum=wrong) == 5
    assert send([str(data)], [refused_address(), "null:"], checksum=wrong) == 6


def test_a_file_that_is_lent_does_not_stay_mapped(tmp_path: Path) -> None:
    """What was lent of a file is not held in relay's memory: it holds some 16 MiB of it, however long the file is."""
    (tmp_path / "long").touch()
    os.truncate(tmp_path / "long", 192 * MIB)
    argv = [sys.executable, "-m", "relay", "send", "--method", "vmsplice", str(tmp_path / "long")]
    with tcp_listener() as (listener, address):
        with subprocess.Popen([*argv, "--to", address], stdout=subprocess.DEVNULL) as sending:
            with accept(listener) as sock:
                came = 0
                while came < 176 * MIB:
                    came += len(sock.recv(MIB))
                status = Path(f"/proc/{sending.pid}/status").read_text()
                receive_all(sock)
            assert sending.wait(PATIENCE) == 0
    (held,) = re.findall(r"RssFile:\s*(\d+) kB", status)
    assert int(held) < 96 * 1024
