"""One cell at work: a pipeline between a source that is fed and sinks that are read from, and a look at the clocks.

Theory of operation. Everything is what a route has: real endpoints, a Pipeline, an Engine on a thread of its own.
The engine's thread looks at its own CPU clock, its counter of system calls and the sinks' bytes twice, between
two of its rounds: once the stream has flowed for a while, and again some time later. Setting up and ending are
not in the figures. Then the stream ends as any stream does, and every sink must have had every byte.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.bench.cell import MIB, Denied, Figures, Method, Outcome, Place
from relay.bench.ends import LOOP, Feeder, LoopedFile, LoopedMemory, Receivers, feeder
from relay.endpoints.base import Source
from relay.endpoints.socket import SocketSource
from relay.endpoints.stdio import InheritedSource
from relay.engine import Engine
from relay.errors import EndpointError, RelayError
from relay.journal.record import SessionRecord
from relay.kernel.arena import Arena
from relay.kernel.pipe import LARGEST_CAPACITY, enlarge
from relay.kernel.probe import machine
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.sinks import Making
from relay.stages.stage import Turn
from relay.stages.tee import Settings as TeeSettings
from relay.ways import Ways

STEP: Final = 0.002  # seconds between two looks whether it has flowed for long enough
LEAST: Final = 4 * MIB  # bytes to measure: slow cells last longer
LONGEST: Final = 2.0  # seconds, or those that were asked for, even where fewer bytes went
MOST_FILED: Final = 192 * MIB  # bytes written to files in one cell: then it has lasted long enough
DEADLINE: Final = 20.0  # seconds for a cell beyond those it is measured; one that hangs is an error


class Interrupted(Exception):
    """Somebody wants it to end."""


@dataclass(frozen=True)
class _Look:
    """What the clocks and counters say at one instant, on the engine's thread; `bytes` are a sink's, on average."""

    at: int
    cpu: int
    calls: int
    bytes: int

    @classmethod
    def now(cls, engine: Engine, pipeline: Pipeline) -> _Look:
        cpu = time.thread_time_ns()
        for thread in threading.enumerate():  # those that write files for this engine
            if thread.ident is not None and thread.name.startswith(f"{engine.name}-"):
                with contextlib.suppress(OSError):
                    cpu += time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))
        sinks = [outlet.sink for outlet in pipeline.chain.outlets if outlet.sink is not None]
        calls = int(engine.c.calls) + int(engine.c.wakeups) + sum(sink.calls for sink in sinks)
        # what came in may still be in relay's pipes, and its way out has cost nothing yet
        moved = [sink.moved for sink in sinks]
        return cls(time.monotonic_ns(), cpu, calls, sum(moved) // max(1, len(moved)))


@dataclass(frozen=True)
class Span:
    """How long one cell is measured, in seconds, and what goes before that; longer (LONGEST) until `least` bytes went,
    and no longer than `filed` bytes were written to files. `alone`: it has a route of its own, so that `auto` knows
    nothing of what others before it measured."""

    seconds: float
    warm: float
    filed: int = MOST_FILED
    least: int = LEAST
    alone: bool = False


class _Meter:
    """Two looks at a stream, as far apart as `span` says; then `then()`. Lives on the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        pipeline: Pipeline,
        span: Span,
        most: int,
        then: Callable[[], None],
    ) -> None:
        self._engine, self._pipeline = engine, pipeline
        self._span, self._most, self._then = span, most, then
        self.first: _Look | None = None
        self.last: _Look | None = None
        engine.later(span.warm, self._look)

    def _look(self) -> None:
        if self.last is not None or self._pipeline.closed:
            return
        now = _Look.now(self._engine, self._pipeline)
        if self.first is None:
            self.first = now if now.bytes else None
            self._engine.later(self._span.seconds if now.bytes and not self._most else STEP, self._look)
        elif not self._enough(now, self.first):
            self._engine.later(STEP, self._look)
        else:
            self.last = now
            self._then()

    def _enough(self, now: _Look, first: _Look) -> bool:
        lasted = (now.at - first.at) / 1e9
        if lasted >= max(LONGEST, self._span.seconds) or (self._most and now.bytes >= self._most):
            return now.bytes > first.bytes
        return lasted >= self._span.seconds and now.bytes - first.bytes >= self._span.least


