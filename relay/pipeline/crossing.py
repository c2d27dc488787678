"""How a pipeline's bytes cross: down the chain of pipes, or through one ring of memory that its sinks read.

Theory of operation. Both ways are there for a pipeline whose stages are plain tees (ring_shape.py says why another has
only its chain). It changes between them when nothing is under way: then the chain's pipes are empty and so is the
ring, and there is nothing to carry over but counters. To get there the source is not read for a moment; where that
takes longer than PATIENCE, because a sink is slow, the change is put off. A ring is there while it is used; its
memory is one of few that an engine has, and where none is free the bytes go down the chain.

With `method: auto` the first stream of a route begins the way that ways.py expects to be cheaper, and from then on all
are measured: the CPU time of a byte, by samples of each way (balance.py says when, experience.py what streams share).
What the threads take that write files counts as well: C adds it to the sample that their loads are of (kernel/loads.c).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from relay.endpoints.file import FileSink
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine, Timer
from relay.kernel import core
from relay.kernel.ring import Borrower, Ring
from relay.pipeline.balance import NAMES, OWN, REST, SETTLES, Balance, Way
from relay.pipeline.chain import Chain
from relay.pipeline.experience import COUNTS, Experience
from relay.pipeline.intake import METHODS, Intake
from relay.pipeline.outlet import Outlet, judge
from relay.pipeline.place import Place
from relay.pipeline.ring_shape import chained
from relay.stages.base import StageSettings
from relay.ways import Choice, Pieces, Ways

READ = ("tcp", "unix", "fifo", "file", "stdio", "fd")  # ends that may be read into memory
PATIENCE = 0.02  # seconds that the source waits for a change
LOOKS = 16  # of the first pieces,
BUSY_NS = 100_000_000  # in so long at the most


class Crossing:
    """Owns a pipeline's ring while there is one, and applies its sinks' policies there.

    All calls on the engine's thread, between sweeps.
    """

    def __init__(
        self,
        engine: Engine,
        route: str,
        pipeline: core.Struct,
        chain: Chain,
        ways: Ways,
        shape: tuple[Sequence[StageSettings], SinkSettings],
    ) -> None:
        self._engine = engine
        self._route = route
        self._pipeline = pipeline
        self._chain = chain
        self._ways = ways
        self._needs_chain = chained(*shape)
        self._ring: Ring | None = None
        self._tokens: list[int] = []
        self._intake: Intake | None = None
        self._down: Choice | None = None  # how the source is read when the bytes go down the chain
        self._begins: Choice | None = None
        self._origin = 0
        self._by: dict[Way, int] = {"chain": 0, "ring": 0}  # bytes of this turn
        self._since = 0  # fed when they began to go the present way
        self._experience: Experience | None = None
        self._began: Way = "chain"
        self._before = (0, 0, 0)  # changes and samples of its route when this stream began
        self._told = 0  # fed when its bytes were counted last
        self._trial = False  # it goes the other way to try that
        self._counts = True  # the present sample
        self._soon = SETTLES  # bytes after which a trial that could not end is to
        self._timer: Timer | None = None

    @property
    def way(self) -> Way:
        """How bytes cross now."""
        return "chain" if self._ring is None else "ring"

    def begin(self, intake: Intake) -> None:
        """A stream begins; its sinks stand."""
        self._intake, self._down = intake, intake.choice
        self._origin = self._since = int(self._pipeline.fed)
        self._by = {"chain": 0, "ring": 0}
        if self._ring is not None:
            self._ring.new_stream()
        if self._needs_chain or not self._may():
            return
        self._begins = self._ways.across(intake.source.scheme, self._schemes)
        wanted: Way = "ring" if self._begins.method == "copy" else "chain"
        self._told, self._experience = self._since, None
        if self._ways.measured(self._schemes):
            odds = self._ways.odds(intake.source.scheme, self._schemes, wanted)
            found = Experience.of(
                self._engine, self._route, intake.source.scheme, self._schemes, wanted, odds
            )
            self._experience, self._before = found, self._so_far(found.balance)
            wanted = found.begins(self)
        if wanted != self.way and not self._waiting():
            self._change()
        self._began = self.way
        if self._experience is not None:
            self._trial = self._tries(self._experience)
            self._look()
            self._sample()

    @staticmethod
    def _so_far(balance: Balance) -> tuple[int, int, int]:
        return balance.changes, balance.samples["chain"], balance.samples["ring"]

    @property
    def _schemes(self) -> list[str]:
        return [o.settings.address.scheme for o in self._chain.outlets if o.settings is not None]

    def _may(self) -> bool:
        """Whether this stream could go through a ring, as its ends turned out to be."""
        assert self._intake is not None
        source, choice = self._intake.source, self._intake.choice
        if source.scheme not in READ or not source.rings or choice.method in ("sendfile", "vmsplice"):
            return False
        sinks = [outlet.sink for outlet in self._chain.outlets]
        if self._pipeline.keep and "file" in self._schemes:
            return False
        return all(
            sink is not None and (sink.c.kind != core.FERRY or isinstance(sink, FileSink)) for sink in sinks
        )

    def _waiting(self) -> bool:
        held = any(node.c.held for node in self._chain.nodes)
        return held or any(outlet.waiting for outlet in self._chain.outlets)

    # -- changing

    def _change(self) -> bool:
        """From here on bytes go the other way; False if there is no ring. Nothing is under way."""
        fed = int(self._pipeline.fed)
        self._by[self.way] += fed - self._since
        self._since = fed
        if self._ring is not None:
            self._leave()
            return True
        ring = Ring.pooled(self._engine.rings, fed, self._origin)
        if ring is None:
            return False
        self._ring = ring
        for outlet in self._chain.outlets:
            token = self._engine.register(self._hears(outlet))
            self._tokens.append(token)
            outlet.place = Place(ring, outlet.node, outlet.gate, token, self._borrower(outlet))
        self._pipeline.ring = ring.c
        return True

    def _borrower(self, outlet: Outlet) -> Borrower | None:
        if outlet.sink is None or outlet.sink.c.kind != core.FERRY:
            return None
        assert self._begins is not None
        return outlet.sink.takes_spans(self._begins.reason)

    def _borrowers(self) -> list[Borrower]:
        """Whose threads have a part of the ring's memory."""
        places = [outlet.place for outlet in self._chain.outlets if outlet.place is not None]
        return [place.borrower for place in places if place.borrower is not None]

    def _hears(self, outlet: Outlet) -> Callable[[int, int, int], None]:
        def heard(what: int, _error: int, _mask: int) -> None:
            judge(self._route, outlet, self._chain.outlets, slow=what == core.SLOW)
            borrowers = self._borrowers() if what == core.SLOW and outlet.policy != "block" else []
            if borrowers and self._ring is not None:
                self._ring.leave_behind(borrowers)  # what one thread has must not hold the others
            self._engine.ready(self._pipeline)

        return heard

    def _leave(self) -> None:
        if self._ring is None:
            return
        self._pipeline.ring = core.ffi.NULL
        borrowers = self._borrowers()
        for outlet in self._chain.outlets:
            if outlet.place is not None:
                outlet.place.leave()
                outlet.place = None
        for token in self._tokens:
            self._engine.forget_token(token)
        self._tokens.clear()
        self._ring.close(borrowers)
        self._ring = None

    # -- the first pieces

    def _look(self) -> None:
        """Its first pieces are looked at, if nobody's were: down a chain, slots are seen."""
        looks = self.way == "chain" and self._experience is not None and not self._experience.seen
        self._pipeline.looks = LOOKS * looks
        self._pipeline.looked = self._pipeline.pieces = self._pipeline.fills = 0

    def _seen(self) -> None:
        """How large the first pieces were may say what is cheaper before anything is measured."""
        found, c = self._experience, self._pipeline
        if self._intake is None or found is None or found.seen or found.balance.samples["ring"]:
            return
        if c.looked_ns > BUSY_NS:
            return  # it does not matter what so little costs, and more may be larger
        found.seen = True
        source, pieces = self._intake.source.scheme, Pieces(c.pieces // c.looked, c.fills // c.looked)
        choice = self._ways.across(source, self._schemes, pieces)
        if choice.method == "copy" and found.balance.way == "chain":
            self._begins = choice
            self._tell(found)
            found.balance.take("ring", self._ways.odds(source, self._schemes, "ring", pieces))
            self._change_over()

    # -- measuring

    def _measure(self, size: int, skip: int = SETTLES, *, counts: bool = True) -> None:
        """The next `size` bytes are measured, after `skip` that are not; of a dear way little goes beyond them. What
        does not count is only waited for."""
        self._counts = counts
        self._pipeline.brief = (
            counts and self._trial and self._experience is not None and self._experience.balance.dear
        )
        begins = int(self._pipeline.fed)
        self._pipeline.cpu_ns = self._pipeline.gauged = 0
        self._pipeline.sample += 1
        self._pipeline.gauge_from = begins + skip
        self._pipeline.gauge_until = begins + skip + size

    def hear(self, what: int) -> None:
        """The pump reports: nothing is under way, its first pieces were seen, or what was to be measured has come."""
        if what == core.STILL:
            self._still()
        elif what == core.PIECES:
            self._seen()
        else:
            self._gauged()

    def _gauged(self) -> None:
        found = self._experience
        if self._intake is None or found is None:
            return
        self._heed(found)
        way, size = found.next(self)
        if way == self.way:
            self._measure(size, found.balance.pause if way == found.balance.way else 0)
        else:
            self._change_over()

    def _change_over(self) -> None:
        """The source is not read until nothing is under way."""
        if not self._pipeline.still:
            self._pipeline.still = 1
            self._timer = self._engine.later(PATIENCE, self._too_long)
            self._engine.ready(self._pipeline)

    def _tries(self, found: Experience) -> bool:
        """Whether it goes the other way because it is its turn to try that."""
        return self.way != found.balance.way and found.trier is self

    def _tell(self, found: Experience) -> None:
        """The bytes that came since the last time."""
        fed = int(self._pipeline.fed)
        found.came(fed - self._told, tried=self._trial and self.way != found.balance.way)
        self._told = fed

    def _heed(self, found: Experience) -> None:
        """What was measured is told, once."""
        self._tell(found)
        gauged = int(self._pipeline.gauged)
        # of a sample cut short by the stream's end the threads' part is not in yet
        short = gauged >= COUNTS and "file" not in self._schemes
        if self._counts and (short or (gauged and not self._pipeline.gauge_until)):
            self._counts = False
            found.measured(self, self.way, int(self._pipeline.cpu_ns) / gauged)
        self._trial = self._trial and self.way != found.balance.way  # it may be in force by now

    def _still(self) -> None:
        found = self._experience
        if found is not None:
            self._tell(found)  # after a trial some more bytes went its way
        tries = found is not None and self.way == found.balance.way
        changed = self._change()
        self._go_on()
        self._soon = SETTLES
        if found is not None:
            self._trial = self._tries(found)
            if tries and not changed:
                found.gave_up(self)
        self._sample()

    def _sample(self) -> None:
        balance = self._experience.balance if self._experience is not None else None
        if balance is None or self.way == balance.way:
            self._measure(OWN if balance is None else balance.own)
        elif self._trial:
            self._measure(balance.trial)
        else:
            self._measure(OWN, REST, counts=False)  # it could not change its way: not all the time once more

    def _too_long(self) -> None:
        found = self._experience
        self._go_on()
        if found is not None and self._trial:
            self._measure(self._soon, 0, counts=False)  # whoever makes it wait here may do so for long
            self._soon = min(2 * self._soon, REST)
            return
        if found is not None and self.way == found.balance.way:
            found.gave_up(self)
        self._sample()

    def _go_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pipeline.still = 0
        self._engine.ready(self._pipeline)

    # -- ending

    def settle(self) -> dict[str, Any]:
        """The stream is over: its source and its outlets know how their bytes crossed; the measurements, if any."""
        self._go_on()
        found, self._experience = self._experience, None
        if found is not None and self._intake is not None:
            self._heed(found)
            found.leaves(self)
        self._pipeline.gauge_until = self._pipeline.looks = self._pipeline.brief = 0
        fed = int(self._pipeline.fed)
        self._by[self.way] += fed - self._since
        self._since = fed
        by_ring = self._by["ring"] > self._by["chain"] or (fed == self._origin and self._ring is not None)
        for outlet in self._chain.outlets:
            outlet.by_ring = by_ring
            if not by_ring and self._begins is not None and isinstance(outlet.sink, FileSink):
                outlet.sink.took_pipes(self._begins.reason)
        if self._intake is None or self._down is None or self._begins is None:
            return {}
        choice = self._down
        if by_ring:
            choice = Choice("copy", self._begins.reason if self._begins.method == "copy" else "measured")
        balance = found.balance if found is not None else None
        costs = balance.costs() if balance is not None else {}
        if len(costs) == 2:
            told = ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items())
            choice = Choice(choice.method, f"measured, in CPU-seconds per GiB: {told}")
        self._intake.choice = choice
        self._intake.source.c.method = METHODS[choice.method]
        if balance is None or not costs:
            return {}
        changes, *samples = (
            now - then for now, then in zip(self._so_far(balance), self._before, strict=True)
        )
        return {
            "way": NAMES[balance.way],
            "began": NAMES[self._began],
            "changes": changes,
            "bytes": {NAMES[way]: count for way, count in self._by.items()},
            "cpu_seconds_per_gib": costs,
            "samples": dict(zip(NAMES.values(), samples, strict=True)),
        }

    def end_turn(self) -> None:
        """Its account is made: memory that nobody needs now goes back."""
        self._intake = self._begins = None
        if self._ring is not None and not self._waiting():
            self._leave()

    def close(self) -> None:
        """The pipeline is gone. Safe to call again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._leave()
