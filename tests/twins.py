"""What a pipeline is made of, twice: as the C core's struct over real pipes, and as its model."""

from __future__ import annotations

import dataclasses
from typing import Any

from descriptors import PipeEnds
from model import Node, Sink
from model import Reader as ModelReader
from syscalls import Memory

from relay.kernel.ring import Reader
from relay.pipeline.place import Place


@dataclasses.dataclass(frozen=True)
class Spec:
    """One step. `kind`: "plain" moves on, "tee" has a sink of its own, "gate" a branch of one node."""

    kind: str = "tee"
    slots: int = 16
    leaf_slots: int = 16
    sink_slots: int = 16
    tee_copies: bool = False
    out_copies: bool = False
    stash: int = 8192
    rate: int = 0
    skip: int = 0
    left: int = -1
    prefix: int = 0  # bytes
    after: int = 0  # nanoseconds; 0: never dropping
    align: int = 1
    null: bool = False  # its sink is /dev/null
    hold: bool = False  # a sink that fails is replaced
    past: bool = False  # a gate's branch is but its sink's backlog, passed by while it is empty
    apart: int = 0  # nanoseconds for which its sink, taking nothing, holds a turn's end
    ring: int = 0  # of the tail: a broadcast whose readers are full when they are so many bytes behind
    reserve: int = 0  # its memory beyond that
    keep: int = 0  # bytes that whoever joins it is given of what passed


@dataclasses.dataclass(frozen=True)
class Scatter:
    """The ring through which a pipeline of tees and gates may cross: fields as in struct relay_ring."""

    full: int = 20000
    reserve: int = 4096
    batch: int = 0
    hold: int = 1_000_000
    quick: int = 1
    least: int = 1


@dataclasses.dataclass(eq=False)
class Step:
    """One node, twice: its struct with its pipe, and its model."""

    c: Any
    ends: PipeEnds
    model: Node
    spec: Spec
    prefix: bytes = b""
    memory: Memory | None = None
    stash: Any = None

    def later(self, nanoseconds: int) -> None:
        """All that it remembers is that much longer ago."""
        c, model = self.c, self.model
        if c.stamp_ns:
            c.stamp_ns -= nanoseconds
            model.stamp -= nanoseconds
        if c.since_ns:
            c.since_ns -= nanoseconds
            model.since -= nanoseconds
        if c.stuck_ns:
            c.stuck_ns -= nanoseconds
            model.stuck -= nanoseconds


@dataclasses.dataclass(eq=False)
class Outlet:
    """One sink, twice: its struct with the pipe it writes to, and its model; `got` is what was read."""

    c: Any
    ends: PipeEnds | None
    model: Sink
    step: Step
    gate: Step
    got: bytearray = dataclasses.field(default_factory=bytearray)
    second: bool = False  # it stands where another failed
    reader: tuple[Reader, ModelReader] | None = None  # it is a subscriber of the tail's broadcast
    began: int = 0  # position of a subscriber's first byte
    alive: bool = True
    place: tuple[Place, ModelReader] | None = None  # while the pipeline's bytes come out of a ring

    def later(self, nanoseconds: int) -> None:
        """All that it and its reader remember is that much longer ago."""
        if self.c.last_ns:
            self.c.last_ns -= nanoseconds
            self.model.last -= nanoseconds
        for reader in (self.reader, self.place):
            if reader and reader[1].since:
                reader[0].c.since_ns -= nanoseconds
                reader[1].since -= nanoseconds
