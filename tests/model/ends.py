"""The ends of a pipeline: where its bytes enter and where they leave."""

from __future__ import annotations

import dataclasses

from slots import Pipe


@dataclasses.dataclass(eq=False)
class Source:
    """Where bytes enter: a pipe that somebody else writes to."""

    pipe: Pipe
    copies: bool = False
    readable: bool = False
    moved: int = 0


@dataclasses.dataclass(eq=False)
class Sink:
    """Where bytes leave: a pipe that somebody else reads from, or /dev/null (`pipe` is None)."""

    name: str
    pipe: Pipe | None
    writable: bool = False
    failed: bool = False
    moved: int = 0
    last: int = 0  # when it took its last byte
