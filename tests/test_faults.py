"""The fault tools themselves: an injected fault really happens, and nothing but a fault happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faults
import pytest
from peers import assert_same, payload, run

# Splices stdin to stdout through nothing else, one line on stderr for each call: its result or its errno.
SPLICER = """
import os, sys
while True:
    try:
        moved = os.splice(0, 1, 65536)
    except OSError as error:
        print(error.errno, file=sys.stderr)
        if error.errno != 11:
            sys.exit(7)
        continue
    print("moved", moved, file=sys.stderr)
    if moved == 0:
        break
"""

# Calls recv, vmsplice, tee, sendfile, write and read in turn until each has carried its bytes; checks them.
CARRIER = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
from syscalls import Memory, readable, tee, vmsplice
data = bytes(range(256)) * 64
a, b = socket.socketpair()
def carry(put, take):
    sent, got = 0, b""
    while len(got) < len(data):
        try:
            if sent < len(data):
                sent += put(sent)
        except BlockingIOError:
            pass  # full of small pieces: take some
        got += take(len(data) - len(got))
    assert got == data
carry(lambda at: a.send(data[at:]), b.recv)
r, w = os.pipe()
memory = Memory(4)
memory[:] = data
carry(lambda at: vmsplice(w, [memory.span(at, min(100, len(data) - at)), *(
    [memory.span(at + 100)] if at + 100 < len(data) else [])]), lambda n: os.read(r, n))
file = os.memfd_create("x")
carry(lambda at: os.pwrite(file, data[at:], at), lambda n: os.pread(file, n, len(data) - n))
carry(lambda at: os.sendfile(a.fileno(), file, at, len(data) - at), b.recv)
carry(lambda at: os.write(w, data[at:]), lambda n: os.read(r, n))
r2, w2 = os.pipe()
def by_tee(at):
    if not readable(r):
        os.write(w, data[at:at + 1000])
    count = tee(r, w2, readable(r))
    drained = 0
    while drained < count:
        drained += len(os.read(r, count - drained))
    return count
carry(by_tee, lambda n: os.read(r2, n))
print("carried")
"""


