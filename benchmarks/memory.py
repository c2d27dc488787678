"""Memory from process to process: relay beside sockets, multiprocessing, pyzmq and shared memory by hand.

    python -m benchmarks.memory [--runs 5] [--only array] [--json FILE] [--page FILE]

`array`   a 64 MiB array, one at a time, from before it is handed over until the other process has read a value of each
          page, let go of it and said so. Ways that say "in place" have it computed where it is handed over, the others
          find it on the heap; neither the computing nor the memory it is computed into is in the figures
`made`    the same with both in the figures
`blocks`  a steady stream of 1 MiB blocks
`pipe`    pipe to pipe, without looking at the bytes: lending, with huge pages or small ones and with busy or
          waiting ends, beside write and read, and beside this machine's memcpy
`pages`   the steps of a share alone, with small pages and with huge ones

Each way has a sender and a receiver, two processes. All ways of a cell run in turn, round after round; the table has
medians, and the CPU of both processes together. Every array's sum is checked. pyzmq is left out where it is missing.
`--page FILE` puts each table into a page, between `<!-- table: NAME -->` and `<!-- /table -->`.
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

from . import lending, machine, pages
from .across import MIB, ways
from .table import put

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
CELLS = [*TITLES, "pipe", "pages"]


BEST = ("relay.share, in place", "relay.ShareSink.slot, in place")


def table(cell: str, results: list[Result], size: int) -> str:
    """Markdown: milliseconds, GB/s and CPU of each way, and how many times faster relay's ways in place are."""
    best = [one for name in BEST for one in results if one.name == name]
    columns = "".join(f" `{one.name.split(',')[0]}` in place is faster by |" for one in best)
    lines = [
        f"### {TITLES[cell]} (`{cell}`)\n",
        f"| way | ms (min to max) | GB/s | CPU ms, both processes |{columns}",
        "|---|---:|---:|---:|" + "---:|" * len(best),
    ]
    for one in results:
        name = f"**{one.name}**" if one.ours else one.name
        ms = [1e3 * value for value in (one.median, min(one.seconds), max(one.seconds))]
        used = 1e3 * statistics.median(one.cpu)
        by = "".join(" |" if one.ours else f" {one.median / other.median:.1f} |" for other in best)
        lines.append(
            f"| {name} | {ms[0]:.3f} ({ms[1]:.3f} to {ms[2]:.3f}) | {size / one.median / 1e9:.2f} | {used:.3f} |{by}"
        )
    return "\n".join(lines) + "\n"


def measured(cell: str, runs: int) -> tuple[str, Any]:
    """The table of `cell`, and its figures."""
    if cell == "pipe":
        rates = lending.pipes(runs)
        return lending.pipe_table(rates), rates
    if cell == "pages":
        steps = pages.steps(runs)
        return pages.table(steps), steps
    size, count = (BLOCK, 1000) if cell == "blocks" else (ARRAY, 5)
    results = measure(cell, runs, size, count)
    return table(cell, results, size), {one.name: {"seconds": one.seconds, "cpu": one.cpu} for one in results}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds that count")
    parser.add_argument("--only", choices=CELLS, action="append", help="a cell; may be repeated")
    parser.add_argument("--json", type=Path, help="every round's figures go here as well")
    parser.add_argument("--page", type=Path, help="a page of Markdown that the tables are put into as well")
    given = parser.parse_args()
    here = machine.description(Path(tempfile.gettempdir()))
    line = f"Machine: {machine.line(here)} Medians of {given.runs} rounds in turn.\n"
    print(line)
    if given.page:
        given.page.write_text(put(given.page.read_text(), "machine", line))
    figures: dict[str, Any] = {"machine": here}
    for cell in given.only or CELLS:
        text, figures[cell] = measured(cell, given.runs)
        print(text)
        if given.page:
            given.page.write_text(put(given.page.read_text(), cell, text))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
