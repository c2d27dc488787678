"""A place at a ring: where an outlet's bytes come from while its pipeline crosses by copying."""

from __future__ import annotations

from relay.kernel import core
from relay.kernel.ring import Borrower, Reader, Ring
from relay.pipeline.node import Node


class Place:
    """Reads `ring` for the sink of `node`, under the policy at `gate`; what happens to it is told to `token`.

    `borrower` is the ferry whose thread writes for it, if one does. Made and left when nothing is under way. The
    node's counters then go on as if all had come down the chain.
    """

    def __init__(
        self, ring: Ring, node: Node, gate: Node, token: int, borrower: Borrower | None = None
    ) -> None:
        self._ring = ring
        self._borrower = borrower
        self._node = node.c
        self._gate = gate.c
        self._reader = Reader(node.c.sink, 0.0, int(gate.c.align))
        self.c = self._reader.c
        self.c.token, self.c.stays, self.c.hold = token, 1, node.c.hold
        self.c.after_ns = gate.c.after_ns
        self.c.apart_ns = gate.c.apart_ns if node.c.apart == gate.c else 0
        gate.c.dropping = gate.c.rest_need = 0  # a gap that was to begin just when all had gone out
        if borrower is not None:
            self.c.ferry = borrower.c
        self._began = int(ring.c.position)
        ring.join(self._reader)

    def leave(self) -> None:
        """Its bytes come down the chain from here on."""
        dropped, came = self.dropped, int(self._ring.c.position) - self._began
        self._gate.dropped += dropped
        self._gate.passed += came - dropped
        self._gate.blocked_ns += self.blocked
        began = int(self._ring.c.position) - self._ring.origin  # so many bytes ago
        turns = self._gate.turns
        turns.origins[0], turns.count = self._gate.passed + self._gate.dropped - began, 1
        if self._node != self._gate:
            self._node.passed += came - dropped
        self._node.sink = self.c.sink
        self._ring.leave(self._reader)

    @property
    def borrower(self) -> Borrower | None:
        """The thread that writes for its sink, if it may have a part of the ring still."""
        return self._borrower if self.c.ends[0] or self.c.ends[1] else None

    @property
    def full(self) -> int:
        """Bytes by which its sink may be behind before it is full."""
        return self._ring.full

    @property
    def dropped(self) -> int:
        """Bytes that its sink was not given; those of the gap it is in, too."""
        if not self.c.sink:
            return int(self.c.dropped + self._ring.c.position - self.c.at + self.c.rest_left)
        gap = self._ring.c.position - self.c.at if self.c.dropping else 0
        return int(self.c.dropped + gap)

    @property
    def blocked(self) -> int:
        """Nanoseconds for which its sink was full."""
        return int(self.c.blocked_ns)

    @property
    def waiting(self) -> int:
        """Bytes that its sink is still to get."""
        if not self.c.sink:
            return 0
        if self.c.dropping:
            return int(self.c.rest_left)
        return int(self._ring.c.position - self.c.at + self.c.rest_left)

    @property
    def drained(self) -> bool:
        """Whether its sink was given all that it will get."""
        return bool(self.c.done)

    def put(self, sink: core.Struct) -> None:
        """That end gets the bytes; with NULL they are dropped."""
        self.c.sink = sink

    def drop(self) -> None:
        """A gap begins, behind the piece that is under way."""
        self._ring.drop(self._reader)
