"""Every sink gets what its policy promises while disks fill and are emptied, peers refuse, and counts come short.

The sequel of test_promises.py: files and logs on filesystems of a few MiB that somebody else fills and empties,
pipes of two pages, receivers with small buffers, a source that sends byte by byte. Needs root, to mount.
RELAY_PROMISES says how many schedules (30, some 10 s).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
from disks import small_disk
from flapping import Side, all_ended, assert_counted_gaps, assert_resumed, give, schedules
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peers import assert_same, connected, eventually, payload
from relays import Relay

import relay.kernel.pipe
import relay.log.log
import relay.log.segment
from relay.journal.record import SinkRecord
from relay.kernel.pipe import F_GETPIPE_SZ, F_SETPIPE_SZ

SCHEDULES = int(os.environ.get("RELAY_PROMISES", "30"))
ALIGN = 188
DISK = 2 << 20  # bytes of each filesystem
ROTATE = 300_000
PLENTY = 24 << 20  # bytes a stream may have

FILES = ("file", "rotated", "direct", "logged")
flapping = st.sampled_from(["spill", "drop"])
places = st.sampled_from(["files", "logs"])
sizes = st.integers(1, 1 << 20)


def smallest(fd: int, _wanted: int) -> int:
    """In place of pipe.enlarge: the two pages that a pipe gets when its user's budget is spent."""
    fcntl.fcntl(fd, F_SETPIPE_SZ, 2 * 4096)
    return fcntl.fcntl(fd, F_GETPIPE_SZ)


