"""`relay run` seen from outside: every kind of address, the codes, the system calls, the memory, other programs.

RELAY_TEST_LARGE=1 runs the memory test over 2 GiB instead of 512 MiB, and the trace over 256 MiB instead of 64.
"""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import tty
from pathlib import Path

import pytest
from conformance import SINKS, reset
from faults import strace_prefix
from peers import (
    accept,
    assert_same,
    eventually,
    nc_receiver,
    payload,
    payload_digest,
    payload_file,
    program,
    read_all,
    receive_all,
    refused_address,
    run,
    running,
    socat_receiver,
    tcp_listener,
)
from relays import RELAY, Process, environment, relay, run_relay

LARGE = os.environ.get("RELAY_TEST_LARGE", "") == "1"
SIZE = 3_000_001


def listening_on(process: Process) -> int:
    """The port that `relay run` says it listens on."""

    def said() -> str | None:
        return next((line for line in process.other if line.startswith("listening on")), None)

    return int(process.until(said).rpartition(":")[2])


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


# --- system calls and memory ------------------------------------------------------------------------------


def test_no_payload_is_read_or_written(tmp_path: Path) -> None:
    """A fan-out from a pipe to four pipes moves by tee and splice: no call carries payload through memory."""
    size = (256 if LARGE else 64) << 20
    strace = strace_prefix("getrandom:retval=0:when=65000+")[0]  # skips where tracing is refused
    trace = tmp_path / "trace"
    calls = "read,write,readv,writev,pread64,pwrite64,sendto,recvfrom,sendmsg,recvmsg,splice,tee,vmsplice,sendfile"
    pipes = [os.pipe() for _ in range(4)]
    readers = [subprocess.Popen([program("sha256sum")], stdin=r, stdout=subprocess.PIPE) for r, _ in pipes]
    argv = [strace, "-f", "--seccomp-bpf", "-qq", "-o", trace, "-e", f"trace={calls}", "-s", "0"]
    words = [*RELAY, "run", "-"]
    for _, w in pipes:
        words += ["--to", f"fd://{w}"]
    with running(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE) as head:
        done = run(
            [*argv, *words], stdin=head.stdout, pass_fds=[w for _, w in pipes], env=environment(), patience=50
        )
        assert head.stdout is not None
        head.stdout.close()
    for r, w in pipes:
        os.close(r)
        os.close(w)
    digests = set()
    for reader in readers:
        digests.add(reader.communicate(timeout=20)[0].split()[0])
    assert done.returncode == 0, done.stderr
    assert len(digests) == 1
    lines = trace.read_text().splitlines()
    moved = {"splice": 0, "tee": 0}
    carried = 0
    begun = False
    for line in lines:
        found = re.search(r"\b(\w+)\((\d+).*?= (\d+)", line) or re.search(
            r"<... (\w+) resumed>.*?(= )(\d+)", line
        )
        if found is None:
            continue
        name, count = found[1], int(found[3])
        if name in moved:
            moved[name] += count
            begun = True
        elif begun:
            carried += count
    assert 0 <= moved["tee"] - 3 * size < 4096, (
        "the probe at the start tees a few bytes, the stream all the rest"
    )
    assert moved["splice"] >= 4 * size
    assert carried < 1 << 20, f"{carried} bytes went through memory"


def test_memory_stays_flat_with_32_branches(tmp_path: Path) -> None:
    """Whatever the size of the stream and with 32 branches, the process stays under 64 MiB."""
    size = (2048 if LARGE else 512) << 20
    to = [word for _ in range(31) for word in ("--to", "null:")]
    with (
        running(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE) as head,
        tcp_listener() as (listener, address),
        relay("run", "-", *to, "--to", address, cwd=tmp_path, stdin=head.stdout, stdout=-3) as process,
    ):
        assert head.stdout is not None
        head.stdout.close()
        with accept(listener) as sock:
            count = 0
            peak = 0
            buffer = bytearray(1 << 20)
            while got := sock.recv_into(buffer):
                count += got
                if count > size // 2 and not peak:
                    text = Path(f"/proc/{process.pid}/status").read_text()
                    peak = int(re.search(r"VmHWM:\s+(\d+) kB", text)[1])
        assert process.wait() == 0
    assert count == size
    assert 0 < peak < 64 * 1024, f"{peak} KiB"


