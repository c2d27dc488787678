"""Broadcasts to many at once: what a crowd leaves behind, and what one of it who stalls costs the rest.

RELAY_SUBSCRIBERS sets how many there are (default 200); with 1000 it takes some seconds.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

import pytest
from peers import PATIENCE, payload
from relays import serving
from viewers import MIB, Stage, live, stalled_viewer

CROWD = int(os.environ.get("RELAY_SUBSCRIBERS", "200"))


def opened(pid: int) -> dict[str, int]:
    """How many descriptors of each kind a process has open."""
    kinds: dict[str, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while it was counted
            kind = str(entry.readlink()).split(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def resident(pid: int) -> int:
    """Bytes in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def room_for(count: int) -> None:
    """Skips where a process may not have so many descriptors."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed < count + 100:
        pytest.skip(f"{count} connections need more open files than the {allowed} allowed: ulimit -n")


def test_crowds_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    """After each crowd relay has the descriptors it had before, no pipe more ever, and no more memory in the end."""
    room_for(150)
    data = payload(9, 60 * MIB)
    with serving(live(), tmp_path) as served:
        stage = Stage(served, data)
        stage.join(known=True)
        stage.send(1000)
        before = opened(served.pid)
        sizes = []
        for _ in range(6):
            for _ in range(150):
                stage.join(wait=False)
            stage.wait_joined()
            assert opened(served.pid)["pipe"] == before["pipe"]
            assert opened(served.pid)["socket"] == before["socket"] + 150
            stage.send(stage.sent + 100_000)
            for number, viewer in enumerate(stage.viewers[1:]):
                stage.leave(viewer, reset=number % 2 == 0)
            stage.send(stage.sent + 1000)  # what is closed is found out by sending to it
            gone = stage.joined - 1

            def all_left(count: int = gone) -> bool:
                return sum("left after" in line["message"] for line in served.lines) >= count

            while not all_left():
                stage.send(stage.sent + 1000)
                served._read(PATIENCE)
            assert opened(served.pid) == before
            sizes.append(resident(served.pid))
        assert sizes[-1] - sizes[1] < 2 * MIB, sizes
        stage.close()


def test_a_crowd_with_one_who_stalls(tmp_path: Path) -> None:
    """Everybody of a crowd gets every byte although one of them reads nothing, and memory stays that of one ring."""
    room_for(CROWD)
    data = payload(10, 4 * MIB)
    with serving(live(), tmp_path) as served:
        stage = Stage(served, data)
        begun = time.monotonic()
        for _ in range(CROWD):
            stage.join(known=True, wait=False)
        stage.wait_joined()
        joined = time.monotonic() - begun
        empty = resident(served.pid)
        with stalled_viewer(stage):
            begun = time.monotonic()
            stage.send(len(data))
            took = time.monotonic() - begun
        kinds, grown = opened(served.pid), resident(served.pid) - empty
        print(
            f"\n{CROWD} subscribers joined in {joined:.2f} s, {len(data) / took / 1e6:.1f} MB/s each, "
            f"{CROWD * len(data) / took / 1e6:.0f} MB/s in all; {sum(kinds.values())} descriptors, "
            f"{kinds.get('pipe', 0)} of them pipes; {empty / MIB:.0f} MiB before, {grown / MIB:.0f} MiB more after"
        )
        assert not any("slow" in line["message"] for line in served.lines)
        assert grown < 24 * MIB
        stage.close()
