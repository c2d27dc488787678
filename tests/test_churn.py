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


@pytest.mark.timeout(180 if FULL else 60)
@pytest.mark.parametrize("method", ["auto", "copy"])
def test_churn_leaves_nothing_behind(tmp_path: Path, method: str) -> None:
    """Connections that come, send, stall and go in every way for a while: descriptors, pipes and RSS are as before."""
    seconds, generator = (60.0 if FULL else 3.0), random.Random(3)
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
        before = warm = footprint(served)
        began = time.monotonic()
        open_now: list[socket.socket] = []
        while (now := time.monotonic()) < began + seconds:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    sock = connect(served)
                    sock.sendall(b"x" * generator.choice((0, 1, 1000, 200_000)))
                    open_now.append(sock)
                if len(open_now) > 30:
                    leaving = open_now.pop(generator.randrange(len(open_now)))
                    with contextlib.suppress(OSError):
                        reset(leaving) if generator.random() < 0.5 else leaving.close()
            for path in tmp_path.glob("x-*"):
                path.unlink(missing_ok=True)
            if now < began + seconds / 3:  # until then the heap takes its size
                warm = footprint(served)
        for sock in open_now:
            sock.close()
        eventually(lambda: footprint(served)[0] <= before[0], "descriptors are given back")
        eventually(lambda: footprint(served)[1] <= before[1], "threads have ended")
        eventually(lambda: footprint(served)[2] <= warm[2] + 8192, "memory does not grow")
        # what streams leave behind is collected soon: left to the collector's own pace it is twice that
        assert footprint(served)[2] <= before[2] + 8192
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
        assert is_in(connect(served))
        end(served)
    first, *_between, fourth, fifth = rounds
    assert {there[1] for there in rounds} == {before[1]}
    assert (first[2] - before[2]) / many < 64  # KiB a connection
    assert (
        fifth[2] - fourth[2] < 2048 + many
    )  # the queue of log lines, which nobody reads here, and the allocator
