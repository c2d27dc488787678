"""A sink that reads through a log: it holds nobody until the log is full, and loses nothing when it is away.

    chain -> ferry -> log (append)            on the ferry's thread
                      log -> sink (sendfile)  a pipeline of its own, on an engine that may wait for the disk

What is promised: every byte, in order, at least once. A new connection goes on with the first byte that the peer's
kernel had not acknowledged, so at most one send queue comes twice. The pump notes the acknowledged position into a
page of the log after every send, so that this holds after SIGKILL as well.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from relay.backoff import Backoff
from relay.endpoints.base import Sink, Source
from relay.endpoints.ferry import Ferry
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.endpoints.template import fill_path
from relay.engine import Engine, Timer
from relay.errors import RelayError
from relay.kernel import core
from relay.kernel.pipe import LARGEST_CAPACITY
from relay.log import Cursor, Log, SpillDirectory
from relay.outlet import Outlet
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
        standing = pipeline.chain.outlets[-1].sink
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
        self._again(sink.seconds)

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


class SpillSink(Sink):
    """Where a spill's outlet stands: appends to the log; owns the ferry, and the log until its end is delivered."""

    def __init__(self, engine: Engine, address: str, kept: Log, deliver: Delivery) -> None:
        super().__init__(engine, address)
        self.log = kept
        self.delivery = deliver
        self._ferry: Ferry | None = None
        self._stop = False
        self._appending = False
        self._delivering = True
        self._begin = kept.end
        self.c.kind = core.FERRY
        deliver.on_done = lambda: engine.post(self._delivered)
        deliver.on_fail = lambda reason: engine.post(lambda: self._undeliverable(reason))

    @property
    def moved(self) -> int:
        """Bytes that the sink's peer has."""
        return max(0, self.delivery.position - self._begin)

    @property
    def method(self) -> str:
        """How bytes get out of the log."""
        return "sendfile"

    def open(self) -> None:
        """Starts to append and to deliver."""
        self._ferry = Ferry(self.engine, self.c, LARGEST_CAPACITY, self._append, self._appended)
        self.log.on_append = lambda: self.delivery.engine.post(self.delivery.more)
        self._appending = True
        self._ferry.start()
        self.delivery.engine.post(self.delivery.start)
        self.opened()

    def _append(self) -> None:
        """On the ferry's thread: every load goes to the log's tail, once there is room for it."""
        assert self._ferry is not None
        while True:
            pipe, load = self._ferry.wait()
            if not load or self._stop:
                return
            if not self.log.wait_for_room(load, lambda: self._stop):
                return
            while load:
                count = pipe.splice_to(self.log.tail(), load)
                self.log.appended(count)
                load -= count
            self._ferry.give_back()

    def _appended(self, _result: object, failed: BaseException | None) -> None:
        self._appending = False
        self._let_go()
        if failed is not None:
            code = getattr(failed, "errno", 0) or 0
            self.fail(self.error("appending to the log of", code, reason="" if code else str(failed)))
        elif self.state == "finishing":
            self.log.end_stream()
            self.delivery.engine.post(self.delivery.whole)

    def finish(self) -> None:
        """The stream is complete: the log gets the rest, and its delivery goes on until the sink has it all."""
        if self.state == "open" and self._ferry is not None:
            self.state = "finishing"
            self._ferry.end()

    def _undeliverable(self, reason: str) -> None:
        self.lost = self.delivery.left
        self.fail(self.error("writing to", 0, reason=reason))

    def _delivered(self) -> None:
        self.finished()
        self.log.close()

    @property
    def backlog(self) -> int:
        """Bytes that wait in the log."""
        return self.delivery.left

    def abort(self, reason: str) -> None:
        """Ends it; what is in a log on disk stays there for the next start."""
        left = self.delivery.left
        if self.log.directory is not None and left:
            reason = f"{reason}; {left} bytes wait in {self.log.directory}"
        elif self.log.directory is None:
            self.lost = left
        super().abort(reason)

    def unwire(self) -> None:
        """The pipeline is going away; the thread may still be at work."""
        super().unwire()
        if self._ferry is not None:
            self._ferry.release()

    def close(self) -> None:
        """Stops appending and delivering; a log on disk that is not empty is kept."""
        if self.closed:
            return
        self.closed = True
        if self.state == "finished":
            return
        self._stop = True
        self.log.wake_writer()
        if self._ferry is not None:
            self._ferry.end()
        self.delivery.engine.post(self._stop_delivery)

    def _stop_delivery(self) -> None:
        self.delivery.stop("relay ends")
        self.engine.post(self._delivery_stopped)

    def _delivery_stopped(self) -> None:
        self._delivering = False
        self._let_go()

    def _let_go(self) -> None:
        """Neither thread touches the log any more: what is on disk stays there."""
        if self._stop and not self._appending and not self._delivering:
            self.log.close(keep=True)


