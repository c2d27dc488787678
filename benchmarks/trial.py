"""One run of one contender: the ends are set up, it is let loose, the bytes and the CPU are counted.

What the clock and the account cover:

- GiB/s: from the first byte at any receiver to the last byte at the last one, so starting up is not in it. A
  file has no receiver: there it is from the feeder's first write to the contender's exit.
- CPU: user and system time of all processes of the contender, from fork to exit, starting up included. The
  load generator and the receivers are not in it. The kernel work in a contender's name is: on loopback the
  receive half of tcp runs inside the sender's call.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import machine
from .cell import MIB, Cell, cpus
from .contender import Contender, Part, Place, environment, spelled
from .load import BenchmarkError, Process, Usage, kept

ATTEMPTS = 3
TAKEN = "already in use"  # os.strerror(errno.EADDRINUSE), as every peer says it
DEADLINE = 120.0  # seconds for one run; a contender that hangs is reported, not waited for


@dataclass(frozen=True)
class Measure:
    """One run.

    `size` bytes of the source stream flowed for `seconds`; the contender used `cpu` seconds, its largest
    process was of `rss_kib`, and `elapsed` seconds passed from start to exit. `foreign` is the CPU seconds of
    everything else on the machine, load generator and receivers apart.
    """

    size: int
    seconds: float
    cpu: float
    rss_kib: int
    elapsed: float
    foreign: float


class Trial:
    """Runs contenders through one cell. Owns nothing between runs but the source files in its directory."""

    def __init__(self, load: Path, cell: Cell, directory: Path) -> None:
        """`load` is the compiled program, `directory` is for files and fifos."""
        self.load = load
        self.cell = cell
        self.directory = directory
        self._contender_cpus, self._load_cpus = cpus(cell.pinned)

    def source(self, size: int) -> Path:
        """A file of `size` bytes as the feeder sends them, in the page cache and written back."""
        path = self.directory / f"source-{size}"
        if not path.exists():
            for old in self.directory.glob("source-*"):
                old.unlink()
            with path.open("wb") as file, tempfile.TemporaryFile() as report:
                argv = [str(self.load), self.cell.feed, str(size), str(self.cell.chunk)]
                feeder = Process(argv, cpus=None, stdout=file, stderr=report)
                _succeeded(feeder, feeder.wait(DEADLINE), report)
                os.fsync(file.fileno())  # or its write-back would fall into the first runs
        return path

    def digest(self, size: int) -> str:
        """The sha256 of `size` bytes as the feeder sends them."""
        with tempfile.TemporaryFile() as report, contextlib.ExitStack() as stack:
            argv = [str(self.load), self.cell.feed, str(size), str(self.cell.chunk)]
            feeder = Process(argv, cpus=None, stdout=subprocess.PIPE, stderr=report)
            stack.callback(feeder.kill)
            value = _sha256(feeder.stdout)
            _succeeded(feeder, feeder.wait(DEADLINE), report)
        return value

    def run(self, contender: Contender, size: int) -> Measure:
        """One timed run; BenchmarkError if the contender fails or a sink gets another number of bytes."""
        return self._again_elsewhere(contender, size, None)

    def verify(self, contender: Contender, size: int, digest: str) -> None:
        """One untimed run whose receivers hash what they get; BenchmarkError if a sink got other bytes."""
        got: list[str] = []
        self._again_elsewhere(contender, size, got)
        for number, value in enumerate(got):
            if value != digest:
                raise BenchmarkError(
                    f"sink {number} got other bytes than were sent: sha256 {value}, not {digest}"
                )

    def _again_elsewhere(self, contender: Contender, size: int, digests: list[str] | None) -> Measure:
        """A run; another one on another port where somebody else took the first port meanwhile."""
        for attempt in range(1, ATTEMPTS + 1):
            with tempfile.TemporaryDirectory(dir=self.directory) as own:
                try:
                    return self._run(contender, size, Path(own), digests)
                except BenchmarkError as error:
                    if attempt == ATTEMPTS or TAKEN not in str(error):
                        raise
        raise AssertionError("the last attempt returns or raises")

    def _run(self, contender: Contender, size: int, own: Path, digests: list[str] | None) -> Measure:
        cell = self.cell
        deadline = time.monotonic() + DEADLINE
        with contextlib.ExitStack() as stack:
            busy = machine.busy_seconds()
            hashes: list[_Digest] = []
            if digests is not None and cell.sink != "file":
                hashes = [stack.enter_context(_Digest()) for _ in range(cell.sinks)]
            names = tuple(own / f"sink-{n}" for n in range(cell.sinks))
            fifos = names if cell.sink == "fifo" else ()
            for path in fifos:
                os.mkfifo(path)
            receivers, report = None, stack.enter_context(tempfile.TemporaryFile())
            listen = free_port() if cell.source == "tcp" or contender.serves else 0
            file = self.source(size) if cell.source == "file" else Path("/dev/null")
            ports: tuple[int, ...] = ()
            if cell.sink != "file":
                fetched = [str(listen), file.name] if contender.serves else []
                receivers = self._receivers(stack, names, hashes, report, fetched)
                ports = tuple(map(int, _answer(receivers, deadline)))
            place = Place(
                listen=listen,
                file=file,
                ports=ports,
                fifos=fifos,
                output=names[0],
                listen_path=own / "source",
                paths=names,
            )
            feeder_end, parts_in = -1, -1
            if cell.source == "pipe":
                parts_in, feeder_end = _pipe(cell.pipe)
            parts = contender.parts(place)
            complaints = stack.enter_context(tempfile.TemporaryFile())
            sizes = stack.enter_context(tempfile.TemporaryFile())
            started = time.monotonic_ns()
            try:
                processes = self._start(stack, parts, parts_in, complaints, sizes)
                feeder = self._feeder(stack, size, place, feeder_end)
            finally:
                for fd in {parts_in, feeder_end} - {-1}:
                    os.close(fd)
            usages = []
            if contender.serves and receivers is not None:
                receivers.finished(deadline - time.monotonic())
                for process in processes:
                    process.end()
            for process in processes:
                usage = process.wait(deadline - time.monotonic())
                _succeeded(process, usage, complaints, spelled(parts))
                usages.append(usage)
            ended = time.monotonic_ns()
            sizes.seek(0)
            others = []
            begun = 0
            if feeder is not None:
                others.append(feeder[0].wait(deadline - time.monotonic()))
                begun = int(_succeeded(feeder[0], others[-1], feeder[1]).split()[2])
            if receivers is None:
                counts, span = [path.stat().st_size for path in names], (begun, ended)
            else:
                others.append(receivers.wait(deadline - time.monotonic()))
                _succeeded(receivers, others[-1], report)
                rows = [line.split()[1:] for line in receivers.stdout.read().decode().splitlines()]
                counts = [int(row[0]) for row in rows]
                span = (min(int(row[1]) for row in rows), max(int(row[2]) for row in rows))
            for number, count in enumerate(counts):
                if count != size:
                    raise BenchmarkError(f"sink {number} got {count} of {size} bytes from: {spelled(parts)}")
            if digests is not None:
                digests += [one.value() for one in hashes] or [_file_digest(path) for path in names]
            cpu = sum(usage.cpu for usage in usages)
            foreign = machine.busy_seconds() - busy - cpu - sum(usage.cpu for usage in others)
            return Measure(
                size=size,
                seconds=(span[1] - span[0]) / 1e9,
                cpu=cpu,
                rss_kib=max(map(int, sizes.read().split())),
                elapsed=(ended - started) / 1e9,
                foreign=max(0.0, foreign),
            )

    def _receivers(
        self,
        stack: contextlib.ExitStack,
        names: tuple[Path, ...],
        hashes: list[_Digest],
        report: IO[bytes],
        fetched: list[str],
    ) -> Process:
        """One process for all receivers: the fewest wake-ups and switches, the same for everyone. `fetched`: the port
        of a contender that serves, and what it is asked for."""
        how = ",".join(str(one.write_end) for one in hashes) or self.cell.receivers
        ends = {
            "fifo": ["fifo", str(self.cell.pipe), *map(str, names)],
            "unix": ["unix", *map(str, names)],
            "tcp": ["tcp", str(self.cell.sinks)],
        }[self.cell.sink]
        process = Process(
            [str(self.load), *(["fetch", how, *fetched] if fetched else ["receive", how, *ends])],
            cpus=self._load_cpus,
            stdout=subprocess.PIPE,
            stderr=report,
            pass_fds=tuple(one.write_end for one in hashes),
        )
        stack.callback(process.kill)
        for one in hashes:
            one.begin()
        return process

    def _start(
        self,
        stack: contextlib.ExitStack,
        parts: list[Part],
        first: int,
        complaints: IO[bytes],
        sizes: IO[bytes],
    ) -> list[Process]:
        """Starts a pipeline that reads `first` (-1: nothing); `sizes` gets what the keepers report."""
        processes = []
        with contextlib.ExitStack() as ends:
            upstream = first
            for number, part in enumerate(parts):
                stdin, stdout, downstream = upstream, -1, -1
                if part.stdin is not None:
                    stdin = os.open(part.stdin, os.O_RDONLY)
                    ends.callback(os.close, stdin)
                if part.stdout is not None:
                    stdout = os.open(part.stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                    ends.callback(os.close, stdout)
                elif number + 1 < len(parts):
                    downstream, stdout = _pipe(self.cell.pipe)
                    ends.callback(os.close, downstream)
                    ends.callback(os.close, stdout)
                process = Process(
                    kept(self.load, list(part.argv), sizes.fileno()),
                    cpus=self._contender_cpus,
                    stdin=subprocess.DEVNULL if stdin < 0 else stdin,
                    stdout=subprocess.DEVNULL if stdout < 0 else stdout,
                    stderr=complaints,
                    pass_fds=(sizes.fileno(),),
                    cwd=self.directory,
                    env=environment(),
                )
                stack.callback(process.kill)
                processes.append(process)
                upstream = downstream
        return processes

    def _feeder(
        self, stack: contextlib.ExitStack, size: int, place: Place, end: int
    ) -> tuple[Process, IO[bytes]] | None:
        if self.cell.source == "file":
            return None
        report = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        to = {"tcp": [str(place.listen)], "unix": [str(place.listen_path)], "pipe": []}[self.cell.source]
        argv = [str(self.load), self.cell.feed, str(size), str(self.cell.chunk), *to]
        stdout = subprocess.DEVNULL if end < 0 else end
        feeder = Process(argv, cpus=self._load_cpus, stdout=stdout, stderr=report)
        stack.callback(feeder.kill)
        return feeder, report


class _Digest:
    """A pipe whose bytes a thread hashes. The write end goes to a receiver; `with` closes both ends."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        self._value = ""
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Digest:
        return self

    def begin(self) -> None:
        """Closes this process's copy of the write end, so that the receiver's exit is the end, and hashes."""
        os.close(self.write_end)
        self.write_end = -1
        self._thread = threading.Thread(target=self._hash, daemon=True)
        self._thread.start()

    def _hash(self) -> None:
        with os.fdopen(self._read_end, "rb", closefd=False) as file:
            self._value = _sha256(file)

    def value(self) -> str:
        """The sha256 of the whole stream, once it has ended."""
        assert self._thread is not None
        self._thread.join(DEADLINE)
        return self._value

    def __exit__(self, *_: object) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
        if self._thread is not None:
            self._thread.join(DEADLINE)
        os.close(self._read_end)


