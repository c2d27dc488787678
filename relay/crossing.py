"""How a pipeline's bytes cross: down the chain of pipes, or through one ring of memory that its sinks read.

Theory of operation. Both ways are there for a pipeline whose stages are plain tees (`chained` says why another has
only its chain). It changes between them when nothing is under way: then the chain's pipes are empty and so is the
ring, and there is nothing to carry over but counters. A ring is there while it is used; its memory is one of few
that an engine has, and where none is free the bytes go down the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from relay.chain import Chain
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine
from relay.intake import METHODS, Intake
from relay.kernel import core
from relay.kernel.ring import SIZE, Ring
from relay.outlet import Outlet
from relay.place import Place
from relay.stages.base import StageSettings
from relay.stages.tee import Settings as Tee
from relay.ways import Choice, Ways

PLAIN = (
    "tcp",
    "unix",
    "fifo",
    "null",
    "stdio",
    "fd",
)  # ends that may be written to out of memory, without a thread
READ = ("tcp", "unix", "fifo", "file", "stdio", "fd")  # and read into it


def chained(stages: Sequence[StageSettings], sink: SinkSettings) -> str:
    """Why these stages and sinks need a chain; empty if the sinks may read one ring instead."""
    for stage in stages:
        if not isinstance(stage, Tee):
            return f"the stage '{stage.kind}' works on a chain"
        if stage.stages:
            return "a branch has stages, which work on a chain"
    for each, slow in sinks_of(stages, sink):
        if each.verb == "listen":
            return "a broadcast has a ring of its own"
        if each.sidecar:
            return "a checksum sees the bytes beside the chain"
        if slow.policy == "spill" or slow.buffer:
            return "a log is fed by a chain"
        if each.address.scheme not in PLAIN:
            return "a file is written by a thread, which is handed pipes"
        if slow.align > SIZE // 8:
            return f"pieces of {slow.align} bytes are too large for a ring"
    return ""


def sinks_of(stages: Sequence[StageSettings], sink: SinkSettings) -> Iterator[tuple[SinkSettings, OnSlow]]:
    """Every sink of a row of plain tees, with the policy in force there."""
    for stage in stages:
        if isinstance(stage, Tee):
            yield stage.to, stage.slow
    yield sink, sink.slow


class Crossing:
    """Owns a pipeline's ring while there is one. `judge(outlet, slow)` hears what becomes of an outlet there."""

    def __init__(
        self,
        engine: Engine,
        pipeline: core.Struct,
        chain: Chain,
        ways: Ways,
        needs_chain: str,
        judge: Callable[[Outlet, bool], None],
    ) -> None:
        self._engine = engine
        self._pipeline = pipeline
        self._chain = chain
        self._ways = ways
        self._needs_chain = needs_chain
        self._judge = judge
        self._ring: Ring | None = None
        self._tokens: list[int] = []
        self._intake: Intake | None = None
        self._down: Choice | None = None  # how the source is read when the bytes go down the chain
        self._origin = 0

    def begin(self, intake: Intake) -> None:
        """A stream begins; its sinks stand."""
        self._intake = intake
        self._down = intake.choice
        self._origin = int(self._pipeline.fed)
        if self._ring is not None:
            self._ring.new_stream()
            self._copies(self._ways.across(intake.source.scheme, self._schemes))
        elif self._may():
            choice = self._ways.across(intake.source.scheme, self._schemes)
            if choice.method == "copy":
                self.scatter(choice)

    @property
    def _schemes(self) -> list[str]:
        return [o.settings.address.scheme for o in self._chain.outlets if o.settings is not None]

    def _may(self) -> bool:
        """Whether this stream could go through a ring, as its ends turned out to be."""
        assert self._intake is not None
        source = self._intake.source
        if (
            self._needs_chain
            or source.scheme not in READ
            or source.c.waits
            or self._intake.choice.method
            in (
                "sendfile",
                "vmsplice",
            )
        ):
            return False
        if any(node.c.held for node in self._chain.nodes):
            return False
        return all(
            outlet.sink is not None and outlet.sink.c.kind != core.FERRY for outlet in self._chain.outlets
        )

    def scatter(self, choice: Choice) -> bool:
        """From here on bytes go through a ring; False if there is none. Nothing may be under way."""
        ring = Ring.pooled(self._engine.rings, int(self._pipeline.fed), self._origin)
        if ring is None:
            return False
        self._ring = ring
        for outlet in self._chain.outlets:
            token = self._engine.register(self._hears(outlet))
            self._tokens.append(token)
            outlet.place = Place(ring, outlet.node, outlet.gate, token)
        self._pipeline.ring = ring.c
        self._copies(choice)
        return True

    def _copies(self, choice: Choice) -> None:
        assert self._intake is not None
        self._intake.choice = choice
        self._intake.source.c.method = core.COPY

    def _hears(self, outlet: Outlet) -> Callable[[int, int, int], None]:
        return lambda what, _error, _mask: self._judge(outlet, what == core.SLOW)

    def chain(self) -> None:
        """From here on bytes go down the chain. Nothing may be under way."""
        self._leave()
        if self._intake is not None and self._down is not None:
            self._intake.choice = self._down
            self._intake.source.c.method = METHODS[self._down.method]

    def end_turn(self) -> None:
        """The stream is over, and its account made: memory that nobody needs now goes back."""
        self._intake = None
        if self._ring is not None and not any(outlet.waiting for outlet in self._chain.outlets):
            self._leave()

    def _leave(self) -> None:
        if self._ring is None:
            return
        self._pipeline.ring = core.ffi.NULL
        for outlet in self._chain.outlets:
            if outlet.place is not None:
                outlet.place.leave()
                outlet.place = None
        for token in self._tokens:
            self._engine.forget_token(token)
        self._tokens.clear()
        self._ring.close()
        self._ring = None

    def close(self) -> None:
        """The pipeline is gone. Safe to call again."""
        self._leave()
