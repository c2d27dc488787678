"""Makes the sinks that stand at a pipeline's outlets, and names the files they write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from relay.endpoints.base import Sink
from relay.endpoints.line import Lines
from relay.endpoints.make import make_sink
from relay.endpoints.settings import SinkSettings
from relay.endpoints.template import fill_path
from relay.engine import Engine
from relay.errors import RelayBug, SinkError
from relay.pipeline.outlet import Outlet
from relay.stages.stage import Turn
from relay.ways import Ways

# makes the sink that reads through a log: (engine, turn, outlet, persistent) -> Sink
Spilling = Callable[[Engine, Turn, Outlet, bool], Sink]


class FailedSink(Sink):
    """Stands for a sink that could not be made."""

    def __init__(self, engine: Engine, error: SinkError) -> None:
        super().__init__(engine, error.address)
        self._error = error

    def open(self) -> None:
        """Fails, once whoever stands it up is done."""
        self.engine.post(lambda: self.fail(self._error))


@dataclass(frozen=True)
class Making:
    """How a pipeline's sinks are made. `patience`: for how long a refused connect is tried again; `spill` makes those
    that read through a log; `in_place`: a file with a plain path is written without `.part`, as it always is if the
    pipeline is persistent; `lines` is where one that is persistent waits to append to a file."""

    patience: float = 0.0
    spill: Spilling | None = None
    in_place: bool = False
    lines: Lines | None = None


class SinkMaker:
    """What all sinks of one pipeline have in common."""

    def __init__(self, engine: Engine, route: str, ways: Ways, persistent: bool, how: Making) -> None:
        self._engine = engine
        self._route = route
        self._ways = ways
        self._persistent = persistent
        self._how = how
        self._writer = how.lines.writer(route) if persistent and how.lines is not None else None

    def sink(self, outlet: Outlet, turn: Turn | None, *, again: bool = False) -> Sink:
        """A new sink for `outlet`, not open yet; the turn names its file. `again`: it follows one that broke.

        Raises SinkError for a log's directory, unless it is one stream's failure or can be tried again.
        """
        turn = turn or Turn(route=self._route, id="0", time="", peer="")
        settings = outlet.settings
        if settings is None:
            assert outlet.stage is not None
            hidden = outlet.stage.sink(self._engine)
            assert hidden is not None
            return hidden
        if outlet.slow.policy == "spill" or outlet.slow.buffer:
            if self._how.spill is None:
                raise RelayBug("a route that spills was given no logs")
            try:
                return self._how.spill(self._engine, turn, outlet, self._persistent)
            except SinkError as error:
                if self._persistent and not again:
                    raise
                return FailedSink(self._engine, error)  # this stream's failure, and nobody else's
        way = self._ways.to_sink(settings.address.scheme)
        return make_sink(
            self._engine,
            settings,
            names(settings, turn),
            in_place=(self._persistent or self._how.in_place) and not settings.placeholders,
            writer=self._writer,
            copies=way.reason if way.method == "copy" else "",
            patience=self._how.patience,
        )


def names(settings: SinkSettings, turn: Turn) -> Callable[[], str]:
    """Gives a name for each file that begins: the stream's own time for the first, the present for those after."""
    path = settings.address.path
    values = dict(turn.values())

    def name() -> str:
        if not settings.placeholders:
            return path
        filled = fill_path(path, values)
        values["time"] = ""
        return filled

    def later() -> str:
        if not values["time"]:
            values["time"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        return name()

    return later
