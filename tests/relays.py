"""relay at work: a route on an engine in this process, or the real program as a child."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers import PATIENCE, eventually, read_until, wait_for

from relay.config.data import from_data
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.serving.stream_route import StreamRoute
from relay.spill.spills import Spills

ROOT = Path(__file__).resolve().parent.parent
RELAY = [sys.executable, "-m", "relay"]


class Relay:
    """One route in this process for one stream, on an engine with a thread of its own.

    `bound` are the addresses it listens on. `wait` gives the session's record, None if it never began.
    """

    def __init__(self, route: dict[str, Any]) -> None:
        config = from_data({"routes": {"r": route}}, "test")
        self._engine = Engine("relay-under-test")
        self._over = threading.Event()
        self._spills = Spills()
        self.route = StreamRoute(
            "r",
            config.routes["r"],
            self._engine,
            itertools.repeat(self._engine),
            lambda _route: self._over.set(),
            once=True,
            on_record=lambda _record: None,
            spills=self._spills,
        )

    @property
    def bound(self) -> list[str]:
        """The addresses it listens on, the sinks' first."""
        return self.route.bound

    def __enter__(self) -> Relay:
        try:
            self.route.open()
        except BaseException:
            self.route.close()
            self._spills.close()
            self._engine.close()
            raise
        self._engine.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._over.is_set():
            self._engine.post(lambda: self.route.abort("the test is over"))
            self._over.wait(PATIENCE)
        # a ferry's thread may still be at work for a sink that failed; its pipes are closed on the engine
        eventually(lambda: not working_threads("-ferry"), "the ferries' threads end")
        self.route.close()
        self._spills.close()
        self._engine.stop()

    def wait(self, patience: float = PATIENCE) -> SessionRecord | None:
        """Waits until the route is done; its record."""
        assert self._over.wait(patience), f"the route was not over within {patience} s"
        assert len(self.route.records) <= 1
        return self.route.records[0] if self.route.records else None

    def moved(self) -> int:
        """Bytes that have come out of the source so far; 0 before it has a pipeline."""
        sources = [pipeline.source for pipeline in self.route.pipelines]
        return sum(source.moved for source in sources if source is not None)

    def post(self, action: Any) -> None:
        """Runs `action` on the engine's thread."""
        self._engine.post(action)


def working_threads(suffix: str) -> list[str]:
    """Names of the threads of engines' helpers that are still alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.endswith(suffix)]


def environment(**more: str) -> dict[str, str]:
    """What a relay process needs to be found from any directory."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # the user's own admin socket is nobody's here
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("RELAY_") and key != "XDG_RUNTIME_DIR"
    }
    return {**kept, "PYTHONPATH": path, **more}


class Process:
    """A running `python -m relay`: its JSON log line by line, its addresses, its end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.config = Path()  # the configuration it serves, where `serving` wrote it
        self.lines: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._rest = b""
        self._ended = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def _read(self, patience: float) -> bool:
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        wait_for(fd, patience=patience)
        piece = os.read(fd, 65536)
        *whole, self._rest = (self._rest + piece).split(b"\n")
        for line in whole:
            self._keep(line)
        if not piece:
            self._ended = True
        return bool(piece)

    def _keep(self, line: bytes) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            self.lines.append(found)
        else:
            self.other.append(line.decode(errors="replace"))

    def until(self, what: Any, patience: float = PATIENCE) -> Any:
        """Reads the log until `what()` is true and returns its answer; fails if the log ends before."""
        while True:
            answer = what()
            if answer:
                return answer
            try:
                more = self._read(patience)
            except AssertionError as error:
                raise AssertionError(f"{error}; the log was {self.text}") from None
            assert more, f"the log ended; it was {self.text}"

    @property
    def text(self) -> str:
        """All that was logged so far."""
        return "\n".join([*(json.dumps(line) for line in self.lines), *self.other])

    def addresses(self, count: int) -> list[str]:
        """The first `count` addresses it says it listens on, in the order of the log."""

        def said() -> list[str] | None:
            found = [line["address"] for line in self.lines if line.get("event") == "listening"]
            return found[:count] if len(found) >= count else None

        found: list[str] = self.until(said)
        return found

    def port(self, number: int = 0) -> int:
        """The port of the address `number` of those."""
        return int(self.addresses(number + 1)[number].rpartition(":")[2])

    def said(self, text: str) -> dict[str, Any]:
        """The first line whose message contains `text`."""
        line: dict[str, Any] = self.until(
            lambda: next((line for line in self.lines if text in line["message"]), None)
        )
        return line

    def sessions(self, count: int = 1) -> list[dict[str, Any]]:
        """The records of the first `count` finished sessions."""

        def found() -> list[dict[str, Any]] | None:
            over = [line for line in self.lines if line.get("event") == "session"]
            return over if len(over) >= count else None

        over: list[dict[str, Any]] = self.until(found)
        return over

    def signal(self, number: int) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def wait(self, patience: float = PATIENCE) -> int:
        """Reads the log to its end and returns the exit status."""
        while not self._ended and self._read(patience):
            pass
        if self._rest:
            self._keep(self._rest)
            self._rest = b""
        return self.process.wait(patience)


@contextlib.contextmanager
def relay(*arguments: str | Path, cwd: Path, prefix: Sequence[str] = (), **popen: Any) -> Iterator[Process]:
    """`relay ARGUMENTS` as a child whose stderr is read by the test; killed and reaped at the end."""
    argv = [*prefix, *RELAY, *map(str, arguments)]
    popen.setdefault("env", environment())
    popen.setdefault("stdin", subprocess.DEVNULL)
    # a log that nobody reads would hold relay up: room for what a test does not look at
    with subprocess.Popen(argv, cwd=cwd, stderr=subprocess.PIPE, pipesize=1 << 20, **popen) as process:
        try:
            yield Process(process)
        finally:
            if process.poll() is None:
                for child in _children(process.pid) if prefix else ():
                    os.kill(child, signal.SIGKILL)  # whoever traces it would leave it running
                process.kill()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def serving(config: str, cwd: Path, **popen: Any) -> Iterator[Process]:
    """`relay serve` with the text of a configuration."""
    path = cwd / "relay.yaml"
    path.write_text(config)
    with relay("serve", "--log-format", "json", path, cwd=cwd, **popen) as process:
        process.config = path
        yield process


def end(served: Process, code: int = 0) -> None:
    """SIGTERM, and the exit code that is expected."""
    served.signal(signal.SIGTERM)
    assert served.wait() == code, served.text


def run_relay(
    *arguments: str | Path, cwd: Path, patience: float = PATIENCE, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Runs `relay ARGUMENTS` to its end, stdout and stderr captured."""
    options.setdefault("env", environment())
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run([*RELAY, *map(str, arguments)], cwd=cwd, timeout=patience, **options)


def listening_on(process: Process) -> int:
    """The port that `relay run` says it listens on."""

    def said() -> str | None:
        return next((line for line in process.other if line.startswith("listening on")), None)

    return int(process.until(said).rpartition(":")[2])


__all__ = [
    "RELAY",
    "ROOT",
    "Process",
    "Relay",
    "end",
    "environment",
    "listening_on",
    "read_until",
    "relay",
    "run_relay",
    "serving",
]
