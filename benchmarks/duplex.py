"""`python -m benchmarks.duplex`: relay as a two-way proxy between tcp connections, beside HAProxy, nginx and socat.

Each contender is started anew for every run, contenders in turn. A run's CPU is what all of a contender's processes
used from when every connection was answered once to the last answer: starting up is not in it. Both ends of all
connections are one process (talk.c), which knows when each question was asked and answered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .cell import GIB, MIB, cpus
from .contender import environment
from .load import SOURCE, BenchmarkError, Process, compiled
from .proxies import METHODS, PROXIES, Proxy
from .table import aligned
from .trial import ATTEMPTS, free_port

DEADLINE = 60.0
LEFT_OVER = 90_000  # connections in TIME_WAIT: the kernel has room for some 130,000
BRIEF = 500  # milliseconds of new connections, each of which leaves two
TALK = SOURCE.with_name("talk.c")


@dataclass(frozen=True)
class Job:
    """One table. `kind` is bulk, or what talk.c does; `connections` of `size` bytes a message (bulk: bytes in all)."""

    name: str
    title: str
    kind: str
    connections: int
    size: int
    receivers: str = "discard"

    @property
    def columns(self) -> list[tuple[str, str, Callable[[float], str]]]:
        """Key, heading and how a figure is shown, the first the more the better, the others the less the better."""
        if self.kind == "bulk":
            return [("rate", "GiB/s", "{:.2f}".format), ("cpu", "CPU-s/GiB", "{:.3f}".format)]
        if self.kind == "idle":
            return [("rss", "KiB a connection", "{:.2f}".format)]
        what = "connections/s" if self.kind == "connects" else "round trips/s"
        each = "CPU us a connection" if self.kind == "connects" else "CPU us a round trip"
        times = [(key, f"{key} us", "{:.0f}".format) for key in ("p50", "p99", "p999")]
        return [("rate", what, "{:.0f}".format), ("cpu", each, "{:.1f}".format), *times]


JOBS = (
    Job("bulk", "One bulk stream", "bulk", 1, 2 * GIB),
    Job("bulk-read", "One bulk stream, a receiver that copies", "bulk", 1, 2 * GIB, "read"),
    *(
        Job(
            f"ping-{count}-{size}", f"Ping-pong of {size} B over {count} connections", "pingpong", count, size
        )
        for count in (1, 10, 100, 1000)
        for size in (64, 4096)
    ),
    Job("connects", "New connections, one question of 64 B each", "connects", 50, 64),
    Job("idle", "5,000 idle connections", "idle", 5000, 64),
)


class NotListeningError(BenchmarkError):
    """A contender ended, or was silent for too long, before anybody could connect."""


class Running:
    """A contender at work on its CPU; knows what all of its processes use."""

    def __init__(
        self, proxy: Proxy, directory: Path, listen: int, to: int, complaints: object, *, pinned: bool
    ) -> None:
        argv = proxy.start(directory, listen, to)
        self._process = Process(
            argv,
            cpus=cpus(pinned)[0],
            stderr=complaints,
            cwd=directory,
            env=environment(),  # type: ignore[arg-type]
        )
        self.pid = self._process.pid
        deadline = time.monotonic() + DEADLINE
        while not _listens(listen):
            if time.monotonic() > deadline or _over(self.pid):
                self.kill()
                raise NotListeningError(f"it does not listen: {' '.join(argv)}")
            select.select([], [], [], 0.01)

    def _processes(self, pid: int) -> Iterator[int]:
        yield pid
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    yield from self._processes(int(child))

    def cpu(self) -> float:
        """Seconds of all threads of all processes, and of those that have ended."""
        total = 0
        for pid in self._processes(self.pid):
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    total += int((task / "schedstat").read_text().split()[0])
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[13]) + int(fields[14])) * (10**9 // os.sysconf("SC_CLK_TCK"))
        return total / 1e9

    def rss(self) -> int:
        """KiB resident in all processes."""
        found = 0
        for pid in self._processes(self.pid):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                found += int(line.split()[1]) if line.startswith("VmRSS") else 0
        return found

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()


def _over(pid: int) -> bool:
    """Whether a child has ended, though nobody has waited for it yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _listens(port: int) -> bool:
    """Whether somebody listens there, without connecting: a connection would be the first of those counted."""
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    return any(wanted in line for line in Path("/proc/net/tcp").read_text().splitlines())