def splicer(
    prefix: list[str], data: bytes, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs SPLICER behind `prefix` with `data` as its stdin pipe."""
    return run([*prefix, sys.executable, "-c", SPLICER], input=data, env=env)


def moves(outcome: subprocess.CompletedProcess[bytes]) -> list[int]:
    """The counts that SPLICER reported."""
    return [int(line.split()[1]) for line in outcome.stderr.splitlines() if line.startswith(b"moved")]


def test_an_injected_error_happens() -> None:
    """The second splice fails with the errno asked for, moves nothing, and nothing else differs."""
    outcome = splicer(faults.strace_prefix("splice:error=EAGAIN:when=2"), b"payload")
    assert outcome.stdout == b"payload"
    assert outcome.stderr.splitlines() == [b"moved 7", b"11", b"moved 0"]
    assert outcome.returncode == 0


def test_a_burst_of_errors_happens() -> None:
    """`when=1..3` fails the first three calls and no other."""
    outcome = splicer(faults.strace_prefix("splice:error=EAGAIN:when=1..3"), b"payload")
    assert outcome.stderr.splitlines() == [b"11", b"11", b"11", b"moved 7", b"moved 0"]
    assert outcome.stdout == b"payload"


def test_the_exit_status_passes_through() -> None:
    """The command's own exit status comes out of strace."""
    outcome = splicer(faults.strace_prefix("splice:error=EIO:when=1"), b"payload")
    assert outcome.stderr == b"5\n"
    assert outcome.returncode == 7


def test_a_forged_end_happens() -> None:
    """`retval=0` makes a call return 0 without being executed: the bytes stay where they were."""
    outcome = splicer(faults.strace_prefix("splice:retval=0:when=1"), b"payload")
    assert outcome.stdout == b""
    assert moves(outcome) == [0]


def test_rules_add_up_and_know_libc_names() -> None:
    """Several rules hold together, in children too, and `recv` means the kernel's recvfrom."""
    code = (
        "import os, socket, subprocess, sys\n"
        "a, b = socket.socketpair(); a.send(b'xy')\n"
        "try: b.recv(1)\n"
        "except OSError as error: print(error.errno, flush=True)\n"
        "print(b.recv(1), flush=True)\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {SPLICER!r}]).returncode)"
    )
    argv = faults.strace_inject(
        [sys.executable, "-c", code], "recv:error=ENOMEM:when=1", "tee,splice:error=EINVAL:when=1"
    )
    outcome = run(argv, input=b"payload")
    assert outcome.stdout.splitlines() == [b"12", b"b'x'"]
    assert outcome.stderr == b"22\n"
    assert outcome.returncode == 7


def test_bad_rules_are_refused() -> None:
    """A rule without a fault, a rule with signal= and no rule at all are mistakes of the test."""
    for rules in ([], ["splice"], ["splice:signal=SIGTERM:when=1"]):
        with pytest.raises(AssertionError):
            faults.strace_prefix(*rules)


@pytest.mark.parametrize("seed", [1, 2])
def test_short_splices_lose_nothing(short_counts: faults.ShortCounts, tmp_path: Path, seed: int) -> None:
    """With every splice shortened the bytes arrive unchanged in smaller pieces, as many as counted."""
    data, path = payload(seed, 300_000), tmp_path / "input"
    path.write_bytes(data)
    argv = [sys.executable, "-c", SPLICER]
    with path.open("rb") as stdin:
        whole = run(argv, stdin=stdin)
    with path.open("rb") as stdin:
        outcome = run(argv, stdin=stdin, env=short_counts.environment(seed, rate=100, calls=["splice"]))
    count = short_counts.counts()["splice"]
    assert moves(whole)[0] == 65536, "a file fills an empty pipe at once when nothing interferes"
    assert max(moves(outcome)) < 65536
    assert_same(outcome.stdout, data)
    assert count == faults.Count(len(moves(outcome)), len(moves(outcome)), 0)
    assert outcome.returncode == 0


def test_a_seed_repeats_its_decisions(short_counts: faults.ShortCounts) -> None:
    """The same seed shortens the same calls by the same lengths; another seed does not."""
    code = (
        "import socket\n"
        "a, b = socket.socketpair(); a.send(bytes(30000)); a.close()\n"
        "while piece := b.recv(3000): print(len(piece))"
    )

    def asked(seed: int) -> list[int]:
        environment = short_counts.environment(seed, rate=50, calls=["recv"])
        return list(map(int, run([sys.executable, "-c", code], env=environment).stdout.split()))

    assert asked(11) == asked(11)
    assert asked(11) != asked(12)
    assert sum(asked(11)) == 30000
    assert 3000 in asked(11), "half of the calls are left alone"


def test_every_call_comes_short_and_carries(short_counts: faults.ShortCounts) -> None:
    """Each call of the shim's table is shortened in a program that copes, and its bytes are right."""
    environment = short_counts.environment(5, rate=100, calls=faults.CALLS)
    outcome = run([sys.executable, "-c", CARRIER, Path(__file__).parent], env=environment)
    assert outcome.stdout == b"carried\n", outcome.stderr.decode()
    counts = short_counts.counts()
    untouched = {call for call, count in counts.items() if count.shortened == 0}
    assert untouched == {"splice"}, "CARRIER calls everything but splice"
    assert all(count.interrupted == 0 for count in counts.values())


def test_only_named_calls_are_touched(short_counts: faults.ShortCounts) -> None:
    """`splice` does not mean vmsplice, and what is not named is not even counted."""
    environment = short_counts.environment(5, rate=100, calls=["splice"])
    outcome = run([sys.executable, "-c", CARRIER, Path(__file__).parent], env=environment)
    assert outcome.stdout == b"carried\n", outcome.stderr.decode()
    assert all(count.calls == 0 for count in short_counts.counts().values())


def test_interruptions_happen(short_counts: faults.ShortCounts) -> None:
    """`eintr` makes calls answer EINTR with nothing moved; a retry goes on as if nothing had been."""
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "r, w = os.pipe(); os.write(w, b'payload'); buffer = ctypes.create_string_buffer(7)\n"
        "seen = []\n"
        "while (got := libc.read(r, buffer, 7)) < 0: seen.append(ctypes.get_errno())\n"
        "print(set(seen), buffer.raw)"
    )
    found = set()
    for seed in range(8):
        environment = short_counts.environment(seed, rate=0, eintr=50, calls=["read"])
        found.add(run([sys.executable, "-I", "-c", code], env=environment).stdout)
        assert short_counts.counts()["read"].interrupted > 0
        assert short_counts.counts()["read"].shortened == 0
    assert found <= {b"{4} b'payload'\n", b"set() b'payload'\n"}
    assert b"{4} b'payload'\n" in found


def test_what_must_be_whole_stays_whole(short_counts: faults.ShortCounts) -> None:
    """Datagrams, eventfds and writes of up to PIPE_BUF bytes into a pipe are never cut."""
    code = (
        "import os, socket\n"
        "a, b = socket.socketpair(type=socket.SOCK_DGRAM)\n"
        "e = os.eventfd(0); r, w = os.pipe()\n"
        "for turn in range(50):\n"
        "    assert a.send(b'x' * 1000) == 1000 and len(b.recv(1000)) == 1000\n"
        "    assert os.write(e, (1).to_bytes(8, 'little')) == 8 and len(os.read(e, 8)) == 8\n"
        "    assert os.write(w, b'x' * 4096) == 4096\n"
        "    left = 4096\n"
        "    while left: left -= len(os.read(r, left))\n"
        "print('whole')"
    )
    environment = short_counts.environment(1, rate=100, calls=["send", "recv", "read", "write"])
    outcome = run([sys.executable, "-c", code], env=environment)
    assert outcome.stdout == b"whole\n", outcome.stderr.decode()
    assert short_counts.counts()["send"] == faults.Count(50, 0, 0)


def test_both_tools_work_together(short_counts: faults.ShortCounts) -> None:
    """strace's errors and the shim's short counts hold in one command, and no byte is lost to either."""
    data = payload(9, 200_000)
    prefix = faults.strace_prefix("splice:error=EAGAIN:when=3+5")
    outcome = splicer(prefix, data, env=short_counts.environment(2, rate=70, calls=["splice"]))
    assert_same(outcome.stdout, data)
    assert outcome.stderr.splitlines().count(b"11") >= 2
    assert short_counts.counts()["splice"].shortened > 0
