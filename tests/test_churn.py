"""Connections that come and go in every way, and those that only stay: nothing of them is left.

RELAY_CHURN=1 runs the churn for a minute and with 5,000 idle connections instead of a few seconds and 500.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from limited import connect, is_in
from peers import eventually, reset
from relays import Process, end, serving

FULL = os.environ.get("RELAY_CHURN") == "1"


def footprint(served: Process) -> tuple[int, int, int]:
    """Descriptors, threads, and resident KiB of the process."""
    status = Path(f"/proc/{served.pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0])
    return (
        len(os.listdir(f"/proc/{served.pid}/fd")),  # noqa: PTH208 - only their number
        len(os.listdir(f"/proc/{served.pid}/task")),  # noqa: PTH208 - only their number
        resident,
    )


@pytest.fixture
def many() -> Iterator[int]:
    """How many connections at once; the limit of descriptors is raised for the test, four a connection in relay."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5000 if FULL else 500
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, (hard - 200) // 4)  # as many as the hard limit lets in
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * wanted + 200), hard))
    yield wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SPELL = 150 if FULL else 40  # hundreds of connections in one spell of churn
NOISE = 512 if FULL else 4096  # KiB by which the heap after one spell may differ from that after another


def churn(
    served: Process, files: Path, generator: random.Random, *, spells: int, seconds: float = 0.0
) -> int:
    """Hundreds of connections, `spells` times and for so many seconds at least, 30 open at a time; how many came.

    Each sends nothing, little or much, and is closed, reset, or left to the idle timeout. What `files` holds goes.
    """
    until, many = time.monotonic() + seconds, 0
    open_now: list[socket.socket] = []
    while spells > 0 or time.monotonic() < until:
        spells -= 1
        for _ in range(100):
            with contextlib.suppress(OSError):
                sock = connect(served)
                many += 1
                open_now.append(sock)
                sock.sendall(b"x" * generator.choice((0, 1, 1000, 200_000)))
            if len(open_now) > 30:
                leaving = open_now.pop(generator.randrange(len(open_now)))
                with contextlib.suppress(OSError):
                    reset(leaving) if generator.random() < 0.5 else leaving.close()
        for path in files.glob("x-*"):
            path.unlink(missing_ok=True)
    for sock in open_now:
        sock.close()
    return many


def at_rest(served: Process, before: tuple[int, int, int]) -> None:
    """Waits until its descriptors and threads are no more than they were."""
    eventually(lambda: footprint(served)[0] <= before[0], "descriptors are given back")
    eventually(lambda: footprint(served)[1] <= before[1], "threads have ended")


@pytest.mark.timeout(180 if FULL else 60)
@pytest.mark.parametrize("method", ["auto", "copy"])
def test_churn_leaves_nothing_behind(tmp_path: Path, method: str) -> None:
    """Connections that come, send, stall and go in every way: descriptors, threads and RSS return to where they were.

    RSS is compared with that after a first spell, in which the heap takes the size that so many streams at once need.
    """
    generator = random.Random(3)
    config = (
        f'routes: {{r: {{method: {method}, source: {{listen: "tcp://127.0.0.1:0",'
        " limits: {connections: 40, idle: 200ms}},"
        ' stages: [{tee: {to: {file: "x-{id}"}}}], sink: "null:"}}'
    )
    with serving(config, tmp_path) as served:
        for _ in range(20):
            assert is_in(connect(served))
        served.sessions(20)
        eventually(lambda: footprint(served)[1] <= 5, "the threads of the first files have ended")
        before = footprint(served)
        many = churn(served, tmp_path, generator, spells=SPELL)
        at_rest(served, before)
        warm = footprint(served)
        many += churn(served, tmp_path, generator, spells=SPELL, seconds=60.0 if FULL else 0.0)
        at_rest(served, before)
        print(
            f"{method}: {many} connections, KiB before {before[2]}, warm {warm[2]}, after {footprint(served)[2]}"
        )
        eventually(lambda: footprint(served)[2] <= warm[2] + NOISE, "memory is as it was")
        eventually(lambda: is_in(connect(served)), "newcomers are served")
        end(served)


@pytest.mark.timeout(180 if FULL else 60)
def test_idle_connections_cost_little(tmp_path: Path, many: int) -> None:
    """A host of connections that say nothing are all there, and when they go nothing of them is left."""
    with serving('routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: "null:"}}', tmp_path) as served:
        for _ in range(20):
            assert is_in(connect(served))
        served.sessions(20)
        before = footprint(served)
        rounds = []
        for _ in range(5):
            socks = [connect(served) for _ in range(many)]
            eventually(lambda: footprint(served)[0] >= before[0] + many, "all of them are in", patience=60.0)
            rounds.append(footprint(served))
            for sock in socks:
                sock.close()
            eventually(lambda: footprint(served)[0] <= before[0], "descriptors are given back", patience=60.0)
        crowd = rounds[-1][2] - before[2]
        if FULL:  # the memory of fewer is within the noise
            eventually(lambda: footprint(served)[2] < before[2] + crowd * 3 / 4, "and memory, soon after")
        print(f"{many} connections: KiB before {before[2]}, then {crowd} more, after {footprint(served)[2]}")
        assert is_in(connect(served))
        end(served)
    first, *_between, fourth, fifth = rounds
    assert {there[1] for there in rounds} == {before[1]}
    assert (first[2] - before[2]) / many < 64  # KiB a connection
    assert (
        fifth[2] - fourth[2] < 2048 + many
    )  # the queue of log lines, which nobody reads here, and the allocator
