"""Asks the engines what there is to know, and puts it together as one Status.

Theory of operation. What runs lives on the engines' threads, and only they may look at it. So the question goes to
them in two rounds: first each route's home engine says what the route is made of, then the engine of each pipeline
and of each crowd of sessions says how it stands. An engine answers in slices, with a turn of its loop between two,
so that streams wait for a slice at most. Whoever asks waits for so long and no longer: what an engine did not answer
in time is told as it was before, and said to be so.

Sums must not go back. So the sums of sessions that are over are read first: a session that ends in between is
missing for a moment, and is never there twice.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from relay import __version__
from relay.admin.ledger import Ledger, RouteTotals, SinkTotals
from relay.admin.resources import resources
from relay.admin.status import (
    EngineStatus,
    HopStatus,
    RouteStatus,
    SinkStatus,
    StageStatus,
    Status,
    StreamStatus,
)
from relay.admin.streams import combined, known_sinks, mirrors_of, stream_of
from relay.duplex.session import Session
from relay.duplex.sessions import Sessions
from relay.duplex.staged import StagedSessions
from relay.engine import Engine
from relay.pipeline.pipeline import Pipeline
from relay.serving.changes import named
from relay.serving.facts import Facts
from relay.serving.route import RunningRoute
from relay.serving.server import Server

log = logging.getLogger("relay.admin")

PATIENCE = 1.0  # seconds for all engines to answer
SLICE = 0.0005  # seconds that an engine looks at a time
DETAILS = 8  # streams of a route that are told one by one

REFUSED = "\0refused"  # beside the names of sinks
GROWING = ("bytes", "dropped", "lost", "twice", "reconnects", "blocked_seconds")  # of a sink
RESULTS = ("delivered", "partial", "failed")


class Round:
    """One question to many engines. `ask` them, then `wait`; what came too late is left out by whoever asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 1  # whoever asks is not done asking: the first may answer before the second is asked
        self._over = threading.Event()
        self.asked: set[Engine] = set()
        self.answered: set[Engine] = set()
        self.lag: dict[Engine, float] = {}

    def ask(self, engine: Engine, look: Iterator[None]) -> None:
        """`look` runs on the engine's thread, from one of its yields to a later one at a time."""
        with self._lock:
            self._open += 1
        self.asked.add(engine)
        posted = time.monotonic()

        def go_on() -> None:
            until = time.monotonic() + SLICE
            self.lag.setdefault(engine, time.monotonic() - posted)
            try:
                for _ in look:
                    if time.monotonic() >= until:
                        engine.later(0.0, go_on)  # posted at once it would run in this very turn of the loop
                        return
            except Exception:
                log.exception("looking at what runs on %s", engine.name)
            with self._lock:
                self.answered.add(engine)
            self._one_less()

        engine.post(go_on)

    def _one_less(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._over.set()

    def wait(self, until: float) -> None:
        """Until all that were asked have answered, or that time. Once."""
        self._one_less()
        self._over.wait(max(0.0, until - time.monotonic()))


@dataclass
class Crowd:
    """What the duplex sessions of a route sum up to, so far; and their mirrors, one by one."""

    methods: tuple[str, str] = ("", "")  # to the sink, and back
    sessions: int = 0
    bytes: int = 0
    back: int = 0
    mirrors: list[SinkStatus] = field(default_factory=list)


@dataclass
class Look:
    """One route in the making."""

    running: RunningRoute
    facts: Facts | None = None
    streams: dict[Pipeline, StreamStatus] = field(default_factory=dict)
    crowds: dict[Engine, Crowd] = field(default_factory=dict)
    engines: set[Engine] = field(default_factory=set)


class Inquiry:
    """Gathers what there is to know of `server`. `look` from any thread, one at a time."""

    def __init__(self, server: Server, ledger: Ledger, config: str, began: float) -> None:
        self._server = server
        self._ledger = ledger
        self._config = config
        self._began = began
        self._before: dict[RunningRoute, RouteStatus] = {}
        # what routes count themselves, as it was when last looked at; and that of those that are gone, by name
        self._counts: dict[RunningRoute, Counter[str]] = {}
        self._earlier: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def look(self, patience: float = PATIENCE) -> Status:
        """How it stands now, without rates."""
        until = time.monotonic() + patience
        server = self._server
        running = server.routes if server.state in ("ready", "draining") else []
        totals = self._ledger.totals(route.name for route in running)
        looks = [Look(route) for route in running]
        homes = self._first_round(looks, until)
        second = self._second_round(looks, until)
        answered = homes.answered & (second.answered | (homes.answered - second.asked))
        routes = []
        told = set()
        named_so = Counter(route.name for route in running)  # two, while a reload replaces one
        for look in looks:
            route, done = look.running, look.engines | {look.running.home}
            name = route.name
            status = _route(look, totals.get(name) if name not in told else None)
            told.add(name)
            before = self._before.get(route)
            if look.facts is None or not done <= (answered | second.answered):
                status = replace(before or status, unanswered=True)
            elif before is not None and named_so[name] == 1:
                status = _at_least(status, before)
            routes.append(status)
        self._before = dict(zip(running, routes, strict=True))
        self._count(running, routes)
        routes = [self._counted(route, status) for route, status in self._before.items()]
        return Status(
            version=__version__,
            pid=os.getpid(),
            state=server.state,
            at=time.time(),
            uptime=time.monotonic() - self._began,
            config=self._config,
            routes=tuple(routes),
            engines=tuple(_engine(engine, homes.lag.get(engine)) for engine in server.engines),
            resources=resources(),
            recent=self._ledger.recent(),
        )

    def _count(self, running: list[RunningRoute], routes: list[RouteStatus]) -> None:
        """A route that a reload exchanged begins to count anew, its figures do not."""
        for gone in [route for route in self._counts if route not in running]:
            self._earlier[gone.name] += self._counts.pop(gone)
        for route, status in zip(running, routes, strict=True):
            given = {sink.sink: sink.given for sink in status.sinks if sink.given}
            self._counts[route] = Counter({REFUSED: status.refused, **given})

    def _counted(self, running: RunningRoute, status: RouteStatus) -> RouteStatus:
        """With what those counted whose place it took."""
        earlier = self._earlier.get(running.name)
        if not earlier or not self._server.at_work(running):
            return status
        sinks = tuple(
            sink if sink.given is None else replace(sink, given=sink.given + earlier[sink.sink])
            for sink in status.sinks
        )
        return replace(status, refused=status.refused + earlier[REFUSED], sinks=sinks)

    def _first_round(self, looks: Iterable[Look], until: float) -> Round:
        asking = Round()
        by_home: dict[Engine, list[Look]] = {}
        if self._server.state in ("ready", "draining"):
            by_home = {engine: [] for engine in self._server.engines}
        for look in looks:
            by_home.setdefault(look.running.home, []).append(look)
        for engine, share in by_home.items():
            asking.ask(engine, _facts(share))
        asking.wait(until)
        return asking

    def _second_round(self, looks: Iterable[Look], until: float) -> Round:
        asking = Round()
        work: dict[Engine, list[Callable[[], Iterator[None]]]] = {}
        for look in looks:
            if look.facts is None:
                continue
            for pipeline in look.facts.pipelines:
                look.engines.add(pipeline.engine)
                work.setdefault(pipeline.engine, []).append(_pipeline(look, pipeline))
            for engine, sessions in look.facts.sessions:
                look.engines.add(engine)
                work.setdefault(engine, []).append(_sessions(look, engine, sessions))
        for engine, parts in work.items():
            asking.ask(engine, _all(parts))
        asking.wait(until)
        return asking


# -- on the engines


def _all(parts: Iterable[Callable[[], Iterator[None]]]) -> Iterator[None]:
    for part in parts:
        yield from part()


def _facts(looks: Iterable[Look]) -> Iterator[None]:
    for look in looks:
        look.facts = look.running.facts()
        yield


def _pipeline(look: Look, pipeline: Pipeline) -> Callable[[], Iterator[None]]:
    def steps() -> Iterator[None]:
        if not pipeline.closed:
            look.streams[pipeline] = stream_of(pipeline)
        yield

    return steps


def _sessions(look: Look, engine: Engine, sessions: Sessions) -> Callable[[], Iterator[None]]:
    def steps() -> Iterator[None]:
        crowd = look.crowds[engine] = Crowd(sessions.methods)
        live: list[Session] = sessions.live()
        crowd.bytes, crowd.back = sessions.untold
        for number, session in enumerate(live):
            if session.slot >= 0:
                sides = session.c.sides
                crowd.sessions += 1
                crowd.bytes += int(sides[0].given)
                crowd.back += int(sides[1].given)
            if number % 64 == 63:
                yield
        for number, way in enumerate(sessions.ways() if isinstance(sessions, StagedSessions) else ()):
            crowd.mirrors += mirrors_of(way)
            if number % 8 == 7:
                yield
        yield

    return steps


# -- putting it together


def _route(look: Look, totals: RouteTotals | None) -> RouteStatus:
    running, facts = look.running, look.facts
    totals = totals or RouteTotals()
    streams = sorted(look.streams.values(), key=lambda stream: -stream.seconds)
    live = [stream for stream in streams if stream.id]
    duplex = running.route.duplex
    crowd = Crowd()
    for one in look.crowds.values():
        crowd.sessions += one.sessions
        crowd.bytes += one.bytes
        crowd.back += one.back
        crowd.mirrors += one.mirrors
    sinks = tuple(_sinks(running, totals, streams, crowd))
    sessions: dict[str, int] = dict.fromkeys(RESULTS, 0)
    for (result, _ended_by, _reason), count in totals.ends.items():
        sessions[result] = sessions.get(result, 0) + count
    count = crowd.sessions if duplex else len(live)
    held = any(_holds(sink) for sink in sinks)
    return RouteStatus(
        name=running.name,
        state=(facts.state if facts else "") or ("held" if held else "flowing" if count else "waiting"),
        duplex=duplex,
        source=str(running.route.source.address),
        listening=facts.listening if facts else (),
        connections=facts.connections if facts else 0,
        waiting=facts.waiting if facts else 0,
        refused=facts.refused if facts else 0,
        streams=count,
        bytes=totals.bytes + sum(stream.bytes for stream in live) + crowd.bytes,
        sessions=sessions,
        sinks=sinks,
        hops=tuple(_hops(running, live, look.crowds.values())),
        details=tuple(streams[:DETAILS]),
        bytes_back=totals.back + crowd.back if duplex else None,
        upstreams=facts.upstreams if facts else (),
        stages=tuple(_stages(running)),
        resumed=facts.resumed if facts else 0,
        failed=facts.failed if facts else "",
    )


def _at_least(status: RouteStatus, before: RouteStatus) -> RouteStatus:
    """What only grows is no less than it was `before`: a session that has just ended is not in the ledger yet, and no
    longer at work."""
    earlier = {sink.sink: sink for sink in before.sinks}
    sinks = tuple(
        replace(
            sink, **{name: max(getattr(sink, name), getattr(earlier[sink.sink], name)) for name in GROWING}
        )
        if sink.sink in earlier
        else sink
        for sink in status.sinks
    )
    back = status.bytes_back if before.bytes_back is None else max(status.bytes_back or 0, before.bytes_back)
    return replace(status, bytes=max(status.bytes, before.bytes), bytes_back=back, sinks=sinks)


def _stages(running: RunningRoute) -> Iterator[StageStatus]:
    for name, stage in named(running.stages):
        now = {key: value for key in stage.changeable if (value := getattr(stage, key)) is not None}
        yield StageStatus(name, stage.kind, now)


def _holds(sink: SinkStatus) -> bool:
    """Whether it holds its source: one that is slow or away does under block, one behind a log when that is full."""
    return (sink.state == "slow" and not sink.drops) or (sink.state == "away" and sink.policy == "block")


def _hops(
    running: RunningRoute, live: Iterable[StreamStatus], crowds: Iterable[Crowd]
) -> Iterator[HopStatus]:
    """How many streams cross where and how."""
    counts: Counter[tuple[str, str]] = Counter()
    for stream in live:
        counts.update((hop.hop, hop.method) for hop in stream.hops)
    for crowd in crowds:
        there, back = crowd.methods
        counts[str(running.route.sink.address), there] += crowd.sessions
        counts["source", back] += crowd.sessions
        counts.update((mirror.sink, mirror.method) for mirror in crowd.mirrors if mirror.method)
    for (hop, method), count in sorted(counts.items()):
        if count:
            yield HopStatus(hop, method, count)


def _sinks(
    running: RunningRoute, totals: RouteTotals, streams: list[StreamStatus], crowd: Crowd
) -> Iterator[SinkStatus]:
    """Each sink of the route once, as all its streams together have it."""
    by_label: dict[str, list[SinkStatus]] = {}
    for stream in streams:
        for sink in stream.sinks:
            by_label.setdefault(sink.sink, []).append(sink)
    for mirror in crowd.mirrors:
        by_label.setdefault(mirror.sink, []).append(mirror)
    for name, address, policy in known_sinks(running.route):
        over = totals.sinks.get(name, SinkTotals())
        here = combined(name, address, policy, by_label.get(name, []))
        if name == str(running.route.sink.address):
            state = "open" if crowd.sessions and here.state == "none" else here.state
            here = replace(here, state=state, bytes=here.bytes + crowd.bytes)
        yield replace(
            here,
            bytes=over.bytes + here.bytes,
            dropped=over.dropped + here.dropped,
            lost=over.lost + here.lost,
            twice=over.twice + here.twice,
            reconnects=over.reconnects + here.reconnects,
            blocked_seconds=over.blocked_seconds + here.blocked_seconds,
        )


def _engine(engine: Engine, lag: float | None) -> EngineStatus:
    return EngineStatus(
        name=engine.name,
        cpu_seconds=engine.cpu_seconds,
        busy=None,
        lag=lag,
        wakeups=int(engine.c.wakeups),
        calls=int(engine.c.calls),
    )
