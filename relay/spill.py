"""A sink that reads through a log: it holds nobody until the log is full, and loses nothing when it is away.

    chain -> ferry -> log (append)            on the ferry's thread
                      log -> sink (sendfile)  a pipeline of its own, on an engine that may wait for the disk

What is promised: every byte, in order, at least once. A new connection goes on with the first byte that the peer's
kernel had not acknowledged, so at most one send queue comes twice. The pump notes the acknowledged position into a
page of the log after every send, so that this holds after SIGKILL as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from relay.delivery import Delivery
from relay.endpoints.base import Sink
from relay.endpoints.ferry import Ferry
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.endpoints.template import fill_path
from relay.engine import Engine
from relay.kernel import core
from relay.kernel.pipe import LARGEST_CAPACITY
from relay.log import Log, SpillDirectory
from relay.outlet import Outlet
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.units import show_size
from relay.ways import Ways

log = logging.getLogger("relay.spill")


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

    def reopen(self) -> None:
        """The file behind the log was moved away."""
        self.delivery.engine.post(self.delivery.reopen)

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
        self._lent: dict[str, list[Log]] = {}  # by route, without those that are known to be closed

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
            still = [lent for lent in self._lent.get(turn.route, ()) if not lent.closed.is_set()]
            self._lent[turn.route] = [*still, kept]
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

    def wait_for_ends(self, route: str, patience: float) -> bool:
        """Waits until every log that sinks of the route wrote is closed; False when that takes too long."""
        deadline = time.monotonic() + patience
        return all(
            lent.closed.wait(max(0.0, deadline - time.monotonic())) for lent in self._lent.get(route, ())
        )

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
