"""A log's way to its sink: over as many connections as it takes, each going on where the last one was acknowledged."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Literal

from relay.backoff import Backoff
from relay.endpoints.base import Sink
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import REACHED_AGAIN, SinkSettings
from relay.engine import Engine, Timer
from relay.errors import EndpointError, RelayError, SinkError
from relay.journal.record import SessionRecord
from relay.log.log import Cursor, Log
from relay.pipeline.outlet import CONNECTS
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.sinks import Making
from relay.spill.source import TORN, LogSource
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.units import show_size
from relay.ways import Ways

log = logging.getLogger("relay.spill")

LOOK = 0.02  # seconds between two looks at what the peer acknowledged, while something is under way

# After a connection broke: go on with the first byte that was not acknowledged; go on with what was not sent, as
# a sink without a log does; or fail.
Broken = Literal["resume", "rejoin", "fail"]


class Delivery:
    """Carries a log to its sink, over as many connections as it takes. Lives on `engine`.

    `on_done` is called once, on that engine, when the stream has ended and all of it was delivered. `patience`
    is for how many seconds in vain it tries again (None: for ever); then `on_fail` is called instead. `in_place`:
    a file with a plain path is written without `.part`.
    """

    def __init__(
        self,
        engine: Engine,
        route: str,
        kept: Log,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        ways: Ways,
        turn: Turn,
        *,
        broken: Broken = "resume",
        patience: float | None = None,
        in_place: bool = False,
    ) -> None:
        self.engine = engine
        self.route = route
        self.on_done: Callable[[], None] = lambda: None
        self.on_fail: Callable[[EndpointError], None] = lambda _error: None
        self._log = kept
        self._stages = stages
        self._sink = sink.model_copy(update={"on_slow": OnSlow(policy="block")})
        self._ways = ways
        self._turn = turn
        self._broken = broken
        self._patience = patience
        self._in_place = in_place
        self._in_vain_since = 0.0
        self._cursor: Cursor = kept.cursor()
        self._noted = kept.acknowledged_word()
        self._noted[0] = self._cursor.position
        self._pipeline: Pipeline | None = None
        self._source: LogSource | None = None
        self._standing: Sink | None = None
        self._backoff = Backoff()
        self._timer: Timer | None = None
        self._looker: Timer | None = None
        self._whole = False
        self._torn = False
        self._stopped = False
        self.method = "sendfile"
        self.path = ""  # where what it delivered can be found, if that is a file
        self.reconnects = 0
        self.twice = 0  # bytes that were sent again after a connection broke
        self._connects: tuple[float, ...] = ()
        self.lost = 0  # bytes that a broken connection had not acknowledged and that were not sent again

    @property
    def position(self) -> int:
        """Everything before it was acknowledged by the sink's peer, or is lost."""
        return self._cursor.position

    @property
    def left(self) -> int:
        """Bytes still to be delivered."""
        return self._log.end - self._cursor.position

    @property
    def connects(self) -> tuple[float, ...]:
        """How long each connect took, the present one's included. From any thread."""
        pipeline = self._pipeline
        return self._connects + (tuple(pipeline.chain.outlets[-1].connects) if pipeline is not None else ())

    @property
    def connected(self) -> bool:
        """Whether its sink is there. From any thread."""
        standing = self._standing
        return standing is not None and standing.state in ("open", "finishing", "cutting")

    def unread(self) -> int:
        """What the receiver's side has not taken of what was sent, as `Sink.unread`. On the delivery's engine."""
        return self._standing.unread() if self._standing is not None else 0

    def start(self) -> None:
        """Connects and delivers; again after every failure."""
        self._timer = None
        if self._stopped:
            return
        self._standing = None
        source = self._source = LogSource(self.engine, self._log, self._cursor.position)
        if self._torn:
            source.torn = TORN
        if self._whole:
            source.whole()
        try:
            pipeline = Pipeline(
                self.engine,
                self.route,
                self._stages,
                self._sink,
                self._ways,
                persistent=False,
                on_over=self._over,
                quiet=True,
                making=Making(in_place=self._in_place),
            )
        except RelayError as error:
            log.warning("%s: %s", self.route, error)
            self._again(0.0)
            return
        try:
            source.open()
        except OSError as error:
            pipeline.close()
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                self._unreadable(str(source.error("opening a segment of", error.errno or 0)))
                return
            log.warning("%s: reading the log for %s: %s", self.route, self._sink.address, error)
            self._again(0.0)
            return
        self._pipeline = pipeline
        pipeline.open()
        pipeline.begin(source, self._turn)
        standing = self._standing = pipeline.chain.outlets[-1].sink
        if pipeline.closed or standing is None:
            return
        standing.c.base = self._cursor.position
        standing.c.queues = int(self._sink.address.scheme == "tcp")
        if self._sink.address.scheme != "shared":  # what its thread has is not with the consumer yet
            standing.c.acknowledged = self._noted
        source.on_refill = self._look
        self._look()

    def _look(self) -> None:
        """What was acknowledged meanwhile need not be kept."""
        if self._looker is not None:
            self._looker.cancel()
        self._looker = None
        standing = self._standing
        if standing is None or self._source is None or self._stopped:
            return
        if standing.state in ("open", "finishing"):
            self._advance(self._source.began_at + standing.moved - standing.under_way())
        if self.left and self._pipeline is not None:
            self._looker = self.engine.later(LOOK, self._look)

    def _advance(self, position: int) -> None:
        if position > self._cursor.position:
            self._noted[0] = position
            self._cursor.advance(position)

    def more(self) -> None:
        """Something was appended."""
        source, pipeline = self._source, self._pipeline
        if source is not None and pipeline is not None and not pipeline.closed and source.refill():
            self.engine.ready(pipeline.c)
            if self._looker is None:
                self._look()

    def whole(self, *, torn: bool = False) -> None:
        """The stream has ended; `torn`: not of its own, so that the sink must not take it for whole."""
        self._whole, self._torn = True, torn
        if self._source is not None:
            if torn:
                self._source.torn = TORN
            self._source.whole()
            self.more()

    def _over(self, record: SessionRecord) -> None:
        self._pipeline = None
        sink = record.sinks[-1]
        self._connects = (*self._connects, *sink.connects)[:CONNECTS]
        assert self._source is not None
        self.method = record.crossing(sink)[0]
        self.path = sink.path
        if not self._in_vain_since or sink.bytes > sink.lost:
            self._in_vain_since = self.engine.now
        reached = self._source.began_at + sink.bytes
        if self._broken == "resume":
            if self._sink.address.scheme in ("tcp", "shared"):  # elsewhere what was accepted is the peer's
                self._advance(reached - sink.lost)
            else:
                self._advance(reached)
        else:
            self.lost += sink.lost
            self._advance(reached)
        if self._stopped:
            return
        delivered = sink.result == "delivered" or (self._torn and self.left == 0)
        if delivered and self._whole and self.left == 0:
            self._end(self.on_done)
            return
        self.twice += reached - self._cursor.position
        if record.source_failed and not self._torn:
            self._unreadable(record.reason)
            return
        given_up = self._patience is not None and self.engine.now - self._in_vain_since >= self._patience
        can_be_tried_again = self._sink.address.scheme in REACHED_AGAIN
        if self._broken == "fail" or given_up or not can_be_tried_again:
            failed = self._standing.failed_with if self._standing is not None else None
            address = str(self._sink.address)
            error = failed or SinkError(address, "writing to", 0, reason=record.reason or sink.reason)
            self._end(lambda: self.on_fail(error))
            return
        log.warning(
            "%s: sink %s is away (%s); %s wait in the log",
            self.route,
            sink.sink,
            sink.reason or "it ended",
            show_size(self.left),
            extra={"route": self.route, "sink": sink.sink, "backlog": self.left},
        )
        self.reconnects += bool(sink.bytes)
        standing = self._standing
        self._again(sink.seconds if standing is not None and standing.opened_at else 0.0)

    def _unreadable(self, reason: str) -> None:
        """The log cannot be read, and another connection would change nothing about that."""
        error = SinkError(str(self._sink.address), "delivering to", 0, reason=reason)
        self._end(lambda: self.on_fail(error))

    def _end(self, tell: Callable[[], None]) -> None:
        self._stopped = True
        self._cancel()
        self._cursor.close()
        tell()

    def _again(self, lasted: float) -> None:
        self._backoff.lasted(lasted)
        self._timer = self.engine.later(self._backoff.next(), self.start)

    def change(self, old: StageSettings, new: StageSettings) -> None:
        """A stage has other settings from now on, in this connection and in those to come."""
        self._stages = tuple(new if each is old else each for each in self._stages)
        if self._pipeline is not None and not self._pipeline.closed:
            self._pipeline.chain.change(old, new)
            self.engine.ready(self._pipeline.c)

    def reopen(self) -> None:
        """A file that was moved away is opened anew."""
        if self._pipeline is not None and not self._pipeline.closed:
            self._pipeline.chain.reopen()

    def _cancel(self) -> None:
        for timer in (self._timer, self._looker):
            if timer is not None:
                timer.cancel()
        self._timer = self._looker = None

    def stop(self, reason: str) -> None:
        """Ends it where it stands; what is left stays in the log. Safe to call again."""
        if self._stopped:
            return
        self._look()
        self._stopped = True
        self._cancel()
        if self._pipeline is not None:
            self._pipeline.abort(reason)
        self._cursor.close()