class Shortage(RuleBasedStateMachine):
    """The route, its disks, its source, its receivers, and all that was sent. `seen` counts what schedules met."""

    seen: ClassVar[collections.Counter[str]] = collections.Counter()

    @initialize(
        seed=st.integers(0, 1 << 20),
        reserve=st.sampled_from([256 << 10, -(64 << 20)]),  # found by the check; found by the write
        tiny=st.booleans(),
        buffer=st.sampled_from([4 << 10, 64 << 10]),
        first=sizes,
    )
    def begin(self, seed: int, reserve: int, tiny: bool, buffer: int, first: int) -> None:
        """Everybody is there, every disk is empty, and something is under way."""
        self.stack = contextlib.ExitStack()
        enter = self.stack.enter_context
        place = Path(enter(tempfile.TemporaryDirectory()))
        self.disks = {name: enter(small_disk(place / name, DISK)) for name in ("files", "logs")}
        enter(mock.patch.object(relay.log.log, "RESERVE", reserve))
        enter(mock.patch.object(relay.log.segment, "SEGMENT", 256 << 10))
        if tiny:
            enter(mock.patch.object(relay.kernel.pipe, "enlarge", smallest))
        self.data = payload(seed, PLENTY)
        self.sent = 0
        self.sides = {name: Side(buffer) for name in ("block", "spill", "drop")}
        for side in self.sides.values():
            enter(side.receiver)
        files, logs = self.disks["files"], self.disks["logs"]
        spill = {"policy": "spill", "directory": str(logs / "spill"), "then": "block"}
        drop = {
            "policy": "spill",
            "directory": str(logs / "drop"),
            "then": "drop",
            "after": "1ms",
            "align": ALIGN,
        }
        to = {name: {"connect": side.receiver.address} for name, side in self.sides.items()}
        tees = [
            {"name": "file", "to": {"file": str(files / "file-{id}")}},
            {"name": "rotated", "to": {"file": str(files / "rotated-{id}"), "rotate": {"size": ROTATE}}},
            {"name": "direct", "to": {"file": str(files / "direct-{id}"), "direct": True}},
            {"name": "logged", "to": {"file": str(files / "logged-{id}")}, "on_slow": "spill"},
            {"name": "spill", "to": to["spill"], "on_slow": spill},
            {"name": "drop", "to": to["drop"], "on_slow": drop},
        ]
        source = {"listen": "tcp://127.0.0.1:0"}
        self.relay = Relay({"source": source, "stages": [{"tee": tee} for tee in tees], "sink": to["block"]})
        enter(self.relay)
        self.source = enter(connected(self.relay.bound[-1]))
        self.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.source.setblocking(False)
        eventually(lambda: all(side.here() for side in self.sides.values()), "all are connected")
        self.send(first)

    @rule(size=sizes)
    def send(self, size: int) -> None:
        """The source gives what relay takes of so many bytes."""
        self.sent = give(self.source, self.data, self.sent, self.sent + size, size)

    @rule(count=st.integers(1, 300), piece=st.integers(1, 3))
    def dribble(self, count: int, piece: int) -> None:
        """The source gives a byte or three at a time."""
        self.sent = give(self.source, self.data, self.sent, self.sent + count * piece, piece)

    @rule(name=st.sampled_from(["block", "spill", "drop"]), size=sizes)
    def read(self, name: str, size: int) -> None:
        """A receiver takes what is there; all others stall meanwhile."""
        self.sides[name].take(size)

    @rule(name=flapping)
    def reset(self, name: str) -> None:
        """A receiver resets its connection and goes on listening."""
        self.sides[name].reset()

    @rule(name=flapping)
    def go(self, name: str) -> None:
        """A receiver goes: its connection is reset and new ones are refused."""
        self.sides[name].go()

    @rule(name=flapping)
    def come(self, name: str) -> None:
        """It is back."""
        self.sides[name].come()

    @rule(name=places, leave=st.sampled_from([0, 4096, 200_000]))
    def fill(self, name: str, leave: int) -> None:
        """Somebody else's bytes fill a disk, up to the last page or almost."""
        free = os.statvfs(self.disks[name])
        size = max(0, free.f_bavail * free.f_frsize - leave)
        with (self.disks[name] / "ballast").open("ab", buffering=0) as ballast:
            while size > 0:
                try:
                    size -= ballast.write(bytes(min(size, 1 << 16)))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return

    @precondition(lambda self: any((disk / "ballast").exists() for disk in self.disks.values()))
    @rule(name=places)
    def empty(self, name: str) -> None:
        """They are deleted."""
        (self.disks[name] / "ballast").unlink(missing_ok=True)

    def teardown(self) -> None:
        """The logs' disk is emptied and everybody reads to the end; then each has what it was promised."""
        if not hasattr(self, "relay"):
            return
        with self.stack:
            for name in self.sides:
                self.come(name)
            self.empty("logs")
            self.source.shutdown(socket.SHUT_WR)
            eventually(lambda: all_ended(self.sides.values()), "every receiver has its end", patience=40)
            record = self.relay.wait()
            assert record is not None
            sinks = {sink.sink: sink for sink in record.sinks[:-1]}
            stream = self.data[: self.sent]
            assert record.bytes == self.sent
            for name in FILES:
                self._file(sinks[name], stream)
        assert_same(bytes(self.sides["block"].pieces[0]), stream)
        assert record.sinks[-1].result == "delivered"
        spill, drop = sinks["spill"], sinks["drop"]
        assert_resumed(self.sides["spill"], stream)
        assert (spill.result, spill.bytes, spill.lost, spill.dropped) == ("delivered", self.sent, 0, 0)
        assert drop.bytes + drop.dropped == self.sent
        if not self.sides["drop"].unread:
            assert_counted_gaps(bytes(self.sides["drop"].pieces[0]), stream, drop.dropped, ALIGN)
        self.seen.update(
            {
                "files that failed": sum(sinks[name].result == "failed" for name in FILES),
                "files that are whole": sum(sinks[name].result == "delivered" for name in FILES),
                "logs that were full": bool(spill.blocked_seconds),
                "logs that dropped": bool(drop.dropped),
                "connections that broke": spill.reconnects + drop.reconnects,
            }
        )
        broken = any(sinks[name].result == "failed" for name in FILES)
        assert record.result == ("partial" if broken else "delivered")

    def _file(self, said: SinkRecord, stream: bytes) -> None:
        """A file is whole, or what was written before its disk was full stays and was counted."""
        place = self.disks["files"]
        if said.sink == "rotated":
            names = [path for path in place.glob("rotated-*") if path.suffix != ".part"]
            numbered = sorted(names, key=lambda path: (len(path.name), path.name))
            files = [*numbered, *place.glob("rotated-*.part")]
            assert all(file.stat().st_size == ROTATE for file in files[:-1])
        else:
            files = list(place.glob(f"{said.sink}-*"))
        written = b"".join(file.read_bytes() for file in files)
        assert_same(written, stream[: len(written)])
        if said.result == "failed":
            assert "ENOSPC" in said.reason, said.reason
            assert said.bytes - said.lost == len(written), said
        else:
            assert len(written) == said.bytes == self.sent
            assert not any(file.suffix == ".part" for file in files)


def test_every_sink_gets_what_its_policy_promises_when_room_is_short() -> None:
    """Files whole or an exact, counted beginning; everything through a log whose disk was full for a while, at most
    one send queue twice, or aligned, counted gaps; identical for who was never away."""
    if os.geteuid():
        pytest.skip("mounting a small filesystem needs root")
    run_state_machine_as_test(Shortage, settings=schedules(SCHEDULES))
    assert SCHEDULES < 60 or all(Shortage.seen.values()), (
        f"the schedules did not meet it all: {Shortage.seen}"
    )
