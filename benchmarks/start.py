"""What starting costs: `python -m benchmarks.start`.

Every figure is the median of runs one after the other, round after round, the first round not counted: CPU is user
and system time of the whole process, from fork to exit; wall is until it has ended, for `serve` until it accepts a
connection. `--against DIR` runs the relay of another checkout in turn with this one, such as that of an older version.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .contender import RELAY, environment
from .table import aligned

LEAST_RUNS = 9
ROUTE = "routes: {start: {source: 'tcp://127.0.0.1:%d', sink: 'null:'}}\n"
PATIENCE = 20.0


class Cost(NamedTuple):
    """One run, in seconds."""

    cpu: float
    wall: float


def spent() -> float:
    """CPU seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ended(*argv: str) -> Callable[[dict[str, str]], Cost]:
    """A command on an empty stdin, from its start to its end."""

    def run(env: dict[str, str]) -> Cost:
        before, began = spent(), time.perf_counter()
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env=env, cwd="/", check=True)  # fmt: skip
        return Cost(spent() - before, time.perf_counter() - began)

    return run


def serving(env: dict[str, str]) -> Cost:
    """`relay serve` from its start to the first connection accepted; its CPU until it has ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(ROUTE % port)
        file.flush()
        before, began = spent(), time.perf_counter()
        argv = [*RELAY, "serve", file.name]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=env, cwd="/") as process:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                        process.kill()
                        raise SystemExit("relay serve did not get ready") from None
                    time.sleep(0.001)
            wall = time.perf_counter() - began
            process.terminate()
        return Cost(spent() - before, wall)


CASES: dict[str, Callable[[dict[str, str]], Cost]] = {
    "python alone": ended(sys.executable, "-c", "pass"),
    "relay --help": ended(*RELAY, "--help"),
    "relay run": ended(*RELAY, "run", "-", "--to", "null:"),
    "relay send": ended(*RELAY, "send", "--to", "null:"),
    "relay check": ended(*RELAY, "check"),
    "relay serve, ready": serving,
}
GOALS = {"relay --help": 150, "relay serve, ready": 350}  # milliseconds


def measured(runs: int, places: dict[str, dict[str, str]]) -> dict[tuple[str, str], list[Cost]]:
    """`runs` of each case in each checkout, by its environment, in turn."""
    costs: dict[tuple[str, str], list[Cost]] = {}
    for turn in range(runs + 1):
        for case, run in CASES.items():
            for place, env in places.items():
                cost = run(env)
                if turn:
                    costs.setdefault((case, place), []).append(cost)
    return costs


def table(runs: int) -> str:
    """A row a case, for a page."""
    rows = []
    for (case, _place), found in measured(runs, {"this": environment()}).items():
        cpu, wall = ([1000 * value for value in values] for values in zip(*found, strict=True))
        spread = f"{median(wall):.0f} ({min(wall):.0f} to {max(wall):.0f})"
        goal = GOALS.get(case)
        met = "" if goal is None else f"{goal} ms: {'met' if round(median(wall)) <= goal else 'missed'}"
        command, *what = case.split(", ")
        rows.append(
            [
                ", ".join([f"`{command}`" if command.startswith("relay") else command, *what]),
                f"{median(cpu):.0f}",
                spread,
                met,
            ]
        )
    return "\n".join(aligned(["started", "CPU ms", "wall ms (min to max)", "goal"], rows))


def main() -> int:
    """Measures and prints a line a case and checkout."""
    parser = argparse.ArgumentParser("python -m benchmarks.start", description="what starting costs")
    parser.add_argument(
        "--runs", type=int, default=LEAST_RUNS, help=f"timed runs each (default: {LEAST_RUNS})"
    )
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="a checkout, with its C core built, to run in turn"
    )
    options = parser.parse_args()
    places = {"this": environment()}
    if options.against is not None:
        places["against"] = {**environment(), "PYTHONPATH": str(options.against.resolve())}
    costs = measured(options.runs, places)
    print(f"{'':22}{'':9}{'CPU ms':>8}{'wall ms':>9}   medians of {options.runs} runs, {os.cpu_count()} CPUs")
    for (case, place), found in costs.items():
        cpu, wall = (1000 * median(values) for values in zip(*found, strict=True))
        print(f"{case:22}{place if len(places) > 1 else '':9}{cpu:8.1f}{wall:9.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
