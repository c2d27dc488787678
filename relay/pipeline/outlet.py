"""An outlet: a place in the chain where bytes leave, the sink that stands there, and its account of a turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay.backoff import Backoff
from relay.endpoints.base import Sink
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.journal.record import SinkRecord
from relay.kernel import core
from relay.pipeline.node import Node
from relay.pipeline.place import Place
from relay.stages.base import StageSettings
from relay.stages.checksum import Checksum
from relay.stages.stage import Stage
from relay.units import show_size
from relay.ways import Ways

log = logging.getLogger("relay.pipeline")

CONNECTS = 1000  # of one turn that are remembered


@dataclass(eq=False)
class Outlet:
    """Where a sink stands: `node` moves bytes into it, the policy `slow` stands at `gate`.

    `branch` holds stages behind a spill's log. `hidden` outlets are a stage's own (a checksum). `per_turn`: every
    stream gets a sink of its own. `backoff` is there for one that is connected again whenever it is away: `away` says
    how often that was in this turn, `absent` that it is so now.
    `way` are the nodes before `node`, from the source on. `gates` are the heads of the branches it is in, outermost
    first: a policy there covers this outlet too. `place` is there while the pipeline's bytes come out of a ring and
    not down the chain; `by_ring` says of a turn that is over which way most of them came.
    """

    name: str
    node: Node
    gate: Node
    settings: SinkSettings | None
    slow: OnSlow
    stage: Stage | None = None
    gates: tuple[Node, ...] = ()
    branch: tuple[StageSettings, ...] = ()
    way: tuple[Node, ...] = ()
    digest: Checksum | None = None
    per_turn: bool = True
    sink: Sink | None = None
    moved_before: int = 0
    dropped_before: int = 0
    blocked_before: int = 0
    moved_away: int = 0
    lost_before: int = 0
    lost_earlier: int = 0
    away: int = 0
    absent: bool = False
    why_away: str = ""
    backoff: Backoff | None = None
    settled: bool = False
    place: Place | None = None
    by_ring: bool = False
    connects: list[float] = field(default_factory=list)
    connects_before: int = 0

    @property
    def hidden(self) -> bool:
        """Whether it is a stage's own and no sink of the route."""
        return self.settings is None

    @property
    def dropped(self) -> int:
        """Bytes that this sink did not get, by policy or because it was gone, in this turn."""
        place = self.place.dropped if self.place is not None else 0
        return sum(int(node.c.dropped) for node in self._nodes) + place - self.dropped_before

    @property
    def blocked(self) -> int:
        """Nanoseconds for which this sink's way was full, in this turn."""
        place = self.place.blocked if self.place is not None else 0
        return sum(int(node.c.blocked_ns) for node in self._nodes) + place - self.blocked_before

    @property
    def _nodes(self) -> tuple[Node, ...]:
        return (self.node,) if self.node is self.gate else (self.gate, self.node)

    @property
    def _givers(self) -> tuple[Node, ...]:
        """The nodes that give bytes to its sink."""
        return (self.node, self.gate) if self.gate.c.past else (self.node,)

    @property
    def waiting(self) -> int:
        """Bytes that wait for its sink alone."""
        return self.place.waiting if self.place is not None else int(self.node.c.held)

    @property
    def drained(self) -> bool:
        """Whether its sink was given all that it will get."""
        return self.place.drained if self.place is not None else bool(self.node.c.done)

    def stand(self, sink: Sink, ways: Ways) -> None:
        """`sink` stands here from now on; it is not open yet, and has moved and lost nothing so far."""
        self.sink = sink
        self.moved_before = self.lost_earlier = 0
        self.absent = False
        if self.settings is not None and not self.listens and sink.c.kind != core.FERRY:
            choice = ways.to_sink(self.settings.address.scheme, copies=sink.copies)
            if choice.method == "copy":
                for node in self._givers:
                    node.copies(choice.reason)
        self.put(sink.c)

    def came(self) -> None:
        """Its sink is open: how long that took is noted. One behind a log notes it itself."""
        connects = self.settings is not None and self.settings.verb == "connect" and not self.logged
        if connects and self.sink is not None and len(self.connects) < CONNECTS:
            self.connects.append(time.monotonic() - self.sink.started_at)

    @property
    def logged(self) -> bool:
        """Whether its sink reads through a log."""
        return self.slow.policy == "spill" or bool(self.slow.buffer)

    def _connects(self) -> tuple[float, ...]:
        return self.sink.connects if self.logged and self.sink is not None else tuple(self.connects)

    def put(self, sink: core.Struct) -> None:
        """That end gets the bytes from now on; with NULL they are dropped."""
        self.node.c.sink = sink
        if self.place is not None:
            self.place.put(sink)

    @property
    def listens(self) -> bool:
        """Whether it is a broadcast: its sink is whoever subscribes."""
        return self.settings is not None and self.settings.verb == "listen"

    @property
    def opening(self) -> bool:
        """Whether its sink is not there yet."""
        return self.sink is not None and self.sink.state == "opening"

    @property
    def down(self) -> bool:
        """Whether its sink is not there, for the first time or again."""
        return self.sink is not None and (self.sink.state in ("opening", "failed") or self.sink.away)

    @property
    def harmless(self) -> bool:
        """Whether the source need not know how its sink ended: all is well, or its policy lets it fail."""
        return self.sink is None or self.sink.state != "failed" or self.policy != "block"

    @property
    def policy(self) -> str:
        """What happens now if it is slow: a spill is only slow when its log is full."""
        return str(self.slow.then if self.slow.policy == "spill" else self.slow.policy)

    @property
    def rejoins(self) -> bool:
        """Whether it stands up again when it broke. A spill breaks with its log alone: it connects again behind it."""
        return self.settings is not None and self.settings.verb == "connect"

    def begin_turn(self) -> None:
        """The next stream: its pieces and its reconnects count from here."""
        if self.place is None:  # else the ring is told, and it tells where the stream began when it is left
            core.lib.relay_gate_stream(self.gate.c)
        self.settled = False
        self.away = 0
        self.why_away = ""

    def end_turn(self) -> None:
        """Bytes count from here, the last record holds the others: what waits now is the next record's to tell of."""
        self.moved_before = self.sink.moved if self.sink and not self.per_turn else 0
        self.lost_earlier = self.sink.lost if self.sink and not self.per_turn else 0
        self.moved_away = self.lost_before = 0
        self.dropped_before += self.dropped
        self.blocked_before += self.blocked
        self.connects.clear()
        self.connects_before = len(self._connects()) if not self.per_turn else 0

    def drop(self) -> None:
        """What comes is discarded for this sink alone, from the next border between pieces on."""
        if self.place is not None:
            self.place.drop()
            return
        core.lib.relay_gate_drop(self.gate.c)

    def cut_off(self) -> None:
        """The branch gets nothing more: its head discards, what is in it sees the end of the stream."""
        self.gate.c.left, self.gate.c.cut = 0, 1
        self.gate.c.after_ns = 0
        if self.gate.c.into != core.ffi.NULL:
            self.gate.c.into.ended = 1

    def went_away(self) -> float:
        """Its standing sink broke: seconds until it is tried again. What it had counts on."""
        assert self.backoff is not None
        assert self.sink is not None
        self.backoff.lasted(self.sink.seconds if self.sink.opened_at else 0.0)
        self.away += 1
        self.absent = True
        self.why_away = self.sink.reason
        self.lost_before += self.sink.lost - self.lost_earlier
        self.moved_away += self.sink.moved - self.moved_before
        self.moved_before = self.sink.moved  # it has been counted
        return self.backoff.next()

    def caught_up(self, route: str) -> None:
        """Says so."""
        log.info("%s: sink %s has caught up", route, self.name)

    def slow_words(self) -> str:
        """Why it is disconnected."""
        size = self.node.pipe.capacity if self.place is None else self.place.full
        size += self.slow.max or 0 if self.slow.policy == "spill" else self.slow.buffer
        return f"backlog of {show_size(size)} full for {self.slow.after or 0.0:.1f} s"

    def apart(self) -> int:
        """Bytes in a branch that a turn's end did not wait for, which this sink is still to get."""
        gate = self.node.c.apart
        if gate == core.ffi.NULL:
            return 0
        if self.place is not None:
            return self.place.waiting
        return self._held([each for each in self.way if each.c.apart == gate])

    def _held(self, way: Sequence[Node]) -> int:
        """Bytes in these nodes of its way, in its own and in its sink's hands that it is still to get."""
        held = int(self.node.c.held)
        for each in way:
            if each is not self.node:  # what it owes is a sink's beside, unless that is this one
                beside = 0 if each is self.gate or each in self.gates or not each.c.next else int(each.c.owed)
                held += int(each.c.held) - beside
        sink = self.sink
        # behind a log the sink's own backlog counts it
        if sink is not None and sink.c.kind == core.FERRY and not self.logged:
            held += max(0, int(sink.c.moved) - sink.moved)
        return held

    def record(self, *, sendfile: bool) -> SinkRecord:
        """Its part of the session; `sendfile` says that its bytes came straight from a file."""
        sink = self.sink
        assert self.settings is not None
        if sink is None:
            return SinkRecord(self.name, str(self.settings.address), 0, 0.0, "", "failed")
        written = (
            any(node.c.out_copies for node in self._givers) or self.by_ring or sink.c.method == core.COPY
        )
        by_hand = "copy" if written else "splice"
        own = (sink.c.kind == core.FERRY and not self.by_ring) or self.listens
        method = sink.method if own else by_hand
        failed = sink.state == "failed" and not self.absent
        lost = self.lost_before + (0 if self.absent else sink.lost - self.lost_earlier)
        waiting = self.apart()
        never = self._held(self.way) if failed and self.backoff is None else 0  # nobody takes it any more
        missed = lost or (self.backoff is not None and self.down and (self.dropped or waiting))
        return SinkRecord(
            sink=self.name,
            address=sink.address,
            bytes=sink.moved - self.moved_before + self.moved_away,
            seconds=sink.seconds,
            method="sendfile" if sendfile else method,
            why_method=next((node.why for node in self._givers if node.why), sink.copies),
            result="failed" if failed or missed else "delivered",
            reason=sink.reason or self.why_away,
            lost=lost,
            reconnects=self.away + sink.reconnects,
            twice=sink.twice,
            dropped=self.dropped + never,
            blocked_seconds=self.blocked / 1e9,
            path=sink.result_path,
            backlog=sink.backlog + (waiting if not never else 0),
            connects=self._connects()[self.connects_before :],
        )


def judge(route: str, outlet: Outlet, outlets: list[Outlet], *, slow: bool) -> None:
    """Applies a policy: `outlet`, one of a pipeline's `outlets`, fell behind for too long or has caught up again."""
    if not slow:
        outlet.caught_up(route)
    elif outlet.policy == "drop" or (outlet.policy == "disconnect" and outlet.down):
        log.warning("%s: sink %s is slow: dropping for it alone", route, outlet.name)
        outlet.drop()  # one that is down cannot be disconnected: it is in nobody's way until it is back
    elif outlet.policy == "disconnect":
        reason = outlet.slow_words()
        if outlet.backoff is None:
            outlet.cut_off()
        for each in [outlet, *(other for other in outlets if outlet.gate in other.gates)]:
            if each.sink is not None:
                each.sink.abort(reason)
        if outlet.backoff is not None:
            outlet.drop()  # until it is back, and has taken what waits for it
    else:
        how = "away" if outlet.down else "slow"
        log.warning("%s: sink %s is %s: it holds the source", route, outlet.name, how)
