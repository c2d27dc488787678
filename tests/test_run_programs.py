"""`relay run` with other programs at its ends, the system calls that it makes, and its memory.

RELAY_TEST_LARGE=1 runs the memory test over 2 GiB instead of 512 MiB, and the trace over 256 MiB instead of 64.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from faults import strace_prefix
from peers import (
    accept,
    assert_same,
    nc_receiver,
    payload,
    payload_digest,
    payload_file,
    program,
    run,
    running,
    socat_receiver,
    tcp_listener,
)
from relays import RELAY, environment, listening_on, relay, run_relay

SIZE = 3_000_001
LARGE = os.environ.get("RELAY_TEST_LARGE", "") == "1"


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
    assert 0 <= moved["tee"] - 3 * size <= 17 * 4096, (
        "the probe at the start and the look at the first pieces tee a page each, the stream all the rest"
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
    """--method forces a way, auto begins to files by copying; the line of each sink says which it was."""
    (tmp_path / "in").write_bytes(payload(7, SIZE))
    with (tmp_path / "in").open("rb") as stdin:
        done = run_relay(
            "run", "-", "--to", "one", "--to", "two", "--method", method, cwd=tmp_path, stdin=stdin
        )
    assert done.returncode == 0
    for line in done.stdout.decode().splitlines():
        assert (", copy)" in line) == (method != "zero-copy"), line
    for name in ("one", "two"):
        assert_same((tmp_path / name).read_bytes(), payload(7, SIZE))