class Trials:
    """Runs jobs; the compiled programs and a directory are borrowed."""

    def __init__(
        self, load: Path, talk: Path, directory: Path, milliseconds: int, *, pinned: bool = True
    ) -> None:
        self._load, self._talk, self._directory, self._milliseconds = load, talk, directory, milliseconds
        self._pinned = pinned

    def run(self, job: Job, proxy: Proxy) -> dict[str, float]:
        """One run: figures by the keys of the job's columns. Raises BenchmarkError.

        Where the proxy does not come to listen, somebody may have taken its port: others are tried.
        """
        for _attempt in range(ATTEMPTS - 1):
            with contextlib.suppress(NotListeningError):
                return self._run(job, proxy)
        return self._run(job, proxy)

    def _run(self, job: Job, proxy: Proxy) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            complaints = stack.enter_context(tempfile.TemporaryFile(dir=self._directory))
            listen = free_port()
            if job.kind == "bulk":
                return self._bulk(job, proxy, listen, stack, complaints)
            if job.kind == "connects":
                _rest()
            to = free_port()
            words = [job.kind, listen, to, job.connections, job.size]
            lasts = min(self._milliseconds, BRIEF) if job.kind == "connects" else self._milliseconds
            words += [] if job.kind == "idle" else [lasts]
            talk = self._ends([str(self._talk), *map(str, words)], stack)
            _line(talk, "listening")
            running = self._proxy(proxy, listen, to, stack, complaints)
            empty = running.rss()
            _go_on(talk)
            _line(talk, "open")
            if job.kind == "idle":
                select.select([], [], [], 0.5)
                return {"rss": (running.rss() - empty) / job.connections}
            before = running.cpu()
            _go_on(talk)
            rounds, ns, *times = map(int, _line(talk, "done"))
            used = running.cpu() - before
            figures = {"rate": rounds / ns * 1e9, "cpu": used / max(1, rounds) * 1e6}
            return {**figures, **{k: t / 1e3 for k, t in zip(("p50", "p99", "p999"), times, strict=False)}}

    def _proxy(
        self, proxy: Proxy, listen: int, to: int, stack: contextlib.ExitStack, complaints: object
    ) -> Running:
        running = Running(proxy, self._directory, listen, to, complaints, pinned=self._pinned)
        stack.callback(running.kill)
        return running

    def _ends(self, argv: list[str], stack: contextlib.ExitStack) -> subprocess.Popen[str]:
        load = cpus(self._pinned)[1]
        pin = ["taskset", "-c", ",".join(map(str, load))] if load else []
        ends = subprocess.Popen([*pin, *argv], stdin=-1, stdout=-1, stderr=subprocess.STDOUT, text=True)
        stack.enter_context(ends)
        stack.callback(ends.kill)
        return ends

    def _bulk(
        self, job: Job, proxy: Proxy, listen: int, stack: contextlib.ExitStack, complaints: object
    ) -> dict[str, float]:
        receiver = self._ends([str(self._load), "receive", job.receivers, "tcp", "1"], stack)
        to = int(_line(receiver, "", "ready")[0])
        running = self._proxy(proxy, listen, to, stack, complaints)
        before = running.cpu()
        feeder = self._ends([str(self._load), "feed", str(job.size), str(MIB), str(listen)], stack)
        got, first, last = map(int, _line(receiver, "received"))
        feeder.wait(DEADLINE)
        if got != job.size:
            raise BenchmarkError(f"{proxy.name}: {got} of {job.size} bytes arrived")
        gib = job.size / GIB
        return {"rate": gib / ((last - first) / 1e9), "cpu": (running.cpu() - before) / gib}


