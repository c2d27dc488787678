"""Standing sinks that are away: each is connected again, however often, for as long as its pipeline stands.

    open -> it breaks -> away -> (a jittered wait that grows) -> opening -> open, or away again

While it is away it is a slow sink: what is meant for it waits in its pipe, and then its policy decides. `block`
holds the source. `drop` and `disconnect` hold nobody for longer than `after`: a stream that has ended does not wait
for them either, what they still had coming is dropped and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from relay.backoff import Backoff
from relay.endpoints.base import Sink, nothing
from relay.engine import Engine, Timer
from relay.kernel import core
from relay.pipeline.outlet import Outlet

log = logging.getLogger("relay.pipeline")


class Absences:
    """Of one pipeline's standing sinks. `stand(outlet)` makes and opens the next sink there.

    `settle(outlet)`: the pipeline is ending and nothing waits for the sink that is away. `wake()` pumps the pipeline.
    """

    def __init__(
        self,
        engine: Engine,
        route: str,
        stand: Callable[[Outlet], None],
        settle: Callable[[Outlet], None],
        wake: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._route = route
        self._stand = stand
        self._settle = settle
        self._wake = wake
        self._retries: dict[Outlet, Timer] = {}
        self._graces: list[Timer] = []
        self._ending = False
        self._source_over = False

    def forgive(self, outlet: Outlet) -> None:
        """The sink that stands there may break: its place is held for the next one."""
        outlet.backoff = Backoff()
        outlet.node.c.hold = 1

    def begin(self, outlet: Outlet, sink: Sink) -> bool:
        """A sink broke: whether it is only away, and will be tried again."""
        if outlet.backoff is None or self._ending:
            return False
        wait = outlet.went_away()
        log.warning(
            "%s: sink %s is away (%s); it is tried again in %.1f s",
            self._route,
            outlet.name,
            sink.reason,
            wait,
            extra={"route": self._route, "sink": outlet.name, "lost": sink.lost, "reconnects": outlet.away},
        )
        self._engine.forget_token(sink.c.token)
        self._retries[outlet] = self._engine.later(wait, lambda: self._again(outlet, sink))
        if self._source_over:
            self._grace(outlet)
        return True

    def _again(self, outlet: Outlet, sink: Sink) -> None:
        del self._retries[outlet]
        if self._ending and not outlet.waiting:
            outlet.settled = True
            self._settle(outlet)
            return
        sink.unwire()
        self._stand(outlet)

    def source_ended(self, outlets: Sequence[Outlet]) -> None:
        """Nothing more will come in this turn: who is away and lets others pass is not waited for, after its grace."""
        self._source_over = True
        for outlet in outlets:
            if outlet.down:
                self._grace(outlet)

    def _grace(self, outlet: Outlet) -> None:
        if outlet.backoff is not None and outlet.policy in ("drop", "disconnect"):
            self._graces.append(self._engine.later(outlet.slow.after or 0.0, lambda: self._let_go(outlet)))

    def _let_go(self, outlet: Outlet) -> None:
        if outlet.down:
            outlet.put(core.ffi.NULL)  # the pump discards what has nowhere to go, and counts it
            self._wake()

    def next_turn(self, outlets: Sequence[Outlet]) -> None:
        """Another stream begins: who is away gets as much of it as its pipe holds."""
        self._source_over = False
        self._cancel(self._graces)
        for outlet in outlets:
            if outlet.backoff is not None and outlet.sink is not None:
                outlet.put(outlet.sink.c)

    def finish(self, outlets: Sequence[Outlet]) -> None:
        """The pipeline is ending: nobody for whom nothing waits is tried again."""
        self.source_ended(outlets)
        self._ending = True
        for outlet, timer in list(self._retries.items()):
            if not outlet.waiting and timer.action is not None:
                again = timer.action
                timer.cancel()
                again()

    def close(self) -> None:
        """Nobody is tried again."""
        self._ending = True
        self._cancel([*self._retries.values(), *self._graces])
        self._retries.clear()
        self._stand = self._settle = self._wake = nothing

    @staticmethod
    def _cancel(timers: list[Timer]) -> None:
        for timer in timers:
            timer.cancel()
        timers.clear()
