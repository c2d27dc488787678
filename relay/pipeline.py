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
import time
from collections.abc import Callable
from functools import partial

from relay.backoff import Backoff
from relay.chain import Chain
from relay.endpoints.base import Sink, Source
from relay.endpoints.broadcast import Broadcast
from relay.endpoints.digest import sidecar_line
from relay.endpoints.file import FileSink
from relay.endpoints.make import make_sink
from relay.endpoints.options import Limits
from relay.endpoints.settings import SinkSettings
from relay.endpoints.template import fill_path
from relay.engine import Engine, Timer
from relay.errors import KernelError, RelayError
from relay.kernel import core
from relay.kernel.arena import MappedFile
from relay.outlet import Outlet
from relay.record import SessionRecord
from relay.source_clock import SourceClock
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.subscribers import Subscribers
from relay.ways import STRAIGHT, Choice, Ways

log = logging.getLogger("relay.pipeline")


# makes the sink that reads through a log: (engine, turn, outlet, persistent) -> Sink
Spilling = Callable[[Engine, Turn, Outlet, bool], Sink]


class Pipeline:
    """Owns the chain, its sinks and, during a turn, the source. Lives on one engine, on whose thread all runs.

    `on_over(record)` is called at the end of each turn; with `persistent=False` there is one turn, after which
    everything is closed; `on_closed` is called once, last of all. `spill` makes the sinks that read through a log.
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
        on_closed: Callable[[], None] = lambda: None,
        patience: float = 0.0,
        spill: Spilling | None = None,
        quiet: bool = False,
        wait: float = 0.0,
        limits: Limits | None = None,
    ) -> None:
        self.engine = engine
        self.route = route
        self._spill = spill
        self._quiet = quiet
        self._named = False
        self._wait = wait
        self._limits = limits
        self._clock: SourceClock | None = None
        self._waiting: Timer | None = None
        self.persistent = persistent
        self.ways = ways
        self._on_over = on_over
        self._on_closed = on_closed
        self._patience = patience
        self.c = core.new("pipeline", keep=int(persistent))
        self.chain = Chain(engine, stages, sink, ways, persistent=persistent)
        self.c.token = engine.register(self._event)
        self.c.head = self.chain.head.c
        self.c.nodes = len(self.chain.nodes)
        for node in self.chain.nodes:
            node.hear(self._node_hearing(node))
        self.source: Source | None = None
        self.turn: Turn | None = None
        self.subscribers: list[Subscribers] = []
        self._source_choice = Choice("splice", "")
        self._source_error = ""
        self._source_over = False
        self._mapped: MappedFile | None = None
        self._reason = ""
        self._ended_by = "source"
        self._aborting = False
        self._ending = False
        self._closed = False
        self._began = 0.0

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
                if settings is not None and settings.verb == "connect" and outlet.slow.policy != "spill":
                    outlet.backoff = Backoff()
                    outlet.node.c.hold = 1
                self._stand(outlet, self._made(outlet))

    def begin(self, source: Source, turn: Turn) -> None:
        """The next stream: `source` is open, and owned by the pipeline until the turn is over."""
        self.turn, self.source = turn, source
        self._named = False
        self._source_over, self._source_error, self._reason = False, "", ""
        self._ended_by = "source"
        self._began = time.monotonic()
        for outlet in self.chain.outlets:
            outlet.begin_turn()
        try:
            for stage in self.chain.stages:
                stage.begin(turn)
        except RelayError as error:
            self._not_begun(error)
            return
        for outlet in self.chain.outlets:
            if outlet.per_turn and not outlet.listens:
                self._stand(outlet, self._made(outlet))
        self._choose_source(source)
        source.c.reads = self.c
        self.c.source = source.c
        self.c.source_ended = 0
        if self._wait and any(outlet.opening for outlet in self.chain.outlets):
            self.c.paused = 1
            self._waiting = self.engine.later(self._wait, self._waited)
        if self._limits is not None:
            self._clock = SourceClock(self.engine, source, self._limits, self.break_off)
        self.engine.ready(self.c)

    def break_off(self, reason: str) -> None:
        """The source is not read any further: what it gave flows out, then the stream ends as a failed one."""
        if self.source is None or self._source_over:
            return
        self._ended_by = "relay"
        self.c.source_ended = 1
        if not self.c.keep:
            self.chain.head.c.ended = 1
        self._source_is_over(0, reason)
        self.engine.ready(self.c)

    def _not_begun(self, error: RelayError) -> None:
        """A stage cannot take this stream: the turn is over before it began; the next one may do better."""
        log.warning("%s: %s", self.route, error)
        self._source_error = self._reason = str(error)
        self._ended_by = "relay"
        self._source_over = True
        for outlet in self.chain.outlets:
            outlet.settled = True
        record = self._turn_over()
        if not self.persistent or self._ending:
            self.close()
        self._on_over(record)

    def _waited(self) -> None:
        """Every sink is there, or it has been waited for them long enough."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
            late = [outlet.name for outlet in self.chain.outlets if outlet.opening]
            if late:
                log.warning("%s: goes on without %s after %.1f s", self.route, ", ".join(late), self._wait)
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
            self._started_ending()
        self.chain.head.c.ended = 1
        self.c.source_ended = 1
        self.engine.ready(self.c)

    def _started_ending(self) -> None:
        for outlet in self.chain.outlets:
            outlet.settled = outlet.sink is None or outlet.sink.state in ("failed", "finished")

    def abort(self, reason: str) -> None:
        """Ends at once: sinks are aborted, the source is reset, what is under way is gone."""
        if self._closed:
            return
        self._aborting = True
        self._reason = self._reason or reason
        self._ended_by = "relay"
        self._source_over = True
        self.c.paused = 1
        for outlet in self.chain.outlets:
            if outlet.sink is not None and not outlet.settled:
                outlet.sink.abort(reason)
        for group in self.subscribers:
            group.abort(reason)
        record = self._turn_over()
        self.close()
        self._on_over(record)

    @property
    def busy(self) -> bool:
        """Whether a source is connected or bytes wait to be delivered."""
        return self.source is not None or any(node.c.held for node in self.chain.nodes)

    @property
    def closed(self) -> bool:
        """Whether everything is closed."""
        return self._closed

    # -- standing sinks up

    def _made(self, outlet: Outlet) -> Sink:
        settings = outlet.settings
        if settings is None:
            assert outlet.stage is not None
            sink = outlet.stage.sink(self.engine)
            assert sink is not None
            return sink
        if outlet.slow.policy == "spill":
            assert self._spill is not None  # whoever has such a route brings one
            turn = self.turn or Turn(route=self.route, id="0", time="", peer="")
            return self._spill(self.engine, turn, outlet, self.persistent)
        in_place = self.persistent and not settings.placeholders
        way = self.ways.to_sink(settings.address.scheme)
        copies = way.reason if way.method == "copy" else ""
        return make_sink(
            self.engine,
            settings,
            partial(self._path, settings),
            in_place=in_place,
            copies=copies,
            patience=self._patience,
        )

    def _path(self, settings: SinkSettings) -> str:
        """A name for a file that begins now: the stream's own time for its first, the present for those after."""
        path = settings.address.path
        if not settings.placeholders:
            return path
        assert self.turn is not None
        values = dict(self.turn.values())
        if self._named:
            values["time"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._named = settings.rotate is not None
        return fill_path(path, values)

    def _stand(self, outlet: Outlet, sink: Sink) -> None:
        """`sink` stands at `outlet` from now on."""
        outlet.sink = sink
        outlet.moved_before = 0
        sink.c.token = self.engine.register(
            lambda what, error, _mask: self._sink_event(outlet, sink, what, error)
        )
        sink.wire(self.c)
        sink.on_open = lambda _sink: self._opened(outlet, sink)
        sink.on_finish = lambda _sink: self._settled(outlet, sink)
        sink.on_fail = lambda _sink: self._settled(outlet, sink)
        if not outlet.hidden and outlet.settings is not None and sink.c.kind != core.FERRY:
            choice = self.ways.to_sink(outlet.settings.address.scheme, copies=sink.copies)
            if choice.method == "copy":
                outlet.node.copies(choice.reason)
        outlet.node.c.sink = sink.c
        try:
            sink.open()
        except (OSError, KernelError) as error:  # no descriptor left: this sink's failure, nobody else's
            code = error.errno or 0 if isinstance(error, OSError) else 0
            sink.fail(sink.error("opening", code, reason="" if code else str(error)))

    def _opened(self, outlet: Outlet, sink: Sink) -> None:
        log.debug("%s: sink %s is open", self.route, outlet.name)
        del sink
        if outlet.backoff is not None:
            outlet.gate.c.dropping = 0
        if self._waiting is not None and not any(other.opening for other in self.chain.outlets):
            self._waited()
        self.engine.ready(self.c)

    def _choose_source(self, source: Source) -> None:
        scheme = source.scheme
        only = self.chain.outlets[0] if len(self.chain.nodes) == 1 else None
        settings = only.settings if only is not None else None
        alone = (
            settings is not None and settings.address.scheme in STRAIGHT and settings.verb != "listen"
        )  # a broadcast's sink is whoever joins
        choice = self.ways.from_source(scheme, copies=source.copies, alone=alone)
        if choice.method == "vmsplice" and source.c.left > 0:
            size = int(source.c.offset) + int(source.c.left)
            self._mapped = MappedFile(source.c.fd, size)
            source.c.memory = self._mapped.pointer()
        elif choice.method == "vmsplice":
            choice = Choice("splice", "an empty file cannot be mapped")
        source.c.method = {
            "splice": core.SPLICE,
            "copy": core.COPY,
            "sendfile": core.SENDFILE,
            "vmsplice": core.VMSPLICE,
        }[choice.method]
        self._source_choice = choice

    # -- what the pump reports

    def _event(self, what: int, error: int, _mask: int) -> None:
        if what in (core.SOURCE_ENDED, core.SOURCE_FAILED):
            self._source_is_over(error if what == core.SOURCE_FAILED else 0)
        elif what == core.SOURCE_COPIES:
            assert self.source is not None
            name = os_error_name(error)
            self._source_choice = Choice("copy", f"splice from {self.source.address} answered {name}")
        elif what == core.SOURCE_DRY:
            if self.source is not None and self.source.refill():
                self.engine.ready(self.c)
        elif what == core.IDLE:
            self._idle()
        elif what == core.DONE:
            self._done()

    def _source_is_over(self, error: int, broken_off: str = "") -> None:
        source = self.source
        assert source is not None
        self._source_over = True
        if self._clock is not None:
            self._clock.cancel()
        if broken_off:
            self._source_failed(broken_off)
        elif changed := source.changed():
            self._source_failed(changed, "send it again when nobody writes to it")
        elif error:
            self._source_failed("", "", error)
        elif source.c.left > 0:
            self._source_failed(f"it ended {source.c.left} bytes early")
        if self.c.keep:
            self.c.tell_idle = 1
            self.engine.ready(self.c)

    def _source_failed(self, reason: str, advice: str = "", code: int = 0) -> None:
        assert self.source is not None
        error = self.source.error("reading from", code, reason=reason, advice=advice)
        self._source_error = self._reason = str(error)
        log.warning("%s: %s", self.route, error)

    def _idle(self) -> None:
        """Between turns: nothing is under way, so what belongs to the stream alone can end."""
        for outlet in self.chain.outlets:
            if outlet.sink is None or not outlet.per_turn or outlet.listens:
                outlet.settled = True
            elif not outlet.settled:
                self._end_sink(outlet, outlet.sink)
        self._look_whether_over()

    def _done(self) -> None:
        """Every sink has had its end or failed. Without a failure of the source it need not be read further."""
        if not self._source_over:
            self._source_over = True
            self._ended_by = "sinks"
            self.c.paused = 1
        self._look_whether_over()

    def _sink_event(self, outlet: Outlet, sink: Sink, what: int, error: int) -> None:
        if what == core.SINK_DRAINED:
            self._end_sink(outlet, sink)
        elif what == core.SINK_FAILED:
            sink.broke(error)
        elif what == core.PEER_ENDED:
            sink.peer_ended()

    def _end_sink(self, outlet: Outlet, sink: Sink) -> None:
        """All this sink will get was handed to it: it is finished, after its checksum if it wants one."""
        if not self._source_error and self.source is not None and (changed := self.source.changed()):
            # pages under way are the file's own: the change may show in them
            self._source_failed(changed, "send it again when nobody writes to it")
        if self._source_error:
            sink.cut(self._source_error)
            return
        if outlet.digest is not None and isinstance(sink, FileSink):
            if not outlet.digest.digest:
                hidden = next(o for o in self.chain.outlets if o.stage is outlet.digest)
                if hidden.sink is not None and hidden.sink.state != "failed":
                    return  # _settled of the checksum comes back here
            sink.sidecar_line = sidecar_line(outlet.digest.algorithm, outlet.digest.digest)
        sink.finish()

    def _node_hearing(self, node: object) -> Callable[[int, int], None]:
        return lambda what, error: self._node_event(node, what, error)

    def _node_event(self, node: object, what: int, error: int) -> None:
        found = next(n for n in self.chain.nodes if n is node)
        if what == core.WANTS_COPY:
            found.copies(f"the kernel answered {os_error_name(error)}")
            self.engine.ready(self.c)
        elif what == core.BROKEN:
            self.abort(f"moving bytes between pipes: {os_error_name(error)}")
        elif what in (core.SLOW, core.CAUGHT_UP):
            for outlet in self.chain.outlets:
                if outlet.gate is found and not outlet.hidden:
                    self._judge(outlet, slow=what == core.SLOW)

    def _judge(self, outlet: Outlet, *, slow: bool) -> None:
        """A sink fell behind for too long, or has caught up again."""
        if not slow:
            outlet.caught_up(self.route)
        elif outlet.policy == "drop" or (outlet.policy == "disconnect" and outlet.down):
            log.warning("%s: sink %s is slow: dropping for it alone", self.route, outlet.name)
            outlet.drop()  # one that is down cannot be disconnected: it is in nobody's way until it is back
        elif outlet.policy == "disconnect":
            reason = outlet.slow_words()
            inside = [other for other in self.chain.outlets if outlet.gate in other.gates]
            if outlet.backoff is None:
                outlet.cut_off()
            for each in {id(other): other for other in (outlet, *inside)}.values():
                if each.sink is not None:
                    each.sink.abort(reason)
        else:
            log.warning("%s: sink %s is slow: it holds the source", self.route, outlet.name)
        self.engine.ready(self.c)

    # -- ending

    def _settled(self, outlet: Outlet, sink: Sink) -> None:
        """A sink finished or failed."""
        if self._waiting is not None and not any(other.opening for other in self.chain.outlets):
            self._waited()
        if outlet.sink is sink and sink.state == "failed" and self._away(outlet, sink):
            return
        if outlet.sink is not sink or outlet.settled:
            return
        outlet.settled = True
        node = outlet.node.c
        if node.sink == sink.c:
            node.sink = core.ffi.NULL
        said = self._aborting or self._quiet or self._source_error  # by somebody else already
        if sink.state == "failed" and not said:
            log.warning("%s: %s", self.route, sink.reason)
        outlet.gate.c.dropping = 0
        if not self._closed:
            self.engine.ready(self.c)
        visible = [o.sink for o in self.chain.outlets if not o.hidden]
        if not self.c.keep and all(s is not None and s.state == "failed" for s in visible):
            for other in self.chain.outlets:
                if other.hidden and other.sink is not None:
                    other.sink.abort("every sink failed")  # a checksum alone is no reason to go on reading
        if outlet.hidden:
            for other in self.chain.outlets:
                if other.digest is outlet.stage and other.sink is not None and self._drained(other):
                    self._end_sink(other, other.sink)
        self._look_whether_over()

    def _away(self, outlet: Outlet, sink: Sink) -> bool:
        """A standing sink broke: it is down, which is a slow sink, until it is connected again."""
        if outlet.backoff is None or self._ending or self._aborting or self._closed:
            return False
        wait = outlet.went_away()
        log.warning(
            "%s: sink %s is away (%s); it is tried again in %.1f s",
            self.route,
            outlet.name,
            sink.reason,
            wait,
            extra={"route": self.route, "sink": outlet.name, "lost": sink.lost, "reconnects": outlet.away},
        )
        self.engine.forget_token(sink.c.token)
        self.engine.later(wait, lambda: self._again(outlet, sink))
        return True

    def _again(self, outlet: Outlet, sink: Sink) -> None:
        if self._closed or outlet.sink is not sink:
            return
        if self._ending:
            outlet.settled = True
            outlet.node.c.sink = core.ffi.NULL
            self.engine.ready(self.c)
            self._look_whether_over()
            return
        sink.unwire()
        self._stand(outlet, self._made(outlet))
        self.engine.ready(self.c)

    def _drained(self, outlet: Outlet) -> bool:
        return bool(outlet.node.c.done) or (self._source_over and not outlet.node.c.held)

    def _look_whether_over(self) -> None:
        if self._closed or self._aborting:
            return
        everyone = all(outlet.settled for outlet in self.chain.outlets)
        if everyone and not self._source_over and not self.c.keep:
            self._source_over = True
            self._ended_by = "sinks"
        if not everyone or (not self._source_over and self.source is not None):
            return
        if any(group.members for group in self.subscribers) and not self.c.keep:
            return
        record = self._turn_over() if self.source is not None else None
        if not self.persistent or self._ending:
            self.close()
        if record is not None:  # last, so that whoever hears it finds the pipeline as it will stay
            self._on_over(record)

    def subscriber_left(self) -> None:
        """For Subscribers: one has ended."""
        self._look_whether_over()

    def _turn_over(self) -> SessionRecord:
        record = self._record()
        source, self.source = self.source, None
        self.c.source = core.ffi.NULL
        if source is not None:
            source.close(reset=record.result != "delivered" and not self._harmless())
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        for outlet in self.chain.outlets:
            if outlet.per_turn and outlet.sink is not None and not outlet.listens:
                self.engine.forget_token(outlet.sink.c.token)
                outlet.sink.unwire()
                outlet.sink = None
        return record

    def _harmless(self) -> bool:
        """Whether every sink that failed was one whose policy lets it."""
        return not self._source_error and all(
            outlet.sink is None or outlet.sink.state != "failed" or outlet.slow.policy != "block"
            for outlet in self.chain.outlets
        )

    def _record(self) -> SessionRecord:
        source, turn = self.source, self.turn
        sendfile = source is not None and source.c.method == core.SENDFILE
        sinks = [outlet.record(sendfile=sendfile) for outlet in self.chain.outlets if not outlet.hidden]
        stages = []
        for stage in self.chain.stages:
            said = stage.end()
            if said:
                stages.append({"stage": stage.name, **said})
        failed = sum(1 for sink in sinks if sink.result == "failed")
        whole = not self._source_error and not self._aborting
        result = (
            "delivered"
            if whole and not failed
            else "failed"
            if failed == len(sinks) or not whole
            else "partial"
        )
        return SessionRecord(
            route=self.route,
            id=turn.id if turn else "",
            source=source.address if source else "",
            peer=source.peer if source else "",
            bytes=source.moved if source else 0,
            seconds=time.monotonic() - self._began if self._began else 0.0,
            method=self._source_choice.method if not source else source.method_now,
            why_method=self._source_choice.reason,
            ended_by=self._ended_by,
            result=result,
            reason=self._reason,
            sinks=sinks,
            stages=stages,
            source_failed=bool(self._source_error),
        )

    def close(self) -> None:
        """Closes the chain and whatever sinks are still open. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        self.engine.forget(self.c)
        self.engine.forget_token(self.c.token)
        for group in self.subscribers:
            group.close()
        for outlet in self.chain.outlets:
            if outlet.sink is not None:
                self.engine.forget_token(outlet.sink.c.token)
                outlet.sink.close()
                outlet.sink.unwire()
        self.chain.close()
        self._on_closed()


def os_error_name(code: int) -> str:
    """EINVAL rather than 22."""
    import errno

    return errno.errorcode.get(code, str(code))
