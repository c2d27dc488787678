"""`relay send` as a command: what makes no sense, what it takes for granted, and signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import peers
import pytest
from peers import PATIENCE, accept, assert_same, receive_all, refused_address, tcp_listener
from sends import RELAY, relay

from relay.errors import UsageError
from relay.sending.sending import send

# --- usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": ["tpc://127.0.0.1:1"]}, "did you mean 'tcp'"),
        ({"to": ["tcp://127.0.0.1:65536"]}, "port 65536 in 'tcp://127.0.0.1:65536' is out of range"),
        ({"to": ["tcp://127.0.0.1:0"]}, "port 0"),
        ({"to": ["tcp://:9000"]}, "names no host"),
        ({"to": ["out/"]}, "is a directory"),
        ({"to": ["out"]}, "2 files would all be written to out; give each a name of its own"),
        ({"to": ["a/{nmae}"]}, "did you mean 'name'"),
        ({"to": ["-", "-"]}, "is given 2 times"),
        ({"files": ["-", "-"]}, "stdin can be read only once"),
        ({"files": [""]}, "FILE is empty"),
        ({"rate": "10MB"}, "--rate"),
        ({"rate": "0"}, "--rate: must be more than 0"),
        ({"offset": "-1"}, "--offset"),
        ({"length": "many"}, "--length"),
        ({"wait": "soon"}, "--wait"),
        ({"checksum": "md5"}, "--checksum: unknown 'md5'"),
        ({"checksum": "sha265"}, "did you mean 'sha256'"),
        ({"checksum": "crc32c=xyz"}, "crc32c has 8 hexadecimal digits"),
        ({"checksum": "crc32c=00000000"}, "gives one digest, but there are 2 files"),
        ({"method": "tee"}, "--method"),
        ({"on_slow": "dorp"}, "did you mean 'drop'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], said: str) -> None:
    """Every slip on the command line is a UsageError that names the option; nothing is opened."""
    wanted = {"files": ["a", "b"], "to": ["null:"], **options}
    with pytest.raises(UsageError, match=re.escape(said)):
        send(**wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [("--to", "tpc://x:1"), ("--method", "teleport"), ("--rate", "fast")])
def test_usage_errors_are_code_2(words: Sequence[str]) -> None:
    """The command exits with 2 and says why on stderr."""
    ended = relay("/dev/null", *words)
    assert ended.returncode == 2
    assert ended.stderr
    assert not ended.stdout


def test_the_default_address_is_the_server_of_this_machine(data: Path) -> None:
    """Without `--to` the receiver is tcp://127.0.0.1:9000."""
    try:
        with socket.create_connection(("127.0.0.1", 9000), 1):
            pytest.skip("port 9000 is free to be refused: here somebody listens on it")
    except OSError:
        pass
    ended = relay(data)
    assert ended.returncode == 5
    assert b"connecting to tcp://127.0.0.1:9000" in ended.stdout


def test_an_unknown_host_is_a_failing_sink(data: Path) -> None:
    """A name that nobody knows: exit 5, with the name in the message."""
    ended = relay(data, "--to", "tcp://no-such-host.invalid:9")
    assert ended.returncode == 5
    assert b"looking up 'no-such-host.invalid'" in ended.stdout


def test_files_into_a_folder_are_named_after_themselves(tmp_path: Path) -> None:
    """`{name}` is each file's own; what is there already is never overwritten."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    for _ in range(2):
        assert send(names, [f"{tmp_path}/out/{{name}}"]) == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"a": b"a", "b": b"b", "a-2": b"a", "b-2": b"b"}


# --- signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_at_once(number: signal.Signals, code: int, data: Path, tmp_path: Path) -> None:
    """Mid-way: within 2 s, the receiver sees a reset, the `.part` stays and is named, 130 or 143."""
    with tcp_listener() as (listener, address):
        argv = [*RELAY, "send", data, "--to", address, "--to", tmp_path / "out", "--rate", "1MB/s"]
        with peers.running(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with accept(listener) as sock:
                peers.receive_exactly(sock, 1000)
                part = tmp_path / "out.part"
                peers.eventually(lambda: part.exists() and part.stat().st_size, "the part has bytes")
                began = time.monotonic()
                process.send_signal(number)
                with pytest.raises(ConnectionResetError):
                    receive_all(sock)
            said, _ = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - began < 2
    assert process.returncode == code
    assert f"what was written stays in {tmp_path}/out.part".encode() in said
    assert not (tmp_path / "out").exists()


def test_a_signal_ends_a_wait_for_a_receiver(data: Path) -> None:
    """Nobody listens and `--wait` is long: SIGINT ends it all the same, and what waits is not begun."""
    traced = ["strace", "-f", "-qq", "-I", "2", "-e", "trace=connect"]
    argv = [*traced, *RELAY, "send", data, data, "--to", refused_address(), "--wait", "1h"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with peers.running(argv, bufsize=0, **pipes) as process:
        assert process.stderr is not None
        peers.read_until(process.stderr, r"connect\(")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 130


def test_a_closed_stdout_does_not_stop_the_sending(data: Path, tmp_path: Path) -> None:
    """Whoever read the results went away: the bytes are delivered all the same, exit 0."""
    r, w = os.pipe()
    os.close(r)
    with os.fdopen(w, "wb") as stdout:
        ended = relay(data, "--to", tmp_path / "out", stdout=stdout)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert_same((tmp_path / "out").read_bytes(), data.read_bytes())
