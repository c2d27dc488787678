"""One pipe of a chain, and what is done to the stream there."""

from __future__ import annotations

import dataclasses

from slots import Pipe

from model.ends import Sink
from model.ring import Ring, border


@dataclasses.dataclass(eq=False)
class Node:
    """One pipe and what is done to the stream there. Fields as in struct relay_node."""

    name: str
    pipe: Pipe
    next: Node | None = None
    into: Node | None = None
    past: bool = False  # `into` is but its sink's backlog
    stuck: int = 0
    sink: Sink | None = None
    ring: Ring | None = None
    full: bool = False
    ended: bool = False
    done: bool = False
    apart: int = 0  # a gate whose branch holds a turn's end no longer than this, taking nothing
    gate: Node | None = None  # the outermost such gate before it
    hold: bool = False  # a failed sink will be replaced: what is meant for it is kept
    owed: int = 0
    passed: int = 0
    dropped: int = 0
    rate: int = 0
    burst: int = 0
    tokens: float = 0.0
    stamp: int = 0
    skip: int = 0
    left: int = -1
    prefix: bytes = b""
    after: int = 0
    since: int = 0
    blocked: int = 0
    slow: bool = False
    dropping: bool = False
    align: int = 1
    rest: bytes = b""  # the piece that was under way when the gap began, as far as it has come
    rest_need: int = 0
    origins: list[int] = dataclasses.field(default_factory=list)  # where streams began, of passed + dropped
    tee_copies: bool = False
    out_copies: bool = False
    stash_size: int = 0
    untold: bytes = b""  # of the stash: not yet written to next
    stash: bytes = b""  # of the stash: still to go out
    history: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # what became of its bytes

    @property
    def held(self) -> int:
        """Bytes in the pipe and the stash."""
        return self.pipe.held + len(self.stash)

    @property
    def refuses(self) -> bool:
        """Whether filling it is pointless for now."""
        return self.full or bool(self.prefix)

    @property
    def keeps(self) -> bool:
        """Whether anything is still in its keeping."""
        return bool(self.held or self.prefix or self.rest or self.untold)

    def start_gap(self) -> None:
        """From now on bytes are dropped, once the piece that is under way is whole."""
        self.rest, self.rest_need = b"", self.to_border
        self.dropping = True

    def new_stream(self) -> None:
        """What comes in from now on is another stream: a piece that the one before did not finish stays as it is."""
        here = self.passed + self.dropped + self.held
        if here not in self.origins[-1:]:
            self.origins.append(here)
        self.rest_need = min(self.rest_need, len(self.rest) + self.held)

    @property
    def to_border(self) -> int:
        """Bytes until a piece is whole."""
        at = self.passed + self.dropped
        return border(self.origins, at, self.align) - at
