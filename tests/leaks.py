"""What a test must give back: descriptors and child processes.

`snapshot()` before, `leaks(before)` after; conftest.py does both around every test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The descriptors (number -> target as /proc names it) and children (pid -> command) of this process."""

    descriptors: dict[int, str]
    children: dict[int, str]


def descriptors() -> dict[int, str]:
    """Every open descriptor of this process with what it points at, such as `socket:[4711]`."""
    found = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        # The descriptor that listed the folder is closed again by now.
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def children() -> dict[int, str]:
    """Every child of any thread of this process, dead ones that nobody waited for included."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            for pid in (task / "children").read_text().split():
                found[int(pid)] = command(int(pid))
    return found


def command(pid: int) -> str:
    """The command line of `pid`, or its name in brackets when it is a zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        process = Path(f"/proc/{pid}")
        words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return words or f"[{(process / 'comm').read_text().strip()}]"
    return "[gone]"


def snapshot() -> Snapshot:
    """What is open and running now."""
    return Snapshot(descriptors(), children())


def leaks(before: Snapshot, *, foreign_closes: bool = True) -> list[str]:
    """One line for each thing that differs from `before`; leaked children are killed and reaped.

    `foreign_closes` also reports descriptors that were open before and are gone or point elsewhere now:
    somebody closed a number that was no longer theirs. Turn it off where earlier failures, whose
    tracebacks keep objects alive, make that ambiguous.
    """
    after = descriptors()
    if after != before.descriptors:
        gc.collect()  # only when needed: collecting around every test would double the time of the suite
        after = descriptors()
    lines = [
        f"descriptor {fd} -> {target} was opened and not closed"
        for fd, target in sorted(after.items())
        if before.descriptors.get(fd) != target
    ]
    if foreign_closes:
        lines += [
            f"descriptor {fd} -> {target} belongs to somebody else and was closed"
            for fd, target in sorted(before.descriptors.items())
            if after.get(fd) != target
        ]
    for pid, words in sorted(children().items()):
        if pid in before.children:
            continue
        lines.append(f"child {pid} ({words}) was started and not waited for")
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return lines
