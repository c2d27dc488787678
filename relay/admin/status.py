"""What there is to know of a running relay at one moment: frozen, plain, nothing in it is at work.

Sizes are in bytes, times in seconds; rates are None until two looks can be compared. What grows counts from when
the process began, finished sessions and those under way together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from relay.duplex.upstream import UpstreamState


@dataclass(frozen=True)
class Spill:
    """A log: bytes that wait in it, and for how long the oldest of them has. `directory` is "" for one in memory."""

    bytes: int
    age: float
    directory: str


@dataclass(frozen=True)
class SinkStatus:
    """A sink of a stream, or the same sink of all streams of a route together.

    `state` is opening, open, slow, away, finishing, failed, finished or none; `method` is how bytes leave to it.
    `bytes` it has, `backlog` wait for it, `dropped` it did not get by policy, `lost` broke with a connection.
    `subscribers`: how many read it now, and `given` what all of them ever got; None for a sink that is no broadcast.
    """

    sink: str
    address: str
    policy: str
    state: str = "none"
    method: str = ""
    why_method: str = ""
    bytes: int = 0
    rate: float | None = None
    backlog: int = 0
    blocked_seconds: float = 0.0
    dropped: int = 0
    lost: int = 0
    twice: int = 0
    reconnects: int = 0
    spill: Spill | None = None
    subscribers: int | None = None
    given: int | None = None
    reason: str = ""

    @property
    def drops(self) -> bool:
        """Whether its policy leaves bytes out."""
        return self.policy in ("drop", "disconnect")


@dataclass(frozen=True)
class HopStatus:
    """One place where bytes cross, and how: into relay (`source`), or out to a sink; and how many streams do."""

    hop: str
    method: str
    streams: int = 1


@dataclass(frozen=True)
class StageStatus:
    """A stage by the name that `relay set` knows it by; `now` is what can be changed of it, as it is."""

    stage: str
    kind: str
    now: Mapping[str, Any]


@dataclass(frozen=True)
class StreamStatus:
    """A stream under way, or a pipeline that waits for one (`id` is empty then)."""

    id: str
    peer: str
    seconds: float
    bytes: int
    method: str
    why_method: str
    hops: tuple[HopStatus, ...]
    sinks: tuple[SinkStatus, ...]
    rate: float | None = None


@dataclass(frozen=True)
class RouteStatus:
    """`state` is starting, waiting, flowing, held, draining, done or failed. `streams` counts those under way.

    `sessions` counts those that are over, by result; `hops` how many streams cross where and how. `details` are
    some of the streams, the oldest first. `upstreams` are those of a duplex route, `stages` those of both ways.
    `unanswered`: an engine did not answer in time, what it knows is as it was before.
    """

    name: str
    state: str
    duplex: bool
    source: str
    listening: tuple[str, ...]
    connections: int
    waiting: int
    refused: int
    streams: int
    bytes: int
    sessions: Mapping[str, int]
    sinks: tuple[SinkStatus, ...]
    hops: tuple[HopStatus, ...]
    details: tuple[StreamStatus, ...]
    rate: float | None = None
    bytes_back: int | None = None
    rate_back: float | None = None
    upstreams: tuple[UpstreamState, ...] = ()
    stages: tuple[StageStatus, ...] = ()
    resumed: int = 0
    failed: str = ""
    unanswered: bool = False


@dataclass(frozen=True)
class EngineStatus:
    """One loop: share of a CPU it used since the last look, and how long a question waited for its turn."""

    name: str
    cpu_seconds: float
    busy: float | None
    lag: float | None
    wakeups: int
    calls: int


@dataclass(frozen=True)
class Resources:
    """What the process holds against what it may. `pipe_pages` are those of pipes that are open here; the limit is
    for all pipes of the user (None: there is none)."""

    fds: int
    fds_limit: int
    pipes: int
    pipe_pages: int
    pipe_pages_limit: int | None
    memory: int


@dataclass(frozen=True)
class SessionStatus:
    """A session that is over, in a few words; `at` is when it ended, in seconds since the epoch."""

    at: float
    route: str
    id: str
    peer: str
    bytes: int
    bytes_back: int | None
    seconds: float
    method: str
    result: str
    ended_by: str
    reason: str
    text: str


@dataclass(frozen=True)
class Status:
    """All of it. `state` is starting, ready, draining or ended."""

    version: str
    pid: int
    state: str
    at: float
    uptime: float
    config: str
    routes: tuple[RouteStatus, ...]
    engines: tuple[EngineStatus, ...]
    resources: Resources
    recent: tuple[SessionStatus, ...]


def plain(value: Any) -> Any:
    """As lists, mappings and figures, for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value
