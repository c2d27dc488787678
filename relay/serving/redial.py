"""A source that connects, and is connected again whenever its connection has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable

from relay.backoff import Backoff
from relay.endpoints.base import Source
from relay.engine import Engine, Timer
from relay.errors import EndpointError

log = logging.getLogger("relay.serve")


class Redial:
    """Makes one source after another, each with a name looked up anew; waits between two, longer and longer.

    The waits are short again after a connection that lasted. `make(engine)` gives a source that is not open yet;
    `opened(source)` owns it from when it is open. Lives on `engine`, the home of its route.
    """

    def __init__(
        self,
        engine: Engine,
        route: str,
        make: Callable[[Engine], Source],
        opened: Callable[[Source], None],
    ) -> None:
        self._engine = engine
        self._route = route
        self._make = make
        self._opened = opened
        self._backoff = Backoff()
        self._timer: Timer | None = None
        self._opening: Source | None = None
        self._stopped = False
        self.reconnects = 0

    def start(self) -> None:
        """Connects. Once; what follows is its own doing."""
        self._timer = None
        if self._stopped:
            return
        source = self._opening = self._make(self._engine)
        source.on_open = lambda: self._is_open(source)
        source.on_fail = lambda error: self._failed(source, error)
        source.open()

    def _is_open(self, source: Source) -> None:
        self._opening = None
        log.info(
            "%s: connected to %s",
            self._route,
            source.address,
            extra={"event": "connected", "route": self._route, "address": source.address},
        )
        source.on_close = lambda: self._engine.post(lambda: self._ended(source))
        self._opened(source)

    def _failed(self, source: Source, error: EndpointError) -> None:
        self._opening = None
        source.close()
        self._again(str(error))

    def _ended(self, source: Source) -> None:
        self._backoff.lasted(self._engine.now - source.opened_at)
        self._again("its connection has ended")

    def _again(self, why: str) -> None:
        if self._stopped:
            return
        self.reconnects += 1
        wait = self._backoff.next()
        log.warning(
            "%s: the source is away (%s); it is tried again in %.1f s",
            self._route,
            why,
            wait,
            extra={"route": self._route, "reconnects": self.reconnects},
        )
        self._timer = self._engine.later(wait, self.start)

    def stop(self) -> None:
        """Connects no more; a connection that is open goes on. Safe to call again."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._opening is not None:
            self._opening.close()
            self._opening = None
