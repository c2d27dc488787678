"""What Prometheus is told: one table of figures, and how each is read off a status and the ledger.

Labels are bounded by the configuration: routes, sinks as it names them, the upstreams that it means now, engines, and
words out of fixed lists. No peer's address is in any. A counter never goes back while a route is at work: what ends
in the moment between two looks is missing in one of them at worst, and then the figure stays where it was.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from relay.admin.ledger import Histogram, RouteTotals
from relay.admin.status import RouteStatus, SinkStatus, Status
from relay.admin.streams import STATES
from relay.duplex.upstream import State, UpstreamState

Kind = Literal["counter", "gauge", "histogram"]
ROUTE_STATES = ("starting", "waiting", "flowing", "held", "draining", "done", "failed")


class Figure(NamedTuple):
    """One metric: its name (a counter's without `_total`), what it tells, the names of its labels."""

    name: str
    kind: Kind
    words: str
    labels: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """As it is scraped."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


R, S, E, U = ("route",), ("route", "sink"), ("engine",), ("route", "upstream")
UPSTREAM_STATES = get_args(State)
FIGURES = (
    Figure("relay_build_info", "gauge", "1; the version that runs", ("version",)),
    Figure("relay_ready", "gauge", "1 while new streams may come, 0 while relay starts or drains"),
    Figure("relay_pipes", "gauge", "Kernel pipes that this process has open"),
    Figure("relay_pipe_pages", "gauge", "Pages of memory of these pipes, at their full capacity"),
    Figure(
        "relay_pipe_pages_limit",
        "gauge",
        "Pages that all pipes of the user may have; absent where nothing limits",
    ),
    Figure("relay_engine_cpu_seconds", "counter", "CPU time that the engine's thread has used", E),
    Figure(
        "relay_engine_busy_ratio", "gauge", "Share of a CPU that the engine used between the last looks", E
    ),
    Figure(
        "relay_engine_loop_lag_seconds", "gauge", "How long a question to the engine waited for its turn", E
    ),
    Figure("relay_engine_wakeups", "counter", "Times that the engine's loop came back from waiting", E),
    Figure("relay_engine_payload_calls", "counter", "System calls that the engine made to move bytes", E),
    Figure(
        "relay_route_state", "gauge", "1 for the state that the route is in, 0 for the others", (*R, "state")
    ),
    Figure("relay_route_received_bytes", "counter", "Bytes that came from the route's sources", R),
    Figure(
        "relay_route_returned_bytes", "counter", "Bytes that went back to the sources of a duplex route", R
    ),
    Figure("relay_route_receive_rate_bytes_per_second", "gauge", "The first of these, as it was lately", R),
    Figure("relay_route_streams", "gauge", "Streams (or duplex sessions) under way", R),
    Figure("relay_route_connections", "gauge", "Connections that were let in and are not gone", R),
    Figure("relay_route_waiting_connections", "gauge", "Of these, those that wait for their turn", R),
    Figure("relay_route_refused_connections", "counter", "Connections that the route's limits kept out", R),
    Figure("relay_route_resumed_bytes", "gauge", "Bytes of an earlier run that wait in logs", R),
    Figure("relay_route_unanswered", "gauge", "1 when an engine was late: as it was before", R),
    Figure("relay_sessions", "counter", "Sessions that are over", (*R, "result", "ended_by", "reason")),
    Figure("relay_session_duration_seconds", "histogram", "How long sessions took that are over", R),
    Figure("relay_sink_sent_bytes", "counter", "Bytes that the sink got", S),
    Figure("relay_sink_send_rate_bytes_per_second", "gauge", "The same, as it was lately", S),
    Figure(
        "relay_sink_dropped_bytes",
        "counter",
        "Bytes the sink did not get, by policy or being gone",
        (*S, "reason"),
    ),
    Figure("relay_sink_lost_bytes", "counter", "Bytes that were sent and broke with a connection", S),
    Figure("relay_sink_repeated_bytes", "counter", "Bytes sent again after a connection broke", S),
    Figure("relay_sink_backlog_bytes", "gauge", "Bytes that wait for the sink, or its slowest subscriber", S),
    Figure("relay_sink_blocked_seconds", "counter", "For how long the way to the sink was full", S),
    Figure("relay_sink_reconnects", "counter", "How often the sink was connected again", S),
    Figure(
        "relay_sink_state", "gauge", "1 for the worst state the sink is in, 0 for the others", (*S, "state")
    ),
    Figure("relay_sink_subscribers", "gauge", "Who reads the broadcast now", S),
    Figure(
        "relay_sink_subscriber_sent_bytes",
        "counter",
        "Bytes that all subscribers of the broadcast got together",
        S,
    ),
    Figure("relay_sink_spill_bytes", "gauge", "Bytes in the sink's log", (*S, "place")),
    Figure(
        "relay_sink_spill_age_seconds",
        "gauge",
        "How long the oldest byte in the log has waited",
        (*S, "place"),
    ),
    Figure(
        "relay_sink_connect_duration_seconds",
        "histogram",
        "How long connects took of sessions that are over",
        S,
    ),
    Figure(
        "relay_upstream_state",
        "gauge",
        "1 for the state that the upstream of a duplex route is in, 0 for the others",
        (*U, "state"),
    ),
    Figure("relay_upstream_sessions", "gauge", "Sessions with the upstream, connecting or open", U),
    Figure("relay_upstream_failed_connects", "counter", "Connects of sessions that failed", U),
    Figure("relay_upstream_failed_checks", "counter", "Checks of the upstream that failed", U),
    Figure(
        "relay_hop_streams",
        "gauge",
        "Streams that cross at the hop by the method",
        (*R, "hop", "method"),
    ),
)
BY_NAME = {figure.name: figure for figure in FIGURES}

Row = tuple[str, tuple[str, ...], float]
Rows = Iterator[Row]


def table() -> str:
    """All of them as a Markdown table, for docs/admin.md."""
    lines = ["| metric | kind | labels | tells |", "|---|---|---|---|"]
    for figure in FIGURES:
        labels = ", ".join(f"`{label}`" for label in figure.labels)
        lines.append(f"| `{figure.shown}` | {figure.kind} | {labels} | {figure.words} |")
    return "\n".join(lines)


class Figures:
    """Remembers how far counters were. `text` from one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reached: dict[tuple[str, tuple[str, ...]], float] = {}

    def text(self, status: Status, totals: Mapping[str, RouteTotals], accept: str = "") -> tuple[bytes, str]:
        """What is scraped, in the format that `accept` (HTTP's header) asks for, and its content type."""
        encode, kind = choose_encoder(accept)
        registry = CollectorRegistry()
        registry.register(_Collected(list(self._families(status, totals))))
        ProcessCollector(registry=registry)
        return encode(registry), kind

    def _families(self, status: Status, totals: Mapping[str, RouteTotals]) -> Iterator[Metric]:
        sums: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        for name, labels, value in _rows(status, totals):
            of = sums[name]
            key = tuple(_readable(label) for label in labels)
            of[key] = of.get(key, 0.0) + value  # a route that leaves and its successor are one
        histograms = dict(_histograms(totals))
        with self._lock:
            for figure in FIGURES:
                if figure.kind == "histogram":
                    yield _histogram(figure, histograms.get(figure.name, []))
                    continue
                family: CounterMetricFamily | GaugeMetricFamily
                kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
                family = kind(figure.name, figure.words, labels=figure.labels)
                for key, value in sums[figure.name].items():
                    if figure.kind == "counter":
                        value = max(value, self._reached.get((figure.name, key), 0.0))
                        self._reached[figure.name, key] = value
                    family.add_metric(list(key), value)
                yield family
            self._forget({_readable(route.name) for route in status.routes})

    def _forget(self, here: set[str]) -> None:
        """Routes that left: one that comes again begins anew, which Prometheus knows how to read."""
        for place in list(self._reached) if here else []:
            name, labels = place
            if "route" in BY_NAME[name].labels and labels[0] not in here:
                del self._reached[place]


class _Collected(Collector):
    """Families that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        return self._families


def _readable(label: str) -> str:
    return label.encode(errors="replace").decode()


# -- reading them off


def _rows(status: Status, totals: Mapping[str, RouteTotals]) -> Rows:
    yield "relay_build_info", (status.version,), 1
    yield "relay_ready", (), status.state == "ready"
    held = status.resources
    yield "relay_pipes", (), held.pipes
    yield "relay_pipe_pages", (), held.pipe_pages
    if held.pipe_pages_limit is not None:
        yield "relay_pipe_pages_limit", (), held.pipe_pages_limit
    for engine in status.engines:
        own = (engine.name,)
        yield "relay_engine_cpu_seconds", own, engine.cpu_seconds
        if engine.busy is not None:
            yield "relay_engine_busy_ratio", own, engine.busy
        if engine.lag is not None:
            yield "relay_engine_loop_lag_seconds", own, engine.lag
        yield "relay_engine_wakeups", own, engine.wakeups
        yield "relay_engine_payload_calls", own, engine.calls
    told = set()
    for route in status.routes:
        if route.name not in told:
            told.add(route.name)
            yield from _of_state("relay_route_state", (route.name,), route.state, ROUTE_STATES)
        yield from _of_route(route)
    for name, of_route in totals.items():
        for (result, ended_by, reason), count in of_route.ends.items():
            yield "relay_sessions", (name, result, ended_by, reason), count


def _of_state(name: str, labels: tuple[str, ...], state: str, states: tuple[str, ...]) -> Rows:
    for each in states:
        yield name, (*labels, each), each == state


def _of_route(route: RouteStatus) -> Rows:
    own = (route.name,)
    yield "relay_route_received_bytes", own, route.bytes
    if route.bytes_back is not None:
        yield "relay_route_returned_bytes", own, route.bytes_back
    if route.rate is not None:
        yield "relay_route_receive_rate_bytes_per_second", own, route.rate
    yield "relay_route_streams", own, route.streams
    yield "relay_route_connections", own, route.connections
    yield "relay_route_waiting_connections", own, route.waiting
    yield "relay_route_refused_connections", own, route.refused
    yield "relay_route_resumed_bytes", own, route.resumed
    yield "relay_route_unanswered", own, route.unanswered
    for hop in route.hops:
        yield "relay_hop_streams", (route.name, hop.hop, hop.method), hop.streams
    for upstream in route.upstreams:
        yield from _of_upstream((route.name, upstream.upstream), upstream)
    for sink in route.sinks:
        yield from _of_sink((route.name, sink.sink), sink, leaves=route.state in ("draining", "done"))


def _of_upstream(own: tuple[str, str], one: UpstreamState) -> Rows:
    yield from _of_state("relay_upstream_state", own, one.state, UPSTREAM_STATES)
    yield "relay_upstream_sessions", own, one.sessions
    yield "relay_upstream_failed_connects", own, one.fails
    yield "relay_upstream_failed_checks", own, one.failed_checks


def _of_sink(own: tuple[str, str], sink: SinkStatus, *, leaves: bool) -> Rows:
    yield "relay_sink_sent_bytes", own, sink.bytes
    if sink.rate is not None:
        yield "relay_sink_send_rate_bytes_per_second", own, sink.rate
    yield "relay_sink_dropped_bytes", (*own, "policy" if sink.drops else "gone"), sink.dropped
    yield "relay_sink_lost_bytes", own, sink.lost
    yield "relay_sink_repeated_bytes", own, sink.twice
    yield "relay_sink_backlog_bytes", own, sink.backlog
    yield "relay_sink_blocked_seconds", own, sink.blocked_seconds
    yield "relay_sink_reconnects", own, sink.reconnects
    if not leaves:
        yield from _of_state("relay_sink_state", own, sink.state, STATES)
    if sink.subscribers is not None:
        yield "relay_sink_subscribers", own, sink.subscribers
        yield "relay_sink_subscriber_sent_bytes", own, sink.given or 0
    if sink.spill is not None:
        place = "disk" if sink.spill.directory else "memory"
        yield "relay_sink_spill_bytes", (*own, place), sink.spill.bytes
        yield "relay_sink_spill_age_seconds", (*own, place), sink.spill.age


def _histograms(
    totals: Mapping[str, RouteTotals],
) -> Iterator[tuple[str, list[tuple[tuple[str, ...], Histogram]]]]:
    yield "relay_session_duration_seconds", [((name,), of.durations) for name, of in totals.items()]
    yield (
        "relay_sink_connect_duration_seconds",
        [
            ((name, sink), one.connects)
            for name, of in totals.items()
            for sink, one in of.sinks.items()
            if one.connects.sum
        ],
    )


def _histogram(figure: Figure, found: Iterable[tuple[tuple[str, ...], Histogram]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(figure.name, figure.words, labels=figure.labels)
    for labels, histogram in found:
        buckets, below = [], 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family.add_metric([_readable(label) for label in labels], buckets, histogram.sum)
    return family
