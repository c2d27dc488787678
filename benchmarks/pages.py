"""Where the time of one share goes: each step of a memfd's life alone, with pages as the system gives them unasked and
with huge ones that are asked for.
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy

from relay.kernel import memfd

SIZE = 64 << 20
KINDS = ("unasked", "asked for")

COPIED = "sender: pages, and the array copied into them"
MADE = "sender, in place instead: pages, cleared, to make the array in"
SWAPPED = "sender, in place: its mapping exchanged for its own copy on write"
SEALED = "sender: sealed"
LOOKED = "receiver: mapped, a value of each page read"
UNMAPPED = "receiver: unmapped"
FREED = "the last one: freed"
MEMCPY = "for comparison: memcpy into an array that is there"
SHARED = "**`share` of an array of the heap, together**"
PLACED = "**`share` in place, its making not included, together**"
ROWS = (COPIED, MADE, SWAPPED, SEALED, LOOKED, UNMAPPED, FREED, SHARED, PLACED, MEMCPY)


class Clock:
    """Milliseconds of named steps, each from the end of the step before."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        """What was done since the last step is in none."""
        self._last = time.perf_counter()

    def step(self, name: str) -> None:
        """The step ends."""
        now = time.perf_counter()
        self.steps[name] = 1e3 * (now - self._last)
        self._last = now


def life(source: numpy.ndarray, *, asked: bool) -> dict[str, float]:
    """Milliseconds of each step."""
    clock, flat = Clock(), memoryview(source).cast("B")
    fd = memfd.make("relay-benchmark")
    clock.start()
    if asked:
        memfd.fill(fd, flat)
    else:
        os.pwrite(fd, flat, 0)
    clock.step(COPIED)
    os.close(fd)

    fd = memfd.make("relay-benchmark")
    os.ftruncate(fd, SIZE)
    mine = memfd.aligned(lambda: memfd.private(SIZE))
    memfd.place(mine, fd, writable=True)
    clock.start()
    if asked:
        memfd.enlarge(mine, fd)
    mine.madvise(memfd.POPULATE_WRITE)
    clock.step(MADE)
    memfd.copy(mine, flat)
    clock.start()
    memfd.place(mine, fd, own=True)
    clock.step(SWAPPED)
    memfd.seal(fd, memfd.FINAL)
    clock.step(SEALED)
    theirs = memfd.aligned(lambda: memfd.private(SIZE))
    memfd.place(theirs, fd)
    looked = float(numpy.frombuffer(theirs)[:: mmap.PAGESIZE // 8].sum())
    clock.step(LOOKED)
    theirs.close()
    clock.step(UNMAPPED)
    mine.close()
    clock.start()
    os.close(fd)
    clock.step(FREED)
    if looked != SIZE / mmap.PAGESIZE:
        raise SystemExit(f"pages: a sum is {looked}, not {SIZE / mmap.PAGESIZE}")
    there = numpy.zeros(SIZE // 8)
    clock.start()
    there[:] = source
    clock.step(MEMCPY)
    after = sum(clock.steps[name] for name in (SEALED, LOOKED, UNMAPPED, FREED))
    return {**clock.steps, SHARED: clock.steps[COPIED] + after, PLACED: clock.steps[SWAPPED] + after}


def steps(runs: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every step, for both kinds of pages in turn, after a round that is not counted."""
    source = numpy.ones(SIZE // 8)
    found: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in ROWS} for kind in KINDS}
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "unasked": lambda: life(source, asked=False),
        "asked for": lambda: life(source, asked=True),
    }
    for number in range(runs + 1):
        for kind, way in ways.items():
            for name, value in way().items():
                if number:
                    found[kind][name].append(value)
    print(f"pages: {runs} rounds", file=sys.stderr)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: milliseconds of each step."""
    lines = [
        f"### The life of 64 MiB of memory, step by step (`pages`, `shmem_enabled` is `{memfd.huge_pages()}`)\n",
        "| step, ms (min to max) | pages as the system gives them unasked | huge pages, asked for |",
        "|---|---:|---:|",
    ]
    for name in ROWS:
        cells = [found[kind][name] for kind in KINDS]
        shown = [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