class Spills:
    """The logs of one relay: their directories, each locked once, and the engines that read disks.

    Made before routes open; `close` after they have ended. Thread-safe only in that each route asks on its own
    home engine.
    """

    def __init__(self) -> None:
        self._directories: dict[str, SpillDirectory] = {}
        self._readers: dict[str, Engine] = {}
        self._claimed: set[tuple[str, str]] = set()

    def _directory(self, path: str) -> SpillDirectory:
        key = str(Path(path).absolute())
        if key not in self._directories:
            self._directories[key] = SpillDirectory(path)
        return self._directories[key]

    def sink(
        self,
        ways: Ways,
        engine: Engine,
        turn: Turn,
        outlet: Outlet,
        persistent: bool,
        patience: float | None = None,
    ) -> SpillSink:
        """A sink for this stream that reads through a log; for `patience` see Delivery.

        Raises SinkError when the directory cannot be used.
        """
        sink, slow = outlet.settings, outlet.slow
        assert sink is not None
        if slow.directory is None:
            kept = Log(largest=slow.max or 0)
            reader = engine
        else:
            name = (
                prefix(turn.route, sink)
                if persistent
                else f"{prefix(turn.route, sink)}.{turn.time}-{turn.id}"
            )
            directory = self._directory(slow.directory)
            self._claimed.add((str(directory.path.absolute()), name))
            kept = directory.log(name, largest=slow.max or 0)
            reader = self._reader(turn.route)
        delivery = Delivery(reader, turn.route, kept, outlet.branch, sink, ways, turn, lambda: None, patience)
        return SpillSink(engine, str(sink.address), kept, delivery)

    def _reader(self, route: str) -> Engine:
        """The engine that reads the route's logs: reading a disk may wait, and then the chains should not."""
        if route not in self._readers:
            self._readers[route] = Engine(f"{route}-log")
            self._readers[route].start()
        return self._readers[route]

    def resume(
        self,
        route: str,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        slow: OnSlow,
        ways: Ways,
        turn: Callable[[], Turn],
    ) -> list[Delivery]:
        """Delivers what streams of an earlier run left in their logs; for a route with a log for each stream."""
        if slow.directory is None:
            return []
        directory = self._directory(slow.directory)
        begun = []
        for name in directory.found():
            key = (str(directory.path.absolute()), name)
            if not name.startswith(prefix(route, sink) + ".") or key in self._claimed:
                continue
            self._claimed.add(key)
            kept = directory.log(name)
            engine = self._reader(route)
            delivery = Delivery(engine, route, kept, stages, sink, ways, turn(), kept.close)
            log.info(
                "%s: %s of an earlier run go on to %s",
                route,
                show_size(delivery.left),
                sink.address,
                extra={"event": "resume", "route": route, "backlog": delivery.left},
            )
            ended = kept.ended_at
            engine.post(delivery.start)
            engine.post(partial(delivery.whole, torn=ended is None))
            begun.append(delivery)
        return begun

    def unclaimed(self) -> list[str]:
        """Logs that no route claims: kept, and named for the operator."""
        return [
            str(directory.path / name)
            for key, directory in self._directories.items()
            for name in directory.found()
            if (key, name) not in self._claimed
        ]

    def close(self) -> None:
        """Ends the reading engines and gives the directories up."""
        for engine in self._readers.values():
            engine.stop()
        for directory in self._directories.values():
            directory.close()


def prefix(route: str, sink: SinkSettings) -> str:
    """How the logs of a route's sink are named: reduced to what is safe in a file name."""
    return fill_path("{route}.{name}", {"route": route, "name": str(sink.address)})