def _rest() -> None:
    """Until the connections of runs before are forgotten (TIME_WAIT, a minute; include/net/tcp.h): where tables for
    them are full new ones fail, whoever relays them. Raises BenchmarkError."""
    deadline = time.monotonic() + 2 * DEADLINE
    while _left_over() > LEFT_OVER:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{_left_over()} connections are in TIME_WAIT: somebody else makes many")
        select.select([], [], [], 0.5)


def _left_over() -> int:
    words = Path("/proc/net/sockstat").read_text().split()
    return int(words[words.index("tw") + 1])


def _line(ends: subprocess.Popen[str], first: str, last: str = "") -> list[str]:
    """The words of the next line, which begins and ends with those given; what is between them."""
    assert ends.stdout is not None
    if not select.select([ends.stdout], [], [], DEADLINE)[0]:
        raise BenchmarkError(f"the load generator is silent: {ends.args}")
    words = ends.stdout.readline().split()
    if not words or (first and words[0] != first) or (last and words[-1] != last):
        raise BenchmarkError(f"the load generator said {' '.join(words) or 'nothing'}: {ends.args}")
    return words[1 if first else 0 : -1 if last else len(words)]


def _go_on(ends: subprocess.Popen[str]) -> None:
    assert ends.stdin is not None
    ends.stdin.write("\n")
    ends.stdin.flush()


Figures = dict[str, list[dict[str, float]]]


def report(job: Job, found: Figures, versions: dict[str, str]) -> list[str]:
    """The lines of one table: medians, least and greatest, and relay's figure by each peer's."""
    head = ["contender", *(title for _key, title, _show in job.columns), "relay by this"]
    rows = []
    for name, runs in found.items():
        row = [f"{name} ({versions[name]})" if versions.get(name) else name]
        ratios = []
        for key, _title, show in job.columns:
            values = [run[key] for run in runs]
            row.append(f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})")
            ours = statistics.median(run[key] for run in found["relay"])
            ratios.append(f"{ours / max(statistics.median(values), 1e-9):.2f}")
        rows.append([*row, "" if name == "relay" else ", ".join(ratios[:2])])
    return aligned(head, rows)


def main(arguments: list[str] | None = None) -> int:
    """Runs the jobs; 0 when every contender that is here delivered."""
    parser = argparse.ArgumentParser("python -m benchmarks.duplex", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], choices=[job.name for job in JOBS])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--milliseconds", type=int, default=2000, help="how long a run of messages lasts")
    parser.add_argument("--methods", action="store_true", help="relay by method: zero-copy too")
    parser.add_argument("--unpinned", action="store_true", help="leave all to the scheduler")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    proxies = [*PROXIES, *(METHODS if options.methods else ())]
    versions = {}
    for proxy in proxies:
        version = proxy.version()
        if version is None:
            print(f"{proxy.name} is left out: it is not installed", file=sys.stderr)
        else:
            versions[proxy.name] = version
    failed = shutil.which("taskset") is None
    parts, raw = [], {}
    with (
        compiled() as load,
        compiled(TALK) as talk,
        tempfile.TemporaryDirectory(prefix="relay-bench-") as name,
    ):
        trials = Trials(load, talk, Path(name), options.milliseconds, pinned=not options.unpinned)
        for job in JOBS:
            if options.only and job.name not in options.only:
                continue
            here = [p for p in proxies if p.name in versions and p.does(job.kind)]
            found: Figures = {proxy.name: [] for proxy in here}
            for number in range(options.runs):
                for proxy in here:
                    try:
                        found[proxy.name].append(trials.run(job, proxy))
                    except BenchmarkError as error:
                        failed = True
                        print(f"{job.name}: {proxy.name}: {error}", file=sys.stderr)
                print(f"{job.name}: round {number + 1} of {options.runs} done", file=sys.stderr)
            kept = {name: runs for name, runs in found.items() if runs}
            lines = report(job, kept, versions)
            parts.append("\n".join([f"### {job.title} (`{job.name}`)", "", *lines, ""]))
            print(parts[-1], flush=True)
            raw[job.name] = kept
        about = machine.description(Path(name))
    if options.markdown is not None:
        options.markdown.write_text(f"Machine: {machine.line(about)}\n\n" + "\n".join(parts))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": about, "versions": versions, "jobs": raw}, indent=1) + "\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
