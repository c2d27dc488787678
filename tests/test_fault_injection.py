"""The program under faults: every byte arrives or an error is reported; never silence, never a hang.

System calls fail under strace, at the first call, later on, and in bursts; or come short under the shim. A
forged end of input (a call that returns 0) is left out: no program could tell.

By default a sample of the matrix runs. RELAY_FAULTS=all runs all of it (some minutes); RELAY_FAULTS=50 takes
a sample of that size for each shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import ShortCounts, strace_prefix
from peers import PATIENCE, assert_same, payload

ROOT = Path(__file__).resolve().parent.parent
RELAY = [sys.executable, "-m", "relay"]
SAMPLE = os.environ.get("RELAY_FAULTS", "8")
DATA = payload(11, 700_000)
HEADER = "front " * 3000

ERRORS = ("EAGAIN", "EINTR", "EINVAL", "ENOMEM", "EPERM", "ENOSYS", "EIO")
MOMENTS = ("1", "2", "4", "3..6", "8+5")
CALLS = {
    "pipe to two fifos and a file": ("splice", "tee", "splice,tee"),
    "tcp to tcp and a file": ("splice", "tee", "recv", "splice,tee"),
    "file to tcp": ("sendfile", "splice", "sendfile,splice"),
    "file with a header to a file and a fifo": ("vmsplice", "tee", "vmsplice,splice,tee"),
}


class Reader(threading.Thread):
    """Collects what comes out of a fifo, or of the one connection to a listener, until it is over."""

    def __init__(self, fd: int | None = None, listener: socket.socket | None = None) -> None:
        super().__init__(daemon=True)
        self.got = bytearray()
        self._fd, self._listener = fd, listener
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """The thread: a fifo nobody writes to yet is at its end, so its end counts only when all is over."""
        with contextlib.ExitStack() as closing:
            fd = self._fd
            while fd is None:
                assert self._listener is not None
                if select.select([self._listener], [], [], 0.05)[0]:
                    near, _ = self._listener.accept()
                    closing.enter_context(near)
                    near.setblocking(False)
                    fd = near.fileno()
                elif self._over.is_set():
                    return
            while True:
                over = self._over.is_set()
                select.select([fd], [], [], 0.05)
                try:
                    piece = os.read(fd, 1 << 20)
                except BlockingIOError:
                    piece = b""
                except ConnectionResetError:
                    return
                self.got += piece
                if not piece and (over or (self._listener and not self._over.wait(0.01))):
                    if over or self._listener:
                        return
                elif not piece:
                    self._over.wait(0.01)

    def all(self) -> bytes:
        """Everything, once the program has ended."""
        self._over.set()
        self.join(PATIENCE)
        assert not self.is_alive()
        return bytes(self.got)


@dataclasses.dataclass
class Shape:
    """A command, what it is given, and for each sink how to learn what reached it."""

    words: list[str]
    sinks: list[Callable[[], bytes]]
    expected: bytes = DATA
    stdin: bool = False
    tcp: bool = False


@contextlib.contextmanager
def shape(name: str, folder: Path) -> Iterator[Shape]:
    """One of the shapes of CALLS, with its receivers standing by."""
    with contextlib.ExitStack() as closing:

        def fifo(at: str) -> Callable[[], bytes]:
            os.mkfifo(folder / at)
            fd = os.open(folder / at, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            closing.callback(os.close, fd)
            return Reader(fd).all

        def tcp() -> tuple[str, Callable[[], bytes]]:
            listener = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
            return f"tcp://127.0.0.1:{listener.getsockname()[1]}", Reader(listener=listener).all

        def file() -> bytes:
            found = [folder / "out", folder / "out.part"]
            return b"".join(path.read_bytes() for path in found if path.exists())

        out, source = str(folder / "out"), folder / "in"
        source.write_bytes(DATA)
        if name == "pipe to two fifos and a file":
            sinks = [fifo("a"), fifo("b"), file]
            targets = [f"fifo://{folder}/a", f"fifo://{folder}/b", out]
            yield Shape(["run", "-", *to(targets)], sinks, stdin=True)
        elif name == "tcp to tcp and a file":
            address, received = tcp()
            yield Shape(["run", "tcp://127.0.0.1:0", *to([address, out])], [received, file], tcp=True)
        elif name == "file to tcp":
            address, received = tcp()
            yield Shape(["run", str(source), "--to", address], [received])
        else:
            config = folder / "relay.yaml"
            config.write_text(
                f"routes:\n  r:\n    source: {{file: {source}}}\n    stages:\n"
                f'      - header: {{text: "{HEADER}"}}\n      - tee: {{to: {{fifo: {folder}/a}}}}\n'
                f"    sink: {{file: {out}}}\n"
            )
            yield Shape(["serve", str(config)], [fifo("a"), file], HEADER.encode() + DATA)


def to(targets: list[str]) -> list[str]:
    """--to for each."""
    return [word for target in targets for word in ("--to", target)]


def feed(process: subprocess.Popen[bytes], made: Shape, said: list[bytes]) -> None:
    """Gives the source its bytes; a program that goes away meanwhile is no fault of ours."""
    assert process.stderr is not None
    with contextlib.suppress(OSError):
        if made.stdin:
            assert process.stdin is not None
            with process.stdin as stream:
                stream.write(DATA)
        elif made.tcp:
            for line in process.stderr:
                said.append(line)
                if line.startswith(b"listening on tcp://"):
                    port = int(line.rsplit(b":", 1)[1])
                    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
                        sock.sendall(DATA)
                        sock.shutdown(socket.SHUT_WR)
                        sock.recv(1)
                    break


def survives(name: str, folder: Path, prefix: list[str], env: dict[str, str] | None = None) -> int:
    """Runs that shape behind `prefix` and checks the promise; the exit status."""
    with shape(name, folder) as made:
        environment = {**(env or os.environ), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*prefix, *RELAY, *made.words],
            stdin=subprocess.PIPE if made.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        said: list[bytes] = []
        feeder = threading.Thread(target=feed, args=(process, made, said), daemon=True)
        feeder.start()
        try:
            feeder.join(PATIENCE)
            process.stdin = None  # closed by the feeder
            output, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs: {b''.join(said).decode()}", pytrace=False)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            feeder.join(PATIENCE)
        errors = b"".join(said) + errors
        story = (output + errors).decode(errors="replace")
        for sink in made.sinks:
            got = sink()
            if process.returncode == 0:
                assert_same(got, made.expected)
            else:
                assert made.expected.startswith(got), f"other bytes than the source's\n{story}"
        assert "Traceback" not in story, story
        if process.returncode:
            assert process.returncode > 0, f"killed by a signal: {process.returncode}\n{story}"
            assert "failed" in story or "cannot" in story or "error" in story.lower(), story
        return process.returncode


def rules(name: str) -> list[tuple[str, str]]:
    """The faults for a shape: all of them, or a sample that is the same every time."""
    found = []
    for calls, error, moment in itertools.product(CALLS[name], ERRORS, MOMENTS):
        found.append((name, f"{calls}:error={error}:when={moment}"))
    return found if SAMPLE == "all" else random.Random(name).sample(found, min(int(SAMPLE), len(found)))


@pytest.mark.parametrize(
    ("name", "rule"), [one for name in CALLS for one in rules(name)], ids=lambda word: word.replace(" ", "-")
)
def test_a_failing_call_is_survived_or_reported(name: str, rule: str, tmp_path: Path) -> None:
    """Whatever call fails, however and whenever: all arrives, or the program says that it did not."""
    survives(name, tmp_path, strace_prefix(rule))


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("seed", [1, 2])
def test_short_counts_lose_nothing(name: str, seed: int, tmp_path: Path, short_counts: ShortCounts) -> None:
    """Calls that move less than they were asked to, or are interrupted, cost nothing but time."""
    environment = short_counts.environment(seed, rate=30, eintr=5)
    assert survives(name, tmp_path, [], environment) == 0
    assert any(count.shortened for count in short_counts.counts().values())


@pytest.mark.parametrize(
    ("name", "call"),
    [(name, call) for name in CALLS for call in ("splice", "tee", "vmsplice")]
    + [("file to tcp", "sendfile")],
)
def test_a_sandbox_that_refuses_a_call_costs_speed_alone(name: str, call: str, tmp_path: Path) -> None:
    """Where the system refuses one of the calls for good, relay copies, and everything arrives."""
    assert survives(name, tmp_path, strace_prefix(f"{call}:error=EPERM")) == 0
