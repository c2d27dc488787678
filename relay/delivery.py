"""A log's way to its sink: over as many connections as it takes, each going on where the last one was acknowledged."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from relay.backoff import Backoff
from relay.endpoints.base import Sink, Source
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine, Timer
from relay.errors import RelayError
from relay.kernel import core
from relay.log import Cursor, Log
from relay.pipeline import Pipeline
from relay.record import SessionRecord
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.units import show_size
from relay.ways import Ways

log = logging.getLogger("relay.spill")

TORN = "the stream was cut off before its end"
LOOK = 0.1  # seconds between two looks at what the peer acknowledged, while something is under way


class LogSource(Source):
    """Reads a log from `position` on, and waits at its end for more; owns one descriptor, of one segment."""

    def __init__(self, engine: Engine, kept: Log, position: int) -> None:
        super().__init__(engine, "log")
        self.scheme = "file"
        self._log = kept
        self._start = position
        self.c.kind = core.INSTANT
        self.c.waits = 1
        self.began_at = position
        self.torn = ""
        self._base = 0  # position of the open segment's first byte
        self._whole = False

    def open(self) -> None:
        """Opens the segment that holds the position."""
        self._open_at(self._start)
        self.on_open()

    @property
    def position(self) -> int:
        """Of the next byte to be read."""
        return self._base + int(self.c.offset) if self.c.fd >= 0 else self._start

    def _open_at(self, position: int) -> None:
        fd, offset, available = self._log.at(position)
        old = self.detach()
        self.c.fd, self.c.offset, self.c.left, self.c.readable = fd, offset, available, 1
        self._base = position - offset
        if old >= 0:
            os.close(old)

    def refill(self) -> bool:
        """Looks for what was appended since; False when there is nothing new and more may come."""
        if self.closed or self.c.fd < 0:
            return False
        if self.c.left == 0:
            self._open_at(self.position)
        if self.c.left == 0 and self._whole:
            self.c.waits = 0
        self.c.readable = 1
        return bool(self.c.left) or self._whole

    def changed(self) -> str:
        """A stream that was cut off before its end must not be taken for whole."""
        return self.torn

    def whole(self) -> None:
        """Nothing more will be appended: the end of the log is the end of the stream."""
        self._whole = True


class Delivery:
    """Carries a log to its sink, over as many connections as it takes. Lives on `engine`.

    `on_done` is called once, on that engine, when the stream has ended and all of it was delivered. `patience`
    is for how many seconds in vain it tries again (None: for ever); then `on_fail` is called instead.
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
        on_done: Callable[[], None],
        patience: float | None = None,
    ) -> None:
        self.engine = engine
        self._patience = patience
        self._in_vain_since = 0.0
        self.route = route
        self._log = kept
        self._stages = stages
        self._sink = sink.model_copy(update={"on_slow": OnSlow(policy="block")})
        self._ways = ways
        self._turn = turn
        self.on_done = on_done
        self.on_fail: Callable[[str], None] = lambda _reason: None
        self._cursor: Cursor = kept.cursor()
        self._noted = kept.acknowledged_word()
        self._noted[0] = self._cursor.position
        self._pipeline: Pipeline | None = None
        self._source: LogSource | None = None
        self._end: Sink | None = None  # of the present connection, or the last
        self._backoff = Backoff()
        self._timer: Timer | None = None
        self._looker: Timer | None = None
        self._whole = False
        self._torn = False
        self._stopped = False
        self.reconnects = -1
        self.twice = 0

    @property
    def position(self) -> int:
        """Everything before it was acknowledged by the sink's peer."""
        return self._cursor.position

    @property
    def left(self) -> int:
        """Bytes still to be delivered."""
        return self._log.end - self._cursor.position

    def start(self) -> None:
        """Connects and delivers; again after every failure."""
        self._timer = None
        if self._stopped:
            return
        self.reconnects += 1
        self._end = None
        source = self._source = LogSource(self.engine, self._log, self._cursor.position)
        if self._torn:
            source.torn = TORN
        if self._whole:
            source.whole()
        try:
            pipeline = self._pipeline = Pipeline(
                self.engine,
                self.route,
                self._stages,
                self._sink,
                self._ways,
                persistent=False,
                on_over=self._over,
                quiet=True,
            )
        except RelayError as error:
            log.warning("%s: %s", self.route, error)
            self._again(0.0)
            return
        pipeline.open()
        source.open()
        pipeline.begin(source, self._turn)
        if pipeline.closed:
            return
        standing = self._end = pipeline.chain.outlets[-1].sink
        if standing is not None:
            standing.c.base = self._cursor.position
            standing.c.queues = int(self._sink.address.scheme == "tcp")
            standing.c.acknowledged = self._noted
        self._look()

    def _look(self) -> None:
        """What was acknowledged meanwhile need not be kept."""
        if self._looker is not None:
            self._looker.cancel()
        self._looker = None
        pipeline = self._pipeline
        if pipeline is None or pipeline.closed or self._stopped:
            return
        standing = pipeline.chain.outlets[-1].sink
        if standing is not None and standing.state in ("open", "finishing"):
            self._advance(standing.c.base + standing.moved - standing.under_way())
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

    def whole(self, *, torn: bool = False) -> None:
        """The stream has ended; `torn`: not of its own, so that the sink must not take it for whole."""
        self._whole, self._torn = True, torn
        if self._source is not None:
            if torn:
                self._source.torn = TORN
            self._source.whole()
            self.more()

    def _over(self, record: SessionRecord) -> None:
        pipeline, self._pipeline = self._pipeline, None
        assert pipeline is not None
        sink = record.sinks[-1]
        assert self._source is not None
        if not self._in_vain_since or sink.bytes > sink.lost:
            self._in_vain_since = self.engine.now
        self._advance(self._source.began_at + sink.bytes - sink.lost)
        if self._stopped:
            return
        delivered = sink.result == "delivered" or (self._torn and self.left == 0)
        if delivered and self._whole and self.left == 0:
            self._stopped = True
            self._cursor.close()
            self.on_done()
            return
        self.twice += sink.lost
        given_up = self._patience is not None and self.engine.now - self._in_vain_since >= self._patience
        if given_up or self._sink.address.scheme not in ("tcp", "unix", "fifo"):
            self._stopped = True
            self._cursor.close()
            self.on_fail(sink.reason)
            return
        log.warning(
            "%s: sink %s is away (%s); %s wait in the log",
            self.route,
            sink.sink,
            sink.reason or "it ended",
            show_size(self.left),
            extra={"route": self.route, "sink": sink.sink, "backlog": self.left},
        )
        end = self._end
        self._again(sink.seconds if end is not None and end.opened_at else 0.0)

    def _again(self, lasted: float) -> None:
        self._backoff.lasted(lasted)
        self._timer = self.engine.later(self._backoff.next(), self.start)

    def stop(self, reason: str) -> None:
        """Ends it where it stands; what is left stays in the log."""
        if self._stopped:
            return
        self._look()
        self._stopped = True
        for timer in (self._timer, self._looker):
            if timer is not None:
                timer.cancel()
        if self._pipeline is not None:
            self._pipeline.abort(reason)
        self._cursor.close()
