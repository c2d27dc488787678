"""A route at work: its listeners, its pipelines, whoever waits for a turn.

Each route has a home engine, where its listeners and its account of what runs live; a route whose connections
each get a pipeline spreads those over all engines. A source that is a file gets an engine of its own: reading a
file may wait for the disk, and then nothing else should.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from relay.config.models import Route
from relay.endpoints.base import Source
from relay.endpoints.broadcast import Broadcast
from relay.endpoints.line import Lines
from relay.endpoints.listening import Crowd
from relay.endpoints.make import accepted, make_source
from relay.endpoints.proxy_header import local_of
from relay.endpoints.socket import close_with_reset
from relay.engine import Engine
from relay.errors import EndpointError, RelayError
from relay.journal import logs
from relay.journal.record import SessionRecord
from relay.kernel.probe import machine
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.sinks import Making
from relay.serving.admission import Admission
from relay.serving.changes import Stages
from relay.serving.facts import Facts
from relay.serving.introductions import Introduced, Introductions
from relay.serving.names import Found
from relay.serving.pipelines import Pipelines
from relay.serving.reception import Reception, Take, nobody
from relay.serving.redial import Redial
from relay.serving.resumption import Resumption, ids
from relay.spill.spills import Spills
from relay.stages.stage import Turn
from relay.ways import Ways

log = logging.getLogger("relay.serve")


def new_turn(route: str, source: Source) -> Turn:
    """Names for a stream that begins now; ids count up for as long as this process lives."""
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return Turn(route, str(next(ids)), at, source.peer, source.name, source.local)


class RunningRoute:
    """One route at work: its listeners, its pipelines, whoever waits for a turn. Lives on its home engine.

    `on_done(route)` is called once when a route whose source ends has nothing left to do. `once`: a listening
    source takes one connection.
    """

    def __init__(
        self,
        name: str,
        route: Route,
        home: Engine,
        spread: Iterator[Engine],
        on_done: Callable[[RunningRoute], None],
        *,
        once: bool = False,
        on_record: Callable[[SessionRecord], None] = logs.session,
        spills: Spills | None = None,
        lines: Lines | None = None,
    ) -> None:
        self._spills = spills or Spills()
        self._lines = lines
        self.name = name
        self.route = route
        self.stages: Stages = route.stages + route.replies  # as they were changed since, see changes.py
        self.home = home
        self.records: list[SessionRecord] = []
        self.finite = once or route.source.verb == "read"
        self.cut_short = False
        self.failed: RelayError | None = None
        self._spread = spread
        self._on_done = on_done
        self._on_record = on_record
        self._once = once
        self._ways = Ways(machine(), route.method)
        self._persistent = route.turns() == "one" and not self.finite
        self._broadcasts = {
            id(sink): Broadcast(home, str(sink.address))
            for _place, sink in route.sinks()
            if sink.verb == "listen"
        }
        joins = [
            (sink, self._broadcasts[id(sink)].joined) for _, sink in route.sinks() if sink.verb == "listen"
        ]
        comes = [(route.source, self._accepted)] if route.source.verb == "listen" else []
        self.reception = Reception(home, name, [*joins, *comes], self._crowds())
        for sink, _join in joins:
            self._broadcasts[id(sink)].leave = partial(self.reception.finish_one, sink)
        self._standing: Pipeline | None = None
        self.pipelines = Pipelines()
        self._waiting: deque[Source] = deque()
        self._starting: dict[Source, Engine] = {}  # accepted or opening, without a pipeline so far
        self._aborted = ""
        self._own: Engine | None = None
        self._redial: Redial | None = None
        self._resumption = Resumption(home, name, route, self._spills, self._ways, self._look_whether_done)
        self._admission = Admission(name, route.source.limits)
        trust = route.source.proxy_protocol
        self._introductions = (
            Introductions(home, trust, self._admission, self._introduced, self._look_whether_done)
            if trust
            else None
        )
        self._names_peers = any(sink.proxy_protocol for _place, sink in route.sinks())
        self._ending = False
        self._done = False
        self.over = threading.Event()

    def open(self, found: Found | None = None, take: Take = nobody, *, wait: bool = False) -> None:
        """Binds every listener and opens the sinks that outlive a stream, and begins unless it is to `wait`.

        `found` is what the listeners' names mean, `take` may have sockets for them. Raises SourceError; see `bound`.
        """
        self.bind(found, take)
        self.stand()
        if not wait:
            self.begin()

    def bind(self, found: Found | None = None, take: Take = nobody) -> None:
        """The first half of `open`: every listener."""
        self.reception.open(found or {}, take)

    def stand(self) -> None:
        """The second half: what outlives a stream."""
        self._resumption.begin(standing=self._persistent)
        if self._persistent:
            self._standing = self._pipeline(self.home)
            self._standing.open(self._broadcasts)

    def begin(self) -> None:
        """Streams come in from now on. Once."""
        self.reception.accept()
        if self.route.source.verb == "connect" and not self.finite:
            self._redial = Redial(self.home, self.name, self._new_source, self._connected)
            self.home.post(self._redial.start)
        elif self.route.source.verb != "listen":
            self._read()

    def _crowds(self) -> Crowd | None:
        """For a route that takes many connections at once: who takes them."""
        return None

    @property
    def bound(self) -> list[str]:
        """The addresses it listens on, those of its sinks first."""
        return self.reception.bound

    def _pipeline(self, engine: Engine) -> Pipeline:
        pipeline: Pipeline
        waits, stages = self.route.wait_for_sinks or 0.0, self.stages

        def over(record: SessionRecord) -> None:
            self.home.post(lambda: self._over(record))

        def closed() -> None:
            self.home.post(lambda: self._closed(pipeline))

        pipeline = Pipeline(
            engine,
            self.name,
            stages,
            self.route.sink,
            self._ways,
            persistent=self._persistent,
            on_over=over,
            on_closed=closed,
            making=Making(
                patience=0.0 if self._persistent else waits,  # standing sinks are tried again in any case
                spill=partial(self._spills.sink, self._ways),
                lines=self._lines,
            ),
            wait=waits,
            limits=self.route.source.limits,
        )
        self.home.post(lambda: self._made(pipeline, stages))
        return pipeline

    def _made(self, pipeline: Pipeline, stages: Stages) -> None:
        self.pipelines.add(pipeline, stages, self.stages)
        if self._aborted:
            self._abort_pipeline(pipeline)

    def change(self, stages: Stages) -> None:
        """Some of its stages have other settings from now on; what is under way goes on by them."""
        before, self.stages = self.stages, stages
        self.pipelines.change(before, stages)

    def facts(self) -> Facts:
        """What there is to tell of it now. On its home engine."""
        over = "done" if self._done else "draining" if self._ending else ""
        return Facts(
            state="failed" if self.failed else over or ("" if self.reception.accepting else "starting"),
            listening=tuple(self.bound),
            connections=self._admission.connections,
            refused=self._admission.refused,
            waiting=len(self._waiting),
            resumed=self._resumption.left,
            pipelines=tuple(self.pipelines),
            sessions=(),
            failed=str(self.failed or ""),
        )

    def _closed(self, pipeline: Pipeline) -> None:
        self.pipelines.discard(pipeline)
        self._look_whether_done()

    # -- sources

    def _accepted(self, sock: socket.socket, peer: str) -> None:
        if self._introductions is not None and self._introductions.expects(peer):
            self._introductions.take(sock.detach(), peer)
        else:
            self._came(sock, peer, "", "")

    def _introduced(self, who: Introduced) -> None:
        """A proxy has said for whom it connects."""
        self._came(socket.socket(fileno=who.fd), who.peer, who.local, who.via)

    def _came(self, sock: socket.socket, peer: str, local: str, via: str) -> None:
        if not self._admission.admit(peer):
            close_with_reset(sock.detach())
            return
        if self._names_peers:
            local = local or local_of(sock.fileno())
        engine = self.home if self._persistent else next(self._spread)
        source = accepted(engine, self.route.source.address, sock, peer, local, self._ways)
        source.via = via
        source.on_close = lambda: self.home.post(partial(self._admission.leave, peer))
        source.on_fail = lambda error: self._refused(source, error)
        if self._once:
            self.reception.close(sources_only=True)
        if self._standing is not None:
            if self._standing.source is not None or self._waiting:
                log.info("%s: %s waits for its turn", self.name, peer)
            self._waiting.append(source)
            self._next_turn()
        else:
            self._start(engine, source)

    def _read(self) -> None:
        address = self.route.source.address
        engine = self.home
        if address.scheme in ("file", "stdio", "fd"):
            engine = self._own = Engine(f"{self.name}-reader")
            engine.start()
        source = self._new_source(engine)
        source.on_fail = lambda error: self.home.post(lambda: self._source_failed(source, error))
        self._start(engine, source)

    def _new_source(self, engine: Engine) -> Source:
        return make_source(engine, self.route.source.address, dead_after=self.route.source.dead_after)

    def _connected(self, source: Source) -> None:
        """The source that connects is open: a turn begins, or a pipeline of its own."""
        if self._ending:
            source.close(reset=True)
        elif self._standing is None:
            self._starting[source] = self.home
            self._start_here(self.home, source)
        elif self._standing.closed:
            source.close(reset=True)
        else:
            self._standing.begin(source, new_turn(self.name, source))

    def _source_failed(self, source: Source, error: EndpointError) -> None:
        self.failed = error
        log.error("%s: %s", self.name, error)
        self._started(source)

    def _start(self, engine: Engine, source: Source) -> None:
        """On the home engine: a pipeline for this source, on its engine."""
        self._starting[source] = engine
        source.on_open = lambda: self._start_here(engine, source)
        engine.post(source.open)

    def _refused(self, source: Source, error: EndpointError) -> None:
        """An accepted connection that cannot be watched; it was reset."""
        log.warning("%s: %s refused: %s", self.name, source.peer, error)
        self.home.post(lambda: self._started(source))
        self.home.post(self._next_turn)

    def _started(self, source: Source) -> None:
        """On the home engine: it has its pipeline, or never will."""
        self._starting.pop(source, None)
        self._look_whether_done()

    def _start_here(self, engine: Engine, source: Source) -> None:
        """On the source's engine, once the source is open."""
        pipeline: Pipeline | None = None
        try:
            pipeline = self._pipeline(engine)
            pipeline.open(self._broadcasts)
        except RelayError as error:
            log.warning("%s: %s refused: %s", self.name, source.peer, error)
            source.close(reset=True)
            if pipeline is not None:
                pipeline.close()
            failed = error
            self.home.post(lambda: self._not_started(source, failed))
            return
        pipeline.begin(source, new_turn(self.name, source))
        self.home.post(lambda: self._started(source))

    def _not_started(self, source: Source, error: RelayError) -> None:
        if self.finite:
            self.failed = error
        self._started(source)

    def _next_turn(self) -> None:
        standing = self._standing
        if standing is None or standing.source is not None or not self._waiting:
            return
        source = self._waiting.popleft()
        source.on_open = lambda: standing.begin(source, new_turn(self.name, source))
        source.open()

    def _over(self, record: SessionRecord) -> None:
        self._on_record(record)
        if self.finite:
            self.records.append(record)
        self._next_turn()
        self._look_whether_done()

    # -- reload

    def follow(self, old: RunningRoute) -> None:
        """Before it is opened: it takes the place of `old`, from which it may take what both have."""

    def leave(self) -> None:
        """Another took its place: no newcomers of any kind, then as `drain`."""
        self.reception.finish(sources_only=False)
        self.drain()

    def reopen(self) -> None:
        """Files that were moved away are opened anew, by every stream that writes one; so are sockets' files."""
        self.reception.rebind()
        self.pipelines.reopen()

    # -- ending

    def _stop_dialing(self) -> None:
        if self._redial is not None:
            self._redial.stop()

    @property
    def under_way(self) -> bool:
        """Whether a source connection is open or bytes wait; idle subscribers do not count."""
        waiting = self._waiting or self._starting or self._resumption or self._introductions
        return bool(waiting) or self.pipelines.busy

    @property
    def in_use(self) -> bool:
        """Whether anything is under way or anybody watches who has not ended its own stream."""
        return self.under_way or self.pipelines.watched

    def drain(self) -> None:
        """No new streams but those that wait in a backlog; those under way go on. What has none is finished at once."""
        self.reception.finish(sources_only=True)
        self._ending = True
        self._stop_dialing()
        self._look_whether_done()

    def abort(self, reason: str) -> None:
        """Ends everything now."""
        self._ending = True
        self._aborted = reason
        self._stop_dialing()
        self.reception.refuse()
        if self._introductions:
            self.cut_short = True
            self._introductions.abort(reason)
        if count := len(self._waiting):
            self.cut_short = True
            log.warning(
                "%s: %d connections that waited for their turn were reset: %s",
                self.name,
                count,
                reason,
                extra={"event": "refused", "route": self.name, "count": count},
            )
        while self._waiting:
            self._waiting.popleft().close(reset=True)
        for source, engine in self._starting.items():
            engine.post(partial(self._give_up, source))
        for pipeline in self.pipelines:
            self._abort_pipeline(pipeline)
        self.cut_short = self.cut_short or bool(self._resumption)
        self._resumption.stop(reason)
        self._look_whether_done()

    def _abort_pipeline(self, pipeline: Pipeline) -> None:
        self.cut_short = self.cut_short or pipeline.busy
        pipeline.engine.post(lambda: pipeline.abort(self._aborted))

    def _give_up(self, source: Source) -> None:
        """On the source's engine: if it has no pipeline so far it gets none."""
        if not source.c.reads:
            source.close(reset=True)
            self.home.post(lambda: self._started(source))

    def _look_whether_done(self) -> None:
        standing, more = self._standing, self._waiting or self._introductions
        if standing is not None and standing.source is None and self._ending and not (more or self._aborted):
            standing.finish()
        if self._done or self.pipelines or more or self._starting or self._resumption:
            return
        if self._ending or (self.finite and (self.failed or self.records)):
            self._done = True
            self.over.set()
            self._stop_dialing()
            self.reception.close()
            for broadcast in self._broadcasts.values():
                broadcast.close()
            self._on_done(self)

    def close(self) -> None:
        """Ends the engine that read a file, if there was one. On the main thread, when the route is done."""
        self.reception.close()
        if self._own is not None:
            self._own.stop()
            self._own = None
