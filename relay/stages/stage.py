"""What every stage at work has in common: the runtime beside the frozen settings.

A stage is wired to one node of the chain, which owns the stage's pipe. It sets the node's gate, its prefix, or
gives it a sink of the stage's own; the pump does the rest. One stage object lives as long as its pipeline and
sees a turn for every stream that passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relay.endpoints.base import Sink
from relay.engine import Engine
from relay.kernel import core

if TYPE_CHECKING:
    from relay.endpoints.options import OnSlow
    from relay.endpoints.settings import SinkSettings
    from relay.stages.base import StageSettings


@dataclass(frozen=True)
class Turn:
    """One stream passing through a pipeline: what names it in files, headers and records."""

    route: str
    id: str
    time: str
    peer: str
    name: str = ""
    local: str = ""  # where the peer connected to

    def values(self) -> Mapping[str, str]:
        """For placeholders in paths and headers."""
        return {"route": self.route, "id": self.id, "time": self.time, "peer": self.peer, "name": self.name}


@dataclass(frozen=True)
class Branch:
    """What a tee gives its stream to besides the chain."""

    stages: tuple[StageSettings, ...]
    to: SinkSettings
    on_slow: OnSlow


class Stage:
    """A stage that lets everything pass: the others override what they change.

    `of_a_stream`: what it does begins anew with each stream, so one must have left its node before the next comes.
    """

    of_a_stream = False

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        self.node: core.Struct = None
        self.engine: Engine | None = None

    @property
    def branch(self) -> Branch | None:
        """For a tee: where else the stream goes."""
        return None

    def sink(self, engine: Engine) -> Sink | None:
        """A sink of the stage's own that sees the stream of one turn; most stages have none."""
        del engine
        return None

    def wire(self, engine: Engine, node: core.Struct) -> None:
        """The stage's node exists from here on; it outlives the stage."""
        self.engine = engine
        self.node = node

    def begin(self, turn: Turn) -> None:
        """A stream begins."""

    def end(self) -> Mapping[str, Any]:
        """A stream has passed: what the stage has to say of it, for the session record."""
        return {}

    def change(self, settings: StageSettings) -> None:
        """What of it can be changed while it runs is as `settings` say, from now on. On its engine's thread."""

    def close(self) -> None:
        """The pipeline is gone."""
