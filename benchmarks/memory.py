"""Memory from process to process: relay beside sockets, multiprocessing, pyzmq and shared memory by hand.

    python -m benchmarks.memory [--runs 5] [--only array] [--json FILE]

`array`   a 64 MiB array, one at a time, to a process that reads a value of each page. Ways that say "in place" have it
          computed where it is handed over, the others find it on the heap; the computing is not in the figures
`made`    the same with the computing in the figures
`blocks`  a steady stream of 1 MiB blocks
`pipe`    pipe to pipe, without looking at the bytes: lending, with huge pages or small ones and with busy or
          waiting ends, beside write and read, and beside this machine's memcpy

Each way has a sender and a receiver, two processes. All ways of a cell run in turn, round after round; the table has
medians, and the CPU of both processes together. Every array's sum is checked. pyzmq is left out where it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from . import lending, machine
from .across import MIB, ways

ARRAY = 64 * MIB
BLOCK = MIB
PAGE_STEP = 512  # float64 in a page


@dataclass
class Result:
    """Seconds and CPU seconds for each array, or for each GB, one number a round."""

    name: str
    ours: bool
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run(
    name: str, make: Callable[[], tuple[Any, Any]], cell: str, size: int, count: int
) -> tuple[float, float]:
    """Seconds and CPU seconds for each of `count` arrays, after one that is not counted."""
    near, far = make()
    answers, answer = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sums: list[float] = []
            for _ in range(count + 1):
                far.receive(lambda array: sums.append(float(array[::PAGE_STEP].sum())))
                if cell != "blocks" or len(sums) == 1:
                    answer.send(struct.pack("d", sums[-1]))
            if cell == "blocks":
                answer.sendall(struct.pack(f"{count}d", *sums[1:]))
            answer.recv(1)
            code = 0
        finally:
            os._exit(code)
    source = numpy.ones(size // 8)
    made = numpy.empty(size // 8)
    in_place = name.endswith("in place")
    expected: list[float] = []

    def one(number: int) -> None:
        number = 1 if name.endswith("before") else number
        expected.append(number * (size // 8 / PAGE_STEP))
        if in_place:
            place = near.place()
            numpy.multiply(source, number, out=place)
            del place
            if cell == "array":
                begun[0] = time.perf_counter()
            near.send_placed()
        elif cell == "array":
            source[:] = number
            begun[0] = time.perf_counter()
            near.send(source)
        else:
            # what leaves later, on a queue's thread, needs memory of its own
            target = numpy.empty(size // 8) if "Queue" in name else made
            numpy.multiply(source, number, out=target)
            near.send(target)

    def answered() -> None:
        got = struct.unpack("d", answers.recv(8, socket.MSG_WAITALL))[0]
        if got != (wanted := expected.pop(0)):
            raise SystemExit(f"{name}: an array's sum is {got}, not {wanted}")

    begun = [0.0]
    one(1)
    answered()
    seconds = 0.0
    start, used = time.perf_counter(), cpu()
    for number in range(count):
        begun[0] = time.perf_counter()
        one(2 + number % 100)
        if cell != "blocks":
            answered()
            seconds += time.perf_counter() - begun[0]
    while expected:
        answered()
    if cell == "blocks":
        seconds = time.perf_counter() - start
    answers.send(b"x")
    os.waitpid(pid, 0)
    used = cpu() - used
    if hasattr(near, "close"):
        near.close()
    answers.close()
    answer.close()
    return seconds / count, used / count


def measure(cell: str, runs: int, size: int, count: int) -> list[Result]:
    """All ways of `cell` in turn, `runs` rounds, after one that is not counted."""
    found: dict[str, Result] = {}
    for number in range(runs + 1):
        for name, ours, make in ways(cell, size):
            result = found.setdefault(name, Result(name, ours))
            seconds, used = run(name, make, cell, size, count if number else 1)
            if number:
                result.seconds.append(seconds)
                result.cpu.append(used)
        print(f"{cell}: round {number} of {runs}", file=sys.stderr)
    return list(found.values())


TITLES = {
    "array": "A 64 MiB array, one at a time, the making not included",
    "made": "A 64 MiB array made anew each time, the making included",
    "blocks": "A stream of 1 MiB blocks, each computed and sent",
}


def table(cell: str, results: list[Result], size: int) -> str:
    """Markdown: milliseconds, GB/s and CPU of each way, and how many times faster the best of relay's is."""
    best = min((one.median for one in results if one.ours), default=0.0)
    lines = [
        f"### {TITLES[cell]} (`{cell}`)\n",
        "| way | ms (min to max) | GB/s | CPU ms, both processes | relay's best is faster by |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in results:
        name = f"**{one.name}**" if one.ours else one.name
        ms = [1e3 * value for value in (one.median, min(one.seconds), max(one.seconds))]
        used = 1e3 * statistics.median(one.cpu)
        by = "" if one.ours else f"{one.median / best:.1f}"
        lines.append(
            f"| {name} | {ms[0]:.3f} ({ms[1]:.3f} to {ms[2]:.3f}) | {size / one.median / 1e9:.2f} | {used:.3f} | {by} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds that count")
    parser.add_argument("--only", choices=[*TITLES, "pipe"], action="append", help="a cell; may be repeated")
    parser.add_argument("--json", type=Path, help="every round's figures go here as well")
    given = parser.parse_args()
    cells = given.only or [*TITLES, "pipe"]
    here = machine.description(Path(tempfile.gettempdir()))
    print(f"Machine: {machine.line(here)}\n")
    figures: dict[str, Any] = {"machine": here}
    for cell in cells:
        if cell == "pipe":
            found = lending.pipes(given.runs)
            figures[cell] = found
            print(lending.pipe_table(found))
            continue
        size, count = (BLOCK, 1000) if cell == "blocks" else (ARRAY, 5)
        results = measure(cell, given.runs, size, count)
        figures[cell] = {one.name: {"seconds": one.seconds, "cpu": one.cpu} for one in results}
        print(table(cell, results, size))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
