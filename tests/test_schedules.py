"""Random schedules over sockets, pipes and files at once, where only what arrives can be foretold.

RELAY_EXAMPLES / 2 of them (default 120 / 2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import socket
import struct
import tempfile
import time
from pathlib import Path

from descriptors import Descriptors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from line import File, Line
from peers import PATIENCE, assert_same

from relay.engine import Engine

EXAMPLES = max(10, int(os.environ.get("RELAY_EXAMPLES", "120")) // 2)


@dataclasses.dataclass
class Receiver:
    """The far end of a sink: what it got, and whether it is still there."""

    kind: str
    sink: int | socket.socket | File
    far: int | socket.socket | None
    got: bytearray = dataclasses.field(default_factory=bytearray)
    alive: bool = True

    def read(self, size: int) -> int:
        """Reads up to `size` bytes of what has arrived."""
        data = b""
        if self.alive and self.far is not None:
            with contextlib.suppress(BlockingIOError):
                data = os.read(self.far, size) if isinstance(self.far, int) else self.far.recv(size)
        self.got += data
        return len(data)

    def kill(self, fds: Descriptors) -> None:
        """Goes away, a tcp socket by a reset."""
        if not self.alive or self.far is None:
            return
        self.alive = False
        if isinstance(self.far, int):
            fds.close(self.far)
        else:
            if self.kind == "tcp":
                self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.far.close()


def receiver(fds: Descriptors, kind: str, copy: bool, path: Path) -> Receiver:
    """A sink of that kind and its far end."""
    if kind == "tcp":
        near, far = fds.tcp_pair(receive_buffer=4096)
        return Receiver(kind, near, far)
    if kind == "unix":
        near, far = fds.unix_pair()
        return Receiver(kind, near, far)
    if kind == "pipe":
        ends = fds.pipe(4096)
        return Receiver(kind, ends.w, ends.r)
    target = fds.open(path if kind == "file" else "/dev/full", os.O_WRONLY | os.O_CREAT)
    return Receiver(kind, File(target, copy, 8192), None)


@settings(
    derandomize=True,
    database=None,
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    source_kind=st.sampled_from(["tcp", "unix", "pipe"]),
    kinds=st.lists(st.sampled_from(["tcp", "unix", "pipe", "file", "full"]), min_size=1, max_size=4),
    copy=st.booleans(),
    capacity=st.sampled_from([4096, 8192, 65536]),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["feed", "feed", "feed", "read", "read", "turn", "kill"]),
            st.integers(0, 9),
            st.sampled_from([1, 100, 5000, 60000, 300_000]),
        ),
        max_size=25,
    ),
    seed=st.integers(0, 2**32),
)
def test_everybody_gets_the_stream_whatever_the_others_do(
    source_kind: str,
    kinds: list[str],
    copy: bool,
    capacity: int,
    actions: list[tuple[str, int, int]],
    seed: int,
) -> None:
    """Receivers that stay get all of it, those that go away a beginning, and no call is made in vain."""
    stream = random.Random(seed)
    fed = bytearray()
    engine = Engine("test")
    with Descriptors() as fds, tempfile.TemporaryDirectory() as folder:
        receivers = [
            receiver(fds, kind, copy, Path(folder) / f"{number}") for number, kind in enumerate(kinds)
        ]
        feeder: socket.socket | int
        if source_kind == "pipe":
            ends = fds.pipe(16384)
            feeder, source = ends.w, ends.r
        else:
            feeder, source = fds.tcp_pair() if source_kind == "tcp" else fds.unix_pair()  # type: ignore[assignment]
        line = Line(engine, fds, source, [one.sink for one in receivers], capacity=capacity, copy=copy)
        steps = 0
        for what, which, size in actions:
            one = receivers[which % len(receivers)]
            if what == "feed":
                data = stream.randbytes(size)
                with contextlib.suppress(BlockingIOError):
                    done = os.write(feeder, data) if isinstance(feeder, int) else feeder.send(data)
                    fed += data[:done]
            elif what == "read":
                one.read(size)
            elif what == "kill":
                one.kill(fds)
            line.turn()
            steps += 1
        if isinstance(feeder, int):
            fds.close(feeder)
        else:
            feeder.close()

        deadline = time.monotonic() + PATIENCE
        while ("DONE", "pipeline", 0) not in line.events:
            took = sum(one.read(1 << 20) > 0 for one in receivers)
            line.turn(0 if took else 0.002)
            steps += 1 + took
            assert time.monotonic() < deadline, "the stream has not ended for everybody"
        line.end_ferries()
        line.close()
        loads = sum(node.passed + node.dropped for node in line.nodes) // 500
        assert engine.c.calls <= 12 * len(kinds) * (steps + 20) + loads

        failed = {who: code for what, who, code in line.events if what == "SINK_FAILED"}
        assert line.source.moved == len(fed) or len(failed) == len(receivers)
        for number, one in enumerate(receivers):
            node, who = line.nodes[number], f"sink{number}"
            assert node.held == 0
            if one.kind == "file":
                assert_same((Path(folder) / f"{number}").read_bytes(), bytes(fed))
            elif one.kind == "full":
                assert failed.get(who, errno.ENOSPC) == errno.ENOSPC
                assert all(f.c.moved == 0 for f in line.ferries if f.c.fd == one.sink.fd)
            elif one.alive:
                while one.read(1 << 20):
                    pass
                assert who not in failed
                if isinstance(one.sink, socket.socket):
                    one.sink.close()
                while one.read(1 << 20):
                    pass
                assert_same(bytes(one.got), bytes(fed))
                assert node.dropped == 0
            else:
                assert bytes(fed).startswith(one.got)
                assert failed.get(who, errno.EPIPE) in (errno.EPIPE, errno.ECONNRESET)
    engine.close()