class Bench:
    """What all cells share: the engine, a file and memory to be read over and over, which CPUs who has.

    Owns them until `close`. `stopped` is asked several times a second and ends a cell by Interrupted. `seconds` are how
    long each cell is measured.
    """

    def __init__(self, directory: Path, seconds: float, stopped: Callable[[], bool]) -> None:
        here = sorted(os.sched_getaffinity(0))
        self.pinned = len(here) > 1
        self._load = frozenset(here[1:]) if self.pinned else None
        self._directory = directory
        self._span = Span(seconds, max(0.005, seconds / 4))
        self._stopped = stopped
        self._undo = contextlib.ExitStack()
        self._number = 0
        content = os.urandom(MIB) * (LOOP // MIB)
        self._path = directory / "source"
        self._path.write_bytes(content)
        self._undo.callback(self._path.unlink, missing_ok=True)
        self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._undo.callback(os.close, self._file)
        self._arena = Arena(content)
        self._undo.callback(self._arena.close)
        self._engine = Engine("bench-engine")
        self._engine.start()
        self._undo.callback(self._engine.stop)
        if self.pinned:
            self._engine.call(lambda: os.sched_setaffinity(0, here[:1]))

    def close(self) -> None:
        """Ends the engine; no cell may be at work. Safe to call again."""
        self._undo.close()

    def run(self, place: Place, method: Method, span: Span | None = None) -> Outcome:
        """One cell, as long as `span` says, or as all. Raises Interrupted, KernelError when it cannot be set up,
        RelayError when bytes went astray."""
        if refused := _refused(place, method):
            return Denied(refused)
        self._number += 1
        directory = self._directory / str(self._number)
        directory.mkdir()
        try:
            return self._run(place, method, directory, span or self._span)
        finally:
            directory.rmdir()

    def _run(self, place: Place, method: Method, directory: Path, span: Span) -> Outcome:
        with contextlib.ExitStack() as undo:
            receivers = Receivers(place.to, place.sinks, directory, self._load)
            undo.callback(receivers.close)
            route = f"bench-{self._number}" if span.alone else "bench"
            cell = _Cell(self._engine, place, method, receivers, route)
            undo.callback(cell.close)
            feeds = self._source(cell, place, directory, undo)
            receivers.connect()
            receivers.start()
            if feeds is not None:
                feeds.start()
            most = span.filed // place.sinks if place.to == "file" else 0
            cell.measure(span, most, feeds)
            record = self._wait(cell, span.seconds)
            fed = None if feeds is None else feeds.feed.moved
            return cell.outcome(record, fed, receivers.counts())

    def _wait(self, cell: _Cell, seconds: float) -> SessionRecord:
        patience = DEADLINE + 2 * seconds
        until = time.monotonic() + patience
        while True:
            try:
                return cell.over.get(timeout=0.1)
            except queue.Empty:
                if self._stopped():
                    raise Interrupted from None
                if time.monotonic() > until:
                    raise RelayError(f"{cell.name}: it did not end within {patience:g} s") from None

    def _source(
        self, cell: _Cell, place: Place, directory: Path, undo: contextlib.ExitStack
    ) -> Feeder | None:
        """Begins the pipeline with its source; the feeder at the other end, where one is needed."""
        engine = self._engine
        if place.source == "memory":
            engine.call(lambda: cell.begin(LoopedMemory(engine, self._arena)))
            return None
        if place.source == "file":
            engine.call(lambda: cell.begin(LoopedFile(engine, str(self._path))))
            return None
        if place.source == "pipe":
            read, write = os.pipe2(os.O_CLOEXEC)
            feeds = feeder(write, place, self._file, self._load)
            undo.callback(feeds.close)
            enlarge(write, LARGEST_CAPACITY)
            try:
                engine.call(lambda: cell.begin(InheritedSource(engine, read)))
            finally:
                os.close(read)  # the source has opened it anew
            return feeds
        feeds = feeder(self._connected(cell, directory).detach(), place, self._file, self._load)
        undo.callback(feeds.close)
        return feeds

    def _connected(self, cell: _Cell, directory: Path) -> socket.socket:
        """A connection whose other end begins the pipeline."""
        engine, scheme, path = self._engine, cell.place.source, str(directory / "listener")
        family, address = (socket.AF_INET, ("127.0.0.1", 0)) if scheme == "tcp" else (socket.AF_UNIX, path)
        with socket.socket(family) as listening:
            listening.bind(address)
            listening.listen(1)
            sock = socket.socket(family)
            try:
                sock.connect(listening.getsockname())
                accepted, _ = listening.accept()
            except BaseException:
                sock.close()
                raise
            finally:
                Path(path).unlink(missing_ok=True)
        accepted.setblocking(False)
        source = SocketSource(engine, scheme, accepted, "bench")
        source.scheme = scheme
        engine.call(lambda: cell.begin(source))
        return sock


class _Cell:
    """The pipeline of one cell, from `begin` (on the engine's thread) to its record in `over`."""

    def __init__(
        self, engine: Engine, place: Place, method: Method, receivers: Receivers, route: str
    ) -> None:
        self.place = place
        self.method = method
        self.name = f"{place.hop} to {place.sinks}, {place.size} bytes, {method}"
        self.over: queue.Queue[SessionRecord] = queue.Queue()
        self._engine = engine
        self._receivers = receivers
        self._route = route
        self._source: Source | None = None
        self._pipeline: Pipeline | None = None
        self._meter: _Meter | None = None
        self._failed: EndpointError | None = None

    def begin(self, source: Source) -> None:
        """Opens the source and the pipeline behind it. Raises what stands in the way."""
        self._source = source
        source.on_fail = self._not_opened
        *tees, last = self._receivers.sinks
        stages = tuple(TeeSettings(to=sink) for sink in tees)
        ways = Ways(machine(), self.method)
        self._pipeline = Pipeline(
            self._engine, self._route, stages, last, ways,
            persistent=False, making=Making(in_place=True), quiet=True, on_over=self.over.put,
        )  # fmt: skip
        source.open()
        if self._failed is not None:
            raise self._failed
        if isinstance(source, LoopedFile | LoopedMemory):
            source.begin_loop()
        self._pipeline.open()
        self._pipeline.begin(source, Turn(route=self._route, id="0", time="", peer=source.peer))

    def _not_opened(self, error: EndpointError) -> None:
        self._failed = error

    def measure(self, span: Span, most: int, feeds: Feeder | None) -> None:
        """Lets it flow, looks at the clocks, and has the stream end; at `most` bytes (0: any) it has lasted enough."""
        source, pipeline, engine = self._source, self._pipeline, self._engine
        assert source is not None
        assert pipeline is not None

        def enough() -> None:
            if feeds is not None:
                feeds.feed.stop()
            if isinstance(source, LoopedFile | LoopedMemory):
                source.stop()
                engine.ready(pipeline.c)

        def begin() -> None:
            self._meter = _Meter(engine, pipeline, span, most, enough)

        engine.call(begin)

    def outcome(self, record: SessionRecord, fed: int | None, got: list[int] | None) -> Outcome:
        """The figures, or why it was denied. Raises RelayError when bytes are missing."""
        meter, moved = self._meter, record.bytes
        if record.result != "delivered":
            failed = next((sink.reason for sink in record.sinks if sink.reason), "")
            raise RelayError(f"{self.name}: {record.result}: {record.reason or failed}")
        counts = [sink.bytes for sink in record.sinks] if got is None else got
        wrong = [count for count in counts if count != moved]
        if wrong or (fed is not None and fed != moved) or len(counts) != self.place.sinks:
            raise RelayError(f"{self.name}: fed {fed}, moved {moved}, and sinks got {counts}")
        assert meter is not None
        first, last = meter.first, meter.last
        if first is None or last is None or last.bytes == first.bytes:
            raise RelayError(f"{self.name}: nothing flowed while it was measured")
        used, why = _used(record)
        if self.method not in ("auto", used):
            return Denied(why or f"it went by {used}")
        return Figures(
            bytes=last.bytes - first.bytes,
            seconds=(last.at - first.at) / 1e9,
            cpu_seconds=(last.cpu - first.cpu) / 1e9,
            calls_made=last.calls - first.calls,
            moved=moved,
            used=used,
            measured=record.measured,
        )

    def close(self) -> None:
        """Aborts what is still at work. From the main thread."""
        pipeline, source = self._pipeline, self._source
        if pipeline is not None and not pipeline.closed:
            self._engine.call(lambda: pipeline.abort("the measurement was broken off"))
        if source is not None and not source.closed:
            self._engine.call(lambda: source.close(reset=True))


def _used(record: SessionRecord) -> tuple[str, str]:
    """How the bytes went, in one word, and why where it was not as asked."""
    for sink in record.sinks:
        method, why = record.crossing(sink)
        if method != record.method:
            return method, why
    return record.method, record.why_method


def _refused(place: Place, method: Method) -> str:
    """Why the machine does not have this method; empty where it may work."""
    needs = {"splice": ["splice"], "sendfile": ["sendfile"], "vmsplice": ["vmsplice", "splice"]}.get(
        method, []
    )
    if place.sinks > 1 and method in ("splice", "vmsplice"):
        needs = [*needs, "tee"]
    return next((refused for call in needs if (refused := machine().refused(call))), "")
