"""The property above all: whatever the receivers do, each sink's bytes are what its policy promises.

One route with a sink of every policy, on an engine at work; hypothesis chooses who reads, stalls, resets, goes,
comes back, joins and leaves, and when. RELAY_PROMISES says how many schedules (12, some 30 s).
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path

from flapping import BUFFER, Side, all_ended, assert_counted_gaps, assert_resumed, give, schedules
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

SCHEDULES = int(os.environ.get("RELAY_PROMISES", "12"))
ALIGN = 188

steady = st.sampled_from(["block", "drop", "buffered"])
flapping = st.sampled_from(["memory", "disk", "full"])
sizes = st.integers(1, 3 << 20)


class Schedule(RuleBasedStateMachine):
    """The route, its source, its receivers, and all that was sent."""

    @initialize(seed=st.integers(0, 1 << 20))
    def begin(self, seed: int) -> None:
        """Everybody is there."""
        self.stack = contextlib.ExitStack()
        place = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.data = payload(seed, 64 << 20)
        self.sent = 0
        kinds = ("block", "drop", "buffered", "memory", "disk", "full")
        self.sides = {name: Side() for name in kinds}
        for side in self.sides.values():
            self.stack.enter_context(side.receiver)
        drop = {"policy": "drop", "after": "20ms", "align": ALIGN}
        slow = {
            "block": {"policy": "block"},
            "drop": drop,
            "buffered": {**drop, "buffer": "2MiB"},
            "memory": {"policy": "spill"},
            "disk": {"policy": "spill", "directory": str(place / "spill")},
            "full": {"policy": "spill", "max": "256KiB", "then": "drop", "after": "20ms", "align": ALIGN},
        }
        tees = [
            {
                "tee": {
                    "name": name,
                    "to": {"connect": self.sides[name].receiver.address},
                    "on_slow": slow[name],
                }
            }
            for name in kinds
        ]
        sink = {"listen": "tcp://127.0.0.1:0", "on_slow": {"policy": "disconnect", "after": "60s"}}
        self.relay = Relay({"source": {"listen": "tcp://127.0.0.1:0"}, "stages": tees, "sink": sink})
        self.stack.enter_context(self.relay)
        self.source = self.stack.enter_context(connected(self.relay.bound[-1]))
        self.source.setblocking(False)
        self.subscribers: list[tuple[socket.socket, bytearray]] = []
        self.left: list[bytes] = []
        eventually(lambda: all(side.here() for side in self.sides.values()), "all are connected")

    @rule(size=sizes)
    def send(self, size: int) -> None:
        """The source gives what relay takes of so many bytes."""
        self.sent = give(self.source, self.data, self.sent, self.sent + size, size)

    @rule(name=st.one_of(steady, flapping), size=sizes)
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

    @precondition(lambda self: len(self.subscribers) < 3)
    @rule()
    def join(self) -> None:
        """A subscriber comes; it begins with what passes from then on."""
        sock = connected(self.relay.bound[0], BUFFER)
        sock.setblocking(False)
        self.subscribers.append((sock, bytearray()))

    @precondition(lambda self: self.subscribers)
    @rule(size=sizes)
    def leave(self, size: int) -> None:
        """A subscriber goes, with what it got until then."""
        sock, got = self.subscribers.pop(0)
        with sock, contextlib.suppress(BlockingIOError):
            while size > 0 and (piece := sock.recv(size)):
                got += piece
                size -= len(piece)
        self.left.append(bytes(got))

    def teardown(self) -> None:
        """The source ends, everybody is there and reads to the end; then each has what it was promised."""
        if not hasattr(self, "relay"):
            return
        with self.stack:
            for name in self.sides:
                self.come(name)
            self.source.shutdown(socket.SHUT_WR)
            eventually(self._all_read, "every receiver has its end", patience=40)
            record = self.relay.wait()
            assert record is not None
            for sock, _ in self.subscribers:
                sock.close()
        stream = self.data[: self.sent]
        sinks = {sink.sink: sink for sink in record.sinks}
        assert record.bytes == self.sent
        assert_same(bytes(self.sides["block"].pieces[0]), stream)
        for name in ("drop", "buffered"):
            assert_counted_gaps(bytes(self.sides[name].pieces[0]), stream, sinks[name].dropped, ALIGN)
            assert sinks[name].bytes == len(self.sides[name].pieces[0])
        for name in ("memory", "disk"):
            assert_resumed(self.sides[name], stream)
            assert (sinks[name].bytes, sinks[name].lost, sinks[name].dropped) == (self.sent, 0, 0)
        full = sinks["full"]
        assert full.bytes + full.dropped == self.sent
        if not self.sides["full"].unread:
            assert_counted_gaps(bytes(self.sides["full"].pieces[0]), stream, full.dropped, ALIGN)
        for _, got in self.subscribers:
            assert stream.endswith(bytes(got)), "a subscriber that stayed has no exact suffix"
        for got in self.left:
            assert got in stream, "a subscriber that left got something else than a part of the stream"

    def _all_read(self) -> bool:
        for sock, got in self.subscribers:
            with contextlib.suppress(BlockingIOError):
                while piece := sock.recv(1 << 20):
                    got += piece
        return all_ended(self.sides.values())


def test_every_sink_gets_what_its_policy_promises() -> None:
    """Identical under block; aligned, counted gaps under drop; everything, at most one send queue twice, through a
    log; an exact suffix for a subscriber."""
    run_state_machine_as_test(Schedule, settings=schedules(SCHEDULES))
