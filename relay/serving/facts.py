"""What there is to tell of a route at one moment, as its home engine knows it."""

from __future__ import annotations

from dataclasses import dataclass

from relay.duplex.sessions import Sessions
from relay.duplex.upstream import UpstreamState
from relay.engine import Engine
from relay.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Facts:
    """`state` is starting, draining, done, failed or nothing of these. `connections` are admitted and not gone,
    `waiting` of them wait for their turn; `refused` counts those that limits kept out. `resumed`: bytes of an
    earlier run on their way. `pipelines` and `sessions` live on engines of their own: ask them there.
    """

    state: str
    listening: tuple[str, ...]
    connections: int
    refused: int
    waiting: int
    resumed: int
    pipelines: tuple[Pipeline, ...]
    sessions: tuple[tuple[Engine, Sessions], ...]
    failed: str
    upstreams: tuple[UpstreamState, ...] = ()