# --- programs that others wrote ---------------------------------------------------------------------------


def test_socat_and_nc_receive(tmp_path: Path) -> None:
    """socat and a half-closing nc both get the file whole."""
    expected = payload_file(tmp_path / "in", 3, 8 << 20)
    one, two = tmp_path / "one", tmp_path / "two"
    with socat_receiver(one) as socat, nc_receiver(two, "-N") as nc:
        done = run_relay("run", "in", "--to", socat.address, "--to", nc.address, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert socat.wait() == 0
        nc.wait()
    for path in (one, two):
        assert run(["sha256sum", path]).stdout.split()[0].decode() == expected


def test_socat_and_nc_send(tmp_path: Path) -> None:
    """What socat and nc send arrives whole."""
    expected = payload_file(tmp_path / "in", 4, 4 << 20)
    for number, argv in enumerate(
        (["socat", "-u", f"OPEN:{tmp_path}/in", "TCP:127.0.0.1:{}"], ["nc", "-N", "127.0.0.1", "{}"])
    ):
        with relay("run", "tcp://127.0.0.1:0", "--to", f"out{number}", cwd=tmp_path) as process:
            port = str(listening_on(process))
            with (tmp_path / "in").open("rb") as stdin:
                done = run([word.replace("{}", port) for word in argv], stdin=stdin)
            assert done.returncode == 0, done.stderr
            assert process.wait() == 0
        assert run(["sha256sum", tmp_path / f"out{number}"]).stdout.split()[0].decode() == expected


def test_curl_fetches_a_file_served_raw(tmp_path: Path) -> None:
    """curl asks relay, which listens as a one-shot server made of a broadcast, and gets the bytes."""
    data = payload(5, 1 << 20)
    (tmp_path / "feed").mkdir()
    fifo = tmp_path / "feed" / "in.fifo"
    os.mkfifo(fifo)
    (tmp_path / "c.yaml").write_text(
        f'routes: {{r: {{source: {{fifo: "{fifo}"}}, sink: {{listen: "tcp://127.0.0.1:0"}}}}}}'
    )
    with relay("serve", "--log-format", "json", "c.yaml", cwd=tmp_path) as process:
        port = process.port()
        argv = ["curl", "-s", "--http0.9", "--output", tmp_path / "got", f"http://127.0.0.1:{port}/"]
        with running(argv) as curl:
            process.said("joined")
            fifo.write_bytes(data)
            assert curl.wait(20) == 0
        assert process.wait() == 0
    assert_same((tmp_path / "got").read_bytes(), data)


def test_dd_reads_and_writes_in_odd_pieces(tmp_path: Path) -> None:
    """dd with pieces of 777 bytes at both ends changes nothing."""
    expected = payload_file(tmp_path / "in", 6, 1 << 20)
    dd = program("dd")
    script = f"{dd} if=in bs=777 status=none | {' '.join(RELAY)} run - 2>/dev/null | {dd} of=out bs=777 status=none"
    done = run(["bash", "-c", f"set -o pipefail; {script}"], cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert run(["sha256sum", tmp_path / "out"]).stdout.split()[0].decode() == expected
    assert expected == payload_digest(6, 1 << 20)


@pytest.mark.parametrize("method", ["auto", "zero-copy", "copy"])
def test_a_method_can_be_asked_for(tmp_path: Path, method: str) -> None:
    """--method forces a way; the line of each sink says which it was."""
    (tmp_path / "in").write_bytes(payload(7, SIZE))
    with (tmp_path / "in").open("rb") as stdin:
        done = run_relay(
            "run", "-", "--to", "one", "--to", "two", "--method", method, cwd=tmp_path, stdin=stdin
        )
    assert done.returncode == 0
    for line in done.stdout.decode().splitlines():
        assert (", copy)" in line) == (method == "copy"), line
    for name in ("one", "two"):
        assert_same((tmp_path / name).read_bytes(), payload(7, SIZE))
