"""What a sweep knows, and what it does the same way in a chain as with a ring."""

from __future__ import annotations

from model.ends import Sink, Source
from model.node import Node
from model.ring import Ring

PIECE = 1 << 20  # most bytes asked for in one call
GIVEN = 16 << 20  # bytes to the readers of rings in one sweep
SMALL = 64 << 10  # bytes: what fills no pipe
EPIPE = 32

Event = tuple[str, str, int]  # what, the name of the node, sink or pipeline, errno


class Sweep:
    """A pipeline's nodes in sweep order (a node before all that it fills), its source, and the sweep under way."""

    def __init__(self, nodes: list[Node], source: Source | None, *, budget: int, scratch: int) -> None:
        self.nodes = nodes
        self.source = source
        self.budget, self.scratch = budget, scratch
        self.source_ended = self.keep = self.tell_idle = self.done = False
        self.ring: Ring | None = None  # scatter
        self.still = 0
        self.pipes = False  # the ends are told to be pipes of others
        self.idle = 0  # since when all but what is apart is empty
        self.wake = 0
        self.now = 0
        self.calls = 0
        self._read = self._given = 0
        self._events: list[Event] = []

    def _tell(self, what: str, name: str, error: int = 0) -> None:
        self._events.append((what, name, error))

    def _wake_at(self, when: int) -> None:
        self.wake = min(self.wake or when, when)

    def _over(self) -> bool:
        self.source_ended = True
        if not self.keep:
            self.nodes[0].ended = True
        self._tell("SOURCE_ENDED", "pipeline")
        return True

    def _source_gives(self) -> bool:
        head, source = self.nodes[0], self.source
        if not source or self.source_ended or self.still or head.ended or head.refuses:
            return False
        return source.readable

    def _nothing_came(self, source: Source) -> bool:
        """A read gave no byte: its end, or there is nothing until the next edge."""
        if source.pipe.ended:
            return self._over()
        source.readable = False
        return False

    def _source_took(self, source: Source, moved: int) -> None:
        source.moved += moved
        if moved and self.pipes and not source.pipe.segments and not source.pipe.ended:
            source.readable = False  # poll says so, and an edge will tell

    def _sink_took(self, sink: Sink, moved: int) -> None:
        sink.moved += moved
        sink.last = self.now if moved else sink.last
        if self.pipes and moved >= SMALL and sink.pipe and sink.pipe.full:
            sink.writable = False

    def _take(self, node: Node, size: int) -> bytes:
        """Bytes out of the node, to be let go or kept aside."""
        if node.stash:
            data, node.stash = node.stash[:size], node.stash[size:]
        else:
            data = node.pipe.read(size)
            self.calls += 1
        return data
