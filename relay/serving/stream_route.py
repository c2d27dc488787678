"""A route of one way at work: its pipelines, whoever waits for a turn.

A route whose connections each get a pipeline spreads those over all engines; where they take turns one pipeline stands
on the home engine. A source that is a file gets an engine of its own: reading a file may wait for the disk, and then
nothing else should.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

from relay.endpoints.base import Source
from relay.endpoints.broadcast import Broadcast
from relay.endpoints.listening import Accepted
from relay.endpoints.make import accepted, make_source
from relay.endpoints.proxy_header import local_of
from relay.endpoints.socket import close_with_reset
from relay.engine import Engine
from relay.errors import EndpointError, RelayError
from relay.journal.record import SessionRecord
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.sinks import Making
from relay.serving.changes import Stages
from relay.serving.facts import Facts
from relay.serving.introductions import Introduced
from relay.serving.names import End
from relay.serving.pipelines import Pipelines
from relay.serving.redial import Redial
from relay.serving.resumption import ids
from relay.serving.route import RunningRoute
from relay.stages.stage import Turn

log = logging.getLogger("relay.serve")


def new_turn(route: str, source: Source) -> Turn:
    """Names for a stream that begins now; ids count up for as long as this process lives."""
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return Turn(route, str(next(ids)), at, source.peer, source.name, source.local)


class StreamRoute(RunningRoute):
    """A route that moves each stream from its source to its sink, and to the sinks of its stages."""

    pipelines: Pipelines

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._persistent = self.route.turns() == "one" and not self.finite
        for _place, sink in self.route.sinks():
            if sink.verb == "listen":
                self._broadcasts[id(sink)].leave = partial(self.reception.finish_one, sink)
        self._standing: Pipeline | None = None
        self.pipelines = Pipelines()
        self._waiting: deque[Source] = deque()
        self._starting: dict[Source, Engine] = {}  # accepted or opening, without a pipeline so far
        self._aborted = ""
        self._own: Engine | None = None
        self._redial: Redial | None = None
        self._names_peers = any(sink.proxy_protocol for _place, sink in self.route.sinks())

    def _listens(self) -> list[tuple[End, Accepted]]:
        sinks = [sink for _place, sink in self.route.sinks() if sink.verb == "listen"]
        self._broadcasts = {id(sink): Broadcast(self.home, str(sink.address)) for sink in sinks}
        joins: list[tuple[End, Accepted]] = [(sink, self._broadcasts[id(sink)].joined) for sink in sinks]
        return [*joins, *super()._listens()]

    def stand(self) -> None:
        """The second half: what outlives a stream."""
        self._resumption.begin(standing=self._persistent)
        if self._persistent:
            self._standing = self._pipeline(self.home)
            self._standing.open(self._broadcasts)

    def begin(self) -> None:
        """Streams come in from now on. Once."""
        super().begin()
        if self.route.source.verb == "connect" and not self.finite:
            self._redial = Redial(self.home, self.name, self._new_source, self._connected)
            self.home.post(self._redial.start)
        elif self.route.source.verb != "listen":
            self._read()

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
        """As for every route; pipelines at work are told."""
        self.pipelines.change(self.stages, stages)
        super().change(stages)

    def facts(self) -> Facts:
        """What there is to tell of it now. On its home engine."""
        return replace(super().facts(), waiting=len(self._waiting))

    def _closed(self, pipeline: Pipeline) -> None:
        self.pipelines.discard(pipeline)
        self._look_whether_done()

    # -- sources

    def _let_in(self, connections: list[Introduced]) -> None:
        for who in connections:
            if self._admission.admit(who.peer):
                self._came(socket.socket(fileno=who.fd), who.peer, who.local, who.via)
            else:
                close_with_reset(who.fd)

    def _came(self, sock: socket.socket, peer: str, local: str, via: str) -> None:
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

    def reopen(self) -> None:
        """Files that were moved away are opened anew, by every stream that writes one; so are sockets' files."""
        super().reopen()
        self.pipelines.reopen()

    # -- ending

    def _stop_dialing(self) -> None:
        if self._redial is not None:
            self._redial.stop()

    @property
    def under_way(self) -> bool:
        """Whether a source connection is open or bytes wait; idle subscribers do not count."""
        return bool(self._waiting or self._starting) or self.pipelines.busy or super().under_way

    @property
    def in_use(self) -> bool:
        """Whether anything is under way or anybody watches who has not ended its own stream."""
        return self.under_way or self.pipelines.watched

    def drain(self) -> None:
        """As for every route; a source that connects is not connected again."""
        self._stop_dialing()
        super().drain()

    def abort(self, reason: str) -> None:
        """Ends everything now; what an earlier run left stays in its logs."""
        self._aborted = reason
        self._stop_dialing()
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
        super().abort(reason)

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
        if not (self.pipelines or self._waiting or self._starting):
            super()._look_whether_done()

    def _finished(self) -> None:
        self._stop_dialing()
        for broadcast in self._broadcasts.values():
            broadcast.close()

    def close(self) -> None:
        """Ends the engine that read a file, if there was one. On the main thread, when the route is done."""
        super().close()
        if self._own is not None:
            self._own.stop()
            self._own = None
