"""One direction of a session with stages: a pipeline whose source is one party and whose sink is the other."""

from __future__ import annotations

from collections.abc import Callable

from relay.duplex.party import Party, PartySink
from relay.endpoints.base import Sink
from relay.endpoints.proxy_header import make
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.pipeline.outlet import Outlet
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.sinks import Making, SinkMaker, Spilling
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.ways import Ways


class _Given(SinkMaker):
    """Makes the sinks of the tees. The one that stands for `settings` is there already."""

    def __init__(
        self,
        engine: Engine,
        route: str,
        ways: Ways,
        making: Making,
        settings: SinkSettings,
        sink: PartySink,
    ) -> None:
        super().__init__(engine, route, ways, persistent=False, how=making)
        self._settings = settings
        self._sink = sink

    def sink(self, outlet: Outlet, turn: Turn | None, *, again: bool = False) -> Sink:
        """The given one, or a new one."""
        return self._sink if outlet.settings is self._settings else super().sink(outlet, turn, again=again)


class Direction(Pipeline):
    """From `giver` to `taker`, whose descriptors stay with them. `heard(error)` is told that the giver's stream is
    over, and gives back the errno by which it is so in fact. `on_over(direction)` is called once `record` is there.
    """

    def __init__(
        self,
        engine: Engine,
        route: str,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        ways: Ways,
        spill: Spilling | None,
        *,
        giver: Party,
        taker: Party,
        heard: Callable[[Party, int], int],
        on_over: Callable[[], None],
    ) -> None:
        self.record: SessionRecord | None = None
        self.giver, self.taker = giver, taker
        self.heard_end = False
        self._header = 0  # bytes of a PROXY header, which are nobody's
        self._heard = heard
        self._told_over = on_over
        making = Making(spill=spill)
        super().__init__(
            engine, route, stages, sink, ways, persistent=False, on_over=self._recorded, making=making
        )
        self._makes = _Given(engine, route, ways, making, sink, taker.sink)
        (self.main,) = (outlet for outlet in self.chain.outlets if outlet.settings is sink)

    def start(self, turn: Turn) -> None:
        """Bytes flow from here on."""
        settings = self.main.settings
        if settings is not None and settings.proxy_protocol is not None:
            self._header = len(make(settings.proxy_protocol, turn.peer, turn.local))
        self.open()
        self.begin(self.giver.source, turn)

    @property
    def taken(self) -> int:
        """Bytes that the taker's kernel has."""
        return max(0, self.taker.sink.moved - self._header)

    @property
    def given(self) -> bool:
        """Whether the taker was given all that it will get, its end included."""
        ended = self.heard_end or self.record is not None
        return ended and self.taker.sink.state in ("finished", "cutting", "failed")

    @property
    def over_by_itself(self) -> bool:
        """Whether the pipeline is over without a word from either party: it could not begin, or broke."""
        return self.record is not None and self.taker.sink.state in ("opening", "open", "failed")

    @property
    def progress(self) -> tuple[int, int]:
        """What changes as long as the taker takes something."""
        return int(self.taker.sink.c.moved), self.taker.outstanding()

    def _source_is_over(self, error: int, broken_off: str = "") -> None:
        if not broken_off:
            self.heard_end = True
            error = self._heard(self.giver, error)
        super()._source_is_over(error, broken_off)

    def _settled(self, outlet: Outlet, sink: Sink) -> None:
        # what becomes of the parties is told in the session's record
        self._quiet = outlet is self.main
        super()._settled(outlet, sink)

    def _recorded(self, record: SessionRecord) -> None:
        self.record = record
        self._told_over()
