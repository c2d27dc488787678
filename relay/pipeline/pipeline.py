"""A route at work for one stream, or for streams that take turns.

Theory of operation. The pump (kernel/pump.h) moves bytes and reports; this file decides.

    each    the pipeline carries one stream. The source's end runs down the chain; each sink is finished when
            all it will get was handed to it; when the last has ended the pipeline is over.
    turns   the pipeline outlives its streams. At a source's end the pump says when nothing is under way; the
            sinks that belong to the stream (a file a stream, a checksum) are finished, the others stay open;
            then the turn is over and the next source may begin.

A source that fails lets what it gave flow out; then the sinks are aborted instead of finished, so that no
receiver takes a part for the whole. A sink that fails is cut off; the others notice nothing. The source is
closed last: cleanly when every sink that may hold it has the stream whole, with a reset when not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from relay.endpoints.base import Sink, Source, nothing
from relay.endpoints.broadcast import Broadcast
from relay.endpoints.options import Limits
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine
from relay.errors import KernelError, RelayError, name_of
from relay.journal.record import SessionRecord
from relay.kernel import core
from relay.pipeline.absences import Absences
from relay.pipeline.account import account
from relay.pipeline.chain import Chain
from relay.pipeline.checksums import Checksums
from relay.pipeline.crossing import Crossing
from relay.pipeline.intake import Intake
from relay.pipeline.node import Node
from relay.pipeline.outlet import Outlet, judge
from relay.pipeline.sink_wait import SinkWait
from relay.pipeline.sinks import Making, SinkMaker
from relay.pipeline.stragglers import Stragglers
from relay.pipeline.subscribers import Subscribers
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.ways import Ways

log = logging.getLogger("relay.pipeline")


class Pipeline:
    """Owns the chain, its sinks and, during a turn, the source. Lives on one engine, on whose thread all runs.

    `on_over(record)` is called at the end of each turn; with `persistent=False` there is one turn, after which
    everything is closed; `on_closed` is called once, last of all. `making` says how its sinks are made.
    `quiet` leaves the warnings about sinks to the caller. `wait` is for how many seconds a stream is not read while a
    sink is not open yet. Raises KernelError when no descriptor is left for the pipes.
    """

    def __init__(
        self,
        engine: Engine,
        route: str,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        ways: Ways,
        *,
        persistent: bool,
        on_over: Callable[[SessionRecord], None],
        making: Making,
        on_closed: Callable[[], None] = nothing,
        quiet: bool = False,
        wait: float = 0.0,
        limits: Limits | None = None,
    ) -> None:
        self.engine = engine
        self.route = route
        self._quiet = quiet
        self._limits = limits
        self.persistent = persistent
        self.ways = ways
        self._on_over = on_over
        self._on_closed = on_closed
        self.c = core.new("pipeline", keep=int(persistent))
        self._makes = SinkMaker(engine, route, ways, persistent, making)
        self.chain = Chain(engine, stages, sink, ways, persistent=persistent)
        self._absences = Absences(engine, route, self._stand_again, self._given_up, self._wake)
        self._checksums = Checksums(self.chain.outlets)
        self._stragglers = Stragglers(engine, route, self._wake)
        self._wait = SinkWait(engine, route, self.chain.outlets, wait, self._go_on)
        self.c.token = engine.register(self._event)
        self.c.head = self.chain.head.c
        self.c.nodes = len(self.chain.nodes)
        for node in self.chain.nodes:
            node.hear(partial(self._node_event, node))
        self.crossing = Crossing(engine, route, self.c, self.chain, ways, (stages, sink))
        self.intake: Intake | None = None
        self.turn: Turn | None = None
        self.subscribers: list[Subscribers] = []
        self._reason = ""
        self._ended_by = "source"
        self._aborting = self._ending = self._closed = False

    # -- what a route does
    def open(self, broadcasts: dict[int, Broadcast] | None = None) -> None:
        """Opens the sinks that outlive a turn. `broadcasts` are the listening sinks, by their settings' id."""
        for outlet in self.chain.outlets:
            settings = outlet.settings
            if settings is not None and settings.verb == "listen":
                broadcast = (broadcasts or {})[id(settings)]
                self.subscribers.append(Subscribers(self.engine, self, broadcast, outlet))
                self._stand(outlet, broadcast)
            elif not outlet.per_turn:
                if outlet.rejoins:
                    self._absences.forgive(outlet)
                self._stand(outlet, self._makes.sink(outlet, self.turn))

    def begin(self, source: Source, turn: Turn) -> None:
        """The next stream: `source` is open, and owned by the pipeline until the turn is over."""
        self.turn = turn
        self._reason, self._ended_by = "", "source"
        self.intake = Intake(
            self.engine, self.route, source, self.chain, self.ways, self._limits, self.break_off
        )
        self._absences.next_turn(self.chain.outlets)
        parts: list[Outlet | Subscribers] = [*self.chain.outlets, *self.subscribers]
        for part in parts:
            part.begin_turn()
        try:
            for stage in self.chain.stages:
                stage.begin(turn)
        except RelayError as error:
            self._not_begun(error)
            return
        for outlet in self.chain.outlets:
            if outlet.per_turn and not outlet.listens:
                self._stand(outlet, self._makes.sink(outlet, self.turn))
        if self.intake is None:
            return  # every sink failed at once: the turn is over
        self.intake.go_straight(self.chain, self.ways)
        self.crossing.begin(self.intake)
        source.c.reads = self.c
        self.c.source = source.c
        self.c.source_ended = 0
        self.c.paused = int(self._wait.begin())
        self.engine.ready(self.c)

    def break_off(self, reason: str) -> None:
        """The source is not read any further: what it gave flows out, then the stream ends as a failed one."""
        if self._over:
            return
        self._ended_by = "relay"
        self.c.source_ended = 1
        if not self.c.keep:
            self.c.head.ended = 1
        self._source_is_over(0, reason)
        self.engine.ready(self.c)

    def _not_begun(self, error: RelayError) -> None:
        """A stage cannot take this stream: the turn is over before it began; the next one may do better."""
        log.warning("%s: %s", self.route, error)
        assert self.intake is not None
        self.intake.error, self.intake.over = str(error), True
        self._ended_by = "relay"
        for outlet in self.chain.outlets:
            outlet.settled = True
        record = self._turn_over()
        if not self.persistent or self._ending:
            self.close()
        self._tell(record)

    def _go_on(self) -> None:
        self.c.paused = 0
        self.engine.ready(self.c)

    def finish(self) -> None:
        """No more streams: what is under way flows out, then every sink is finished. For persistent ones."""
        if self._closed or self._ending:
            return
        self._ending = True
        self.c.keep = 0
        for group in self.subscribers:
            group.hurry()
        if self.source is None:
            for outlet in self.chain.outlets:
                outlet.settled = outlet.sink is None or outlet.sink.state in ("failed", "finished")
        self.c.head.ended = self.c.source_ended = 1
        self._absences.finish(self.chain.outlets)
        self._wake()

    def abort(self, reason: str) -> None:
        """Ends at once: sinks are aborted, the source is reset, what is under way is gone."""
        if self._closed:
            return
        self._aborting = True
        self._reason = self._reason or reason
        self._ended_by = "relay"
        if self.intake is not None:
            self.intake.over = True
        self.c.paused = 1
        for outlet in self.chain.outlets:
            if outlet.sink is not None and not outlet.settled:
                outlet.sink.abort(reason)
        for group in self.subscribers:
            group.abort(reason)
        between = self.persistent and self.source is None  # no stream: nothing to tell of
        record = self._turn_over()
        self.close()
        if not between:
            self._tell(record)

    @property
    def source(self) -> Source | None:
        """Of the turn that is under way."""
        return self.intake.source if self.intake is not None else None

    @property
    def _over(self) -> bool:
        return self.intake is None or self.intake.over

    @property
    def _error(self) -> str:
        return self.intake.error if self.intake is not None else ""

    @property
    def busy(self) -> bool:
        """Whether a source is connected or bytes wait to be delivered."""
        waiting = any(o.waiting or (o.sink is not None and o.sink.backlog) for o in self.chain.outlets)
        return self.source is not None or waiting or any(node.c.held for node in self.chain.nodes)

    @property
    def closed(self) -> bool:
        """Whether everything is closed."""
        return self._closed

    # -- standing sinks up
    def _stand(self, outlet: Outlet, sink: Sink) -> None:
        """`sink` stands at `outlet` from now on."""
        sink.c.token = self.engine.register(
            lambda what, error, _mask: self._sink_event(outlet, sink, what, error)
        )
        sink.wire(self.c)
        sink.on_open = lambda _sink: self._opened(outlet)
        sink.on_finish = sink.on_fail = lambda _sink: self._settled(outlet, sink)
        outlet.stand(sink, self.ways)
        try:
            sink.open()
        except (OSError, KernelError) as error:  # no descriptor left: this sink's failure, nobody else's
            code = error.errno or 0 if isinstance(error, OSError) else 0
            sink.fail(sink.error("opening", code, reason="" if code else str(error)))

    def _stand_again(self, outlet: Outlet) -> None:
        self._stand(outlet, self._makes.sink(outlet, self.turn, again=True))
        self._wake()

    def _given_up(self, outlet: Outlet) -> None:
        outlet.put(core.ffi.NULL)
        self._wake()
        self.look_whether_over()

    def _wake(self) -> None:
        if not self._closed:
            self.engine.ready(self.c)

    def _opened(self, outlet: Outlet) -> None:
        log.debug("%s: sink %s is open", self.route, outlet.name)
        outlet.came()
        if outlet.backoff is not None and outlet.sink is not None:
            outlet.put(outlet.sink.c)  # a turn may have ended without it meanwhile
        self._wait.look()
        self.engine.ready(self.c)

    # -- what the pump reports
    def _event(self, what: int, error: int, _mask: int) -> None:
        if what in (core.SOURCE_ENDED, core.SOURCE_FAILED):
            self._source_is_over(error if what == core.SOURCE_FAILED else 0)
        elif what == core.SOURCE_COPIES:
            assert self.intake is not None
            self.intake.copies(name_of(error))
        elif what == core.SOURCE_DRY:
            if self.source is not None and self.source.refill():
                self.engine.ready(self.c)
        elif what in (core.STILL, core.GAUGED, core.PIECES):
            self.crossing.hear(what)
        elif what == core.IDLE:
            self._idle()
        elif what == core.DONE:
            self._done()

    def _source_is_over(self, error: int, broken_off: str = "") -> None:
        assert self.intake is not None
        self.intake.ended(error, broken_off)
        self._absences.source_ended(self.chain.outlets)
        if self.c.keep:
            self.c.tell_idle = 1
            self.engine.ready(self.c)
        else:
            self._stragglers.source_ended(self.chain.outlets)

    def _idle(self) -> None:
        """Between turns: nothing is under way, so what belongs to the stream alone can end."""
        for outlet in self.chain.outlets:
            if outlet.sink is None or not outlet.per_turn or outlet.listens:
                outlet.settled = True
            elif not outlet.settled:
                self._end_sink(outlet, outlet.sink)
        self.look_whether_over()

    def _done(self) -> None:
        """Every sink has had its end or failed. Without a failure of the source it need not be read further."""
        if self.intake is not None and not self.intake.over:
            self.intake.over = True
            self._ended_by = "sinks"
            self.c.paused = 1
        self.look_whether_over()

    def _sink_event(self, outlet: Outlet, sink: Sink, what: int, error: int) -> None:
        if what == core.SINK_DRAINED:
            self._end_sink(outlet, sink)
        else:
            sink.hear(what, error)

    def _end_sink(self, outlet: Outlet, sink: Sink) -> None:
        """All this sink will get was handed to it: it is finished, after its checksum if it wants one."""
        # pages under way are the file's own: a change may show in them
        if self.intake is not None and self.intake.look_for_change():
            sink.cut(self.intake.error)
            return
        if self._checksums.ready(outlet, sink):  # if not, _settled of the checksum comes back here
            sink.finish()

    def _node_event(self, node: Node, what: int, error: int) -> None:
        if what == core.WANTS_COPY:
            node.copies(f"the kernel answered {name_of(error)}")
            self.engine.ready(self.c)
        elif what == core.BROKEN:
            self.abort(f"moving bytes between pipes: {name_of(error)}")
        elif what in (core.SLOW, core.CAUGHT_UP):
            for outlet in self.chain.outlets:
                if outlet.gate is node and not outlet.hidden:
                    judge(self.route, outlet, self.chain.outlets, slow=what == core.SLOW)
            self.engine.ready(self.c)

    # -- ending
    def _settled(self, outlet: Outlet, sink: Sink) -> None:
        """A sink finished or failed."""
        broke = outlet.sink is sink and sink.state == "failed" and not self._aborting and not self._closed
        if broke and self._absences.begin(outlet, sink):
            return
        self._wait.look()
        if outlet.sink is not sink or outlet.settled:
            return
        outlet.settled = True
        for group in self.subscribers:
            if group.outlet is outlet and not self.c.keep:
                group.ended()
        if outlet.node.c.sink == sink.c:
            outlet.put(core.ffi.NULL)
        said = self._aborting or self._quiet or self._error  # by somebody else already
        if sink.state == "failed" and not said:
            log.warning("%s: %s", self.route, sink.reason)
        outlet.gate.c.dropping = 0
        self._wake()
        if not self.c.keep:
            self._checksums.leave_alone()
        for other, file in self._checksums.waited(outlet, over=self._over):
            self._end_sink(other, file)
        self.look_whether_over()

    def look_whether_over(self) -> None:
        """Ends the turn, or the pipeline, if nobody has anything left to do. For Subscribers, too."""
        if self._closed or self._aborting:
            return
        everyone = all(outlet.settled for outlet in self.chain.outlets)
        if everyone and self.intake is not None and not self.intake.over and not self.c.keep:
            self.intake.over = True
            self._ended_by = "sinks"
        joined = any(group.members for group in self.subscribers) and not self.c.keep
        if not everyone or not self._over or joined:
            return
        record = self._turn_over() if self.source is not None else None
        if not self.persistent or self._ending:
            self.close()
        if record is not None:
            self._tell(record)

    def _turn_over(self) -> SessionRecord:
        harmless = all(outlet.harmless for outlet in self.chain.outlets) and not self._error
        record = account(
            self.route,
            self.turn,
            self.intake,
            self.chain,
            self._ended_by,
            self._reason,
            aborted=self._aborting,
            measured=self.crossing.settle(),
        )
        for outlet in self.chain.outlets:
            outlet.end_turn()
        self.crossing.end_turn()
        intake, self.intake = self.intake, None
        self.c.source = core.ffi.NULL
        if intake is not None:
            intake.close(reset=record.result != "delivered" and not harmless)
        for outlet in self.chain.outlets:
            if outlet.per_turn and outlet.sink is not None and not outlet.listens:
                self.engine.forget_token(outlet.sink.c.token)
                outlet.sink.unwire()
                outlet.sink = None
        return record

    def close(self) -> None:
        """Closes the chain and whatever sinks are still open. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        for part in (self._absences, self._stragglers, self._wait):
            part.close()
        self.engine.forget(self.c)
        self.engine.forget_token(self.c.token)
        self.crossing.close()
        for group in self.subscribers:
            group.close()
        for outlet in self.chain.outlets:
            if outlet.sink is not None:
                self.engine.forget_token(outlet.sink.c.token)
                outlet.sink.close()
                outlet.sink.unwire()
        self.chain.close()
        # whoever was told holds it no more: it is freed with its last user, and not when the collector looks
        tell, self._on_closed = self._on_closed, nothing
        tell()

    def _tell(self, record: SessionRecord) -> None:
        """Last of all in a turn, so that whoever hears it finds the pipeline as it will stay."""
        tell = self._on_over
        if self._closed:
            self._on_over = nothing
        tell(record)