def room(directory: Path, cell: Cell, size: int) -> None:
    """BenchmarkError if `directory` cannot hold the files of a run: sources and sinks of `size` bytes each."""
    free = shutil.disk_usage(directory).free
    files = (cell.source == "file") + (cell.sinks if cell.sink == "file" else 0)
    need = files * size + 64 * MIB
    if free < need:
        raise BenchmarkError(
            f"{directory} has {free // MIB} of {need // MIB} MiB needed: choose another --directory"
        )


def _succeeded(process: Process, usage: Usage, report: IO[bytes], command: str = "") -> str:
    """What the process wrote to `report`; BenchmarkError with its last lines if it failed."""
    report.seek(0)
    text = report.read().decode(errors="replace").strip()
    if usage.code != 0:
        command = command or " ".join(process.argv)
        tail = " / ".join(text.splitlines()[-3:]) or "it said nothing"
        raise BenchmarkError(f"exit code {usage.code} from: {command}: {tail}")
    return text


def _answer(receivers: Process, deadline: float) -> list[str]:
    """The words before `ready` in the receivers' first line: the ports, if they listen."""
    poller = select.poll()
    poller.register(receivers.stdout, select.POLLIN)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise BenchmarkError("the receivers did not get ready")
    words = receivers.stdout.readline().decode().split()
    if not words or words[-1] != "ready":
        raise BenchmarkError("the receivers ended before they were ready")
    return words[:-1]


def _pipe(capacity: int) -> tuple[int, int]:
    """A pipe of `capacity` bytes (0: the default); the caller closes both ends."""
    read_end, write_end = os.pipe()
    if capacity:
        try:
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, capacity)
        except OSError as error:
            os.close(read_end)
            os.close(write_end)
            raise BenchmarkError(f"cannot make a pipe of {capacity} bytes: {error}") from error
    return read_end, write_end


# below the ports that the kernel gives to others by chance; processes beside one another begin at different ones
_FIRST, _COUNT = 30_000, 2_752
_PORTS = itertools.cycle([_FIRST + (os.getpid() * 64 + n) % _COUNT for n in range(_COUNT)])


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago: peers do not tell which one they got for port 0.

    Without SO_REUSEADDR the probe is as strict as the strictest peer: a port whose last connection is in TIME_WAIT is
    not free. Somebody else may still be quicker: whoever starts a peer there tries another port then.
    """
    for port in itertools.islice(_PORTS, _COUNT):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise BenchmarkError("no port is free")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    """The digest of everything `file` still has."""
    digest = hashlib.sha256()
    while piece := file.read(MIB):
        digest.update(piece)
    return digest.hexdigest()
