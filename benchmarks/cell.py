"""What is measured: one cell is one job under one set of circumstances, run by every contender for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from . import contender
from .contender import MBUFFER, NC, NCAT, NGINX, PV, SOCAT, TEE, Contender, Tool

MIB = 1 << 20
GIB = 1 << 30

# What each pipe of a cell is set to, the ones inside a peer's pipeline included. 1 MiB is what the default
# pipe-max-size allows an unprivileged user; 0 leaves the system's default (64 KiB).
LARGE_PIPE = MIB


@dataclass(frozen=True)
class Goal:
    """The most CPU and the least GiB/s that relay is to have, as fractions of the best peers'; set for these tools."""

    cpu: float
    speed: float
    tools: tuple[Tool, ...]

    def concerns(self, one: Contender) -> bool:
        """Whether it was set beside that peer: all of its tools but the shell are among them."""
        return not one.is_relay and set(one.tools) <= {*self.tools, contender.BASH}


@dataclass(frozen=True)
class Cell:
    """One table: from where (`file`, `tcp`, `unix`, `pipe`), to where (`tcp`, `unix`, `fifo`, `file`), how many times.

    `size` is bytes of the source stream, so many that starting up is a small part of what they cost, and is fed in
    writes of `chunk`, or (`feed` is `lend`) by lending pages to the pipe. `receivers` drop bytes in the kernel
    (`discard`) or copy them (`read`). `target` bounds relay's CPU as a fraction of the named peer's, `goal`
    says what relay is to reach.
    """

    name: str
    title: str
    source: str
    sink: str
    sinks: int
    size: int
    contenders: tuple[Contender, ...]
    pinned: bool = True
    pipe: int = LARGE_PIPE
    receivers: str = "discard"
    target: tuple[str, float] | None = None
    chunk: int = MIB
    goal: Goal | None = None
    feed: str = "feed"


_BASE = (
    Cell(
        "file-tcp",
        "File (warm page cache) to tcp",
        "file",
        "tcp",
        1,
        4 * GIB,
        contender.FILE_TCP,
        goal=Goal(0.9, 1.1, (NGINX, SOCAT, PV, NC, NCAT)),
    ),
    Cell(
        "tcp-4tcp",
        "tcp to 4 tcp",
        "tcp",
        "tcp",
        4,
        4 * GIB,
        contender.TCP_4TCP,
        goal=Goal(0.8, 1.25, (MBUFFER,)),
    ),
    Cell(
        "pipe-4pipes",
        "Pipe to 4 pipes, chunks and pipes of 1 MiB",
        "pipe",
        "fifo",
        4,
        16 * GIB,
        contender.PIPE_4PIPES,
        target=("tee", 0.2),
        goal=Goal(0.1, 8.0, (TEE, SOCAT)),
    ),
    Cell(
        "tcp-file",
        "tcp to file",
        "tcp",
        "file",
        1,
        2 * GIB,
        contender.TCP_FILE,
        goal=Goal(0.8, 1.1, (SOCAT, NC, NCAT, TEE)),
    ),
)


def one_way() -> list[Cell]:
    """The jobs of every day, in the order of the report: each pinned, its variants behind it."""
    cells = []
    for base in _BASE:
        cells.append(base)
        if base.source == "pipe":
            cells.append(lent(base))
            title = "Pipe to 4 pipes, chunks of 1 MiB, pipes of the default size"
            cells.append(
                replace(base, name=f"{base.name}-default-size", title=title, pipe=0, target=None, goal=None)
            )
            # How fast the readers are decides how often a writer must wake them: both kinds, both bound.
            title = f"{base.title}, readers that copy"
            cells.append(replace(base, name=f"{base.name}-read", title=title, receivers="read"))
        title = f"{base.title}, not pinned"
        cells.append(replace(base, name=f"{base.name}-unpinned", title=title, pinned=False, target=None))
    return cells


def lent(base: Cell) -> Cell:
    """The same with a feeder that lends its pages: it does not bound those who pass them on. Only relay and the best
    peer run: the others are further behind than without, and take minutes."""
    title = f"{base.title}, lent by their feeder"
    return replace(
        base,
        name=f"{base.name}-lent",
        title=title,
        feed="lend",
        size=3 * base.size // 2,
        contenders=base.contenders[:2],
    )


def cpus(pinned: bool) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """The CPUs of the contender and of the load: one each when pinned, else any (None)."""
    here = sorted(os.sched_getaffinity(0))
    if not pinned or len(here) < 2:
        return None, None
    return frozenset(here[:1]), frozenset(here[1:2])
