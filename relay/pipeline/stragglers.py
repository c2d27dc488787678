"""Who holds the end of a stream: sinks that are to hold nobody, and take nothing once the source has ended.

While a stream runs a sink is slow when its backlog was full for `after`. At its end nothing fills the backlog any
more, and a receiver that has stopped would be waited for without end. So from there on a sink under `drop` or
`disconnect` is slow when it took nothing for `after`. `disconnect` ends it; `drop` drops what it had still to get, and
gives it a moment to take what was sent and the end of the stream, or to come at all, before it is ended as well. What
was dropped is counted, and what was sent and not acknowledged is lost.
`block` and `spill` wait; so does whoever writes a file, whose disk is not stopped by a receiver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from relay.endpoints.base import nothing
from relay.endpoints.options import OnSlow
from relay.endpoints.socket import GRACE
from relay.engine import Engine, Timer
from relay.kernel import core
from relay.pipeline.outlet import Outlet

log = logging.getLogger("relay.pipeline")

SHORTEST = 0.05  # seconds between two looks, however short `after` is

Seen = tuple[str, int, int, int]


class Stragglers:
    """Of one pipeline that carries one stream. `wake()` pumps the pipeline."""

    def __init__(self, engine: Engine, route: str, wake: Callable[[], None]) -> None:
        self._engine = engine
        self._route = route
        self._wake = wake
        self._timers: dict[Outlet, Timer] = {}

    def source_ended(self, outlets: Sequence[Outlet]) -> None:
        """Nothing more will come: each that may hold nobody is watched, with all that its policy covers."""
        for head in outlets:
            if head.slow.policy not in ("drop", "disconnect"):
                continue
            for outlet in [head, *(other for other in outlets if head.gate in other.gates)]:
                if outlet not in self._timers and _receives(outlet):
                    self._watch(outlet, head.slow)

    def _watch(self, outlet: Outlet, slow: OnSlow) -> None:
        seen = _seen(outlet)
        wait = max(slow.after or 0.0, SHORTEST)
        if seen[0] != "open" and slow.policy == "drop":  # it has all that it will get, or is not there so far
            wait = max(wait, GRACE)
        self._timers[outlet] = self._engine.later(wait, lambda: self._look(outlet, slow, seen, wait))

    def _look(self, outlet: Outlet, slow: OnSlow, before: Seen, waited: float) -> None:
        sink = outlet.sink
        if outlet.settled or sink is None or sink.state not in ("opening", "open", "finishing"):
            return
        waits = sink.state == "opening" or outlet.node.c.held or sink.backlog or sink.unread()
        if not waits or _seen(outlet) != before:
            self._watch(outlet, slow)
            return
        reason = f"took nothing for {waited:.3g} s after the end of the stream"
        log.warning("%s: sink %s %s: it is not waited for", self._route, outlet.name, reason)
        torn = (int(outlet.gate.c.passed) - int(outlet.node.c.held)) % slow.align  # in the middle of a piece
        if sink.state == "open" and slow.policy == "drop" and not (torn and sink.c.kind == core.FERRY):
            outlet.node.c.sink = core.ffi.NULL  # the pump discards what has nowhere to go, and counts it
            if torn:
                sink.cut(reason)
            else:
                sink.finish()
                self._watch(outlet, slow)
        else:
            sink.abort(reason)
        self._wake()

    def close(self) -> None:
        """Watches nobody any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._wake = nothing


def _receives(outlet: Outlet) -> bool:
    """Whether somebody else takes what it gets, who may have stopped."""
    settings = outlet.settings
    return settings is not None and (settings.verb == "connect" or settings.address.scheme == "fifo")


def _seen(outlet: Outlet) -> Seen:
    """What changes as long as its receiver takes something."""
    sink = outlet.sink
    return (sink.state, sink.moved, int(sink.c.moved), sink.unread()) if sink is not None else ("", 0, 0, 0)
