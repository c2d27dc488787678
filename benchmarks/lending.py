"""Pipe to pipe without looking at the bytes: lending, with huge pages or small ones and with busy or waiting ends,
beside write and read, and beside this machine's memcpy.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy

import relay

MIB = 1 << 20


def lent(total: int, *, huge: bool, busy: bool, lend: bool, piece: int = 256 << 10) -> float:
    """GB/s through one pipe: a process that lends (or writes), one that splices on to /dev/null (or reads)."""
    start, done = os.pipe(), os.pipe()
    spin = 1.0 if busy else 0.0
    pipe = relay.Pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            nowhere, left = os.open(os.devnull, os.O_WRONLY), total
            buffer = bytearray(piece)
            os.read(start[0], 1)
            while left:
                if lend:
                    left -= relay.splice(pipe, nowhere, left, busy=spin)
                else:
                    with contextlib.suppress(BlockingIOError):
                        left -= os.readv(pipe.read_fd, [buffer])
            os.write(done[1], b"x")
            code = 0
        finally:
            os._exit(code)
    content = bytes(4 * MIB)
    arena = relay.Arena(content, huge=huge)
    os.write(start[1], b"x")
    begun, left = time.perf_counter(), total
    view = memoryview(content)[:piece]
    while left:
        if lend:
            left -= relay.vmsplice(arena, pipe, busy=spin)
            arena.rewind()
        else:
            left -= relay.vmsplice(view[:left], pipe, busy=spin)
    os.read(done[0], 1)
    seconds = time.perf_counter() - begun
    os.waitpid(pid, 0)
    arena.close()
    pipe.close()
    for fd in (*start, *done):
        os.close(fd)
    return total / seconds / 1e9


def alone(total: int) -> float:
    """GB/s of one thread that lends huge pages to a pipe and splices them on to /dev/null: nobody waits."""
    nowhere, moved = os.open(os.devnull, os.O_WRONLY), 0
    with relay.Arena(bytes(4 * MIB), huge=True) as arena, relay.Pipe() as pipe:
        begun = time.perf_counter()
        while moved < total:
            count = arena.lend(pipe)
            moved += count
            while count:
                count -= pipe.splice_to(nowhere, count)
            if not arena.waiting:
                arena.rewind()
        seconds = time.perf_counter() - begun
    os.close(nowhere)
    return moved / seconds / 1e9


def memcpy(size: int, total: int) -> float:
    """GB/s of copying `size` bytes from one array into another, both warm, again and again."""
    one, two = numpy.ones(size, "u1"), numpy.ones(size, "u1")
    begun = time.perf_counter()
    for _ in range(total // size):
        two[:] = one
    return total // size * size / (time.perf_counter() - begun) / 1e9


def pipes(runs: int) -> dict[str, list[float]]:
    """GB/s of every way through a pipe, and of memcpy, in turn."""
    total = 4 << 30
    found: dict[str, list[float]] = {}
    kinds: dict[str, Callable[[], float]] = {
        "memcpy, 1 GiB arrays": lambda: memcpy(1 << 30, 2 << 30),
        "memcpy, 64 MiB arrays": lambda: memcpy(64 * MIB, 2 << 30),
        "memcpy, 1 MiB arrays": lambda: memcpy(MIB, 2 << 30),
        "write and read, busy ends": lambda: lent(total // 2, huge=False, busy=True, lend=False),
        "lent, small pages, waiting ends": lambda: lent(total, huge=False, busy=False, lend=True),
        "lent, small pages, busy ends": lambda: lent(2 * total, huge=False, busy=True, lend=True),
        "lent, huge pages, waiting ends": lambda: lent(2 * total, huge=True, busy=False, lend=True),
        "lent, huge pages, both ends on one thread": lambda: alone(4 * total),
        "lent, huge pages, busy ends": lambda: lent(4 * total, huge=True, busy=True, lend=True),
    }
    for number in range(runs):
        for name, kind in kinds.items():
            found.setdefault(name, []).append(kind())
        print(f"pipe: round {number + 1} of {runs}", file=sys.stderr)
    return found


def pipe_table(found: dict[str, list[float]]) -> str:
    """Markdown: GB/s of each way."""
    lines = [
        "### Pipe to pipe, one pipe of 1 MiB (`pipe`)\n",
        "| way | GB/s (min to max) | times memcpy of the same round |",
        "|---|---:|---:|",
    ]
    copied = next(iter(found.values()))
    for name, rates in found.items():
        times = statistics.median(rate / other for rate, other in zip(rates, copied, strict=True))
        shown = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        lines.append(f"| {name} | {shown} | {times:.1f} |")
    return "\n".join(lines) + "\n"
