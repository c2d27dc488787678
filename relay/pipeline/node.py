"""A node: one stage's kernel pipe and what is done to the stream there."""

from __future__ import annotations

from collections.abc import Callable

from relay.endpoints.options import OnSlow
from relay.engine import Engine
from relay.kernel import core
from relay.kernel.pipe import Pipe

STASH = 256 * 1024  # bytes that a copying node takes out of its pipe at a time


class Node:
    """One stage's pipe and its struct; owns both, and the stash if the kernel refuses zero-copy there."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._engine = engine
        self.pipe = Pipe(capacity)
        self.c = core.new(
            "node",
            pipe_r=self.pipe.read_fd,
            pipe_w=self.pipe.write_fd,
            capacity=self.pipe.capacity,
            left=-1,
            align=1,
        )
        self._stash: core.Struct = None
        self.why = ""

    def hear(self, target: Callable[[int, int], None]) -> None:
        """`target(what, error)` gets this node's events."""
        self.c.token = self._engine.register(lambda what, error, _mask: target(what, error))

    def give_stash(self) -> None:
        """Memory to copy through, and behind it room for the piece that is under way when a gap begins.

        After `align` was raised it is called again, before the node has moved anything.
        """
        size = STASH + int(self.c.align)
        if self._stash is None or len(self._stash) < size:
            self._stash = core.room(size)  # most gates never have a gap
            self.c.stash, self.c.stash_size = self._stash, STASH

    def copies(self, why: str) -> None:
        """From here on bytes leave this node by hand."""
        self.why = why
        self.give_stash()
        self.c.out_copies = 1

    def close(self) -> None:
        """Closes the pipe. The node must be in no chain. Safe to call again."""
        self._engine.forget_token(self.c.token)
        self.pipe.close()
        self.c.pipe_r = self.c.pipe_w = -1
        self._stash, self.c.stash = None, core.ffi.NULL  # at once, rather than when the collector comes by


def guard(gate: Node, slow: OnSlow) -> None:
    """Puts a policy at a gate: after how long it is slow, and where gaps may begin."""
    gate.c.after_ns = max(1, int((slow.after or 0) * 1e9))
    policy = slow.then if slow.policy == "spill" else slow.policy
    if policy == "drop":
        gate.c.align = slow.align
        gate.give_stash()
