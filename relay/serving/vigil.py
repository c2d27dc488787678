"""What a server does by the clock: signs of life for the service manager, and its own end when nobody needs it.

A sign of life is given when every engine has answered since the one before: a loop that hangs is seen by the manager,
which starts relay anew. Idle means that no stream is under way, nobody watches a broadcast, and no session ended within
the time given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from relay.engine import Engine
from relay.errors import UsageError
from relay.journal.record import SessionRecord
from relay.serving.notify import Notifier
from relay.serving.route import RunningRoute
from relay.units import parse_duration

SIGNS = 4  # of life in the time that the manager grants


def idle_time(text: str | None) -> float | None:
    """Seconds, for what the command line says. Raises UsageError."""
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--exit-idle: {error}") from error
    if seconds <= 0:
        raise UsageError("--exit-idle: it takes some time to be idle", hint="write one such as 60s")
    return seconds


class Vigil:
    """Looks after a server on its main thread. `exit_idle`: seconds without use after which it ends itself."""

    def __init__(self, notifier: Notifier | None = None, exit_idle: float | None = None) -> None:
        self.notifier = notifier or Notifier({})
        self._exit_idle = exit_idle
        self._engines: Sequence[Engine] = ()
        self._silent: set[Engine] = set()
        self._next_sign = 0.0
        self._used = 0.0  # when relay was last seen in use; set on engines' threads, too
        self._next_look = 0.0

    def begin(self, engines: Sequence[Engine]) -> None:
        """The engines run from here on."""
        self._engines = engines
        self._used = time.monotonic()
        self._ask()
        self._plan()

    def watched(self, on_record: Callable[[SessionRecord], None]) -> Callable[[SessionRecord], None]:
        """`on_record`, which notes that relay was in use."""
        if self._exit_idle is None:
            return on_record

        def noted(record: SessionRecord) -> None:
            self._used = time.monotonic()
            on_record(record)

        return noted

    @property
    def due(self) -> float | None:
        """Seconds until it wants to `look`; None if never."""
        times = [self._next_sign] if self.notifier.watchdog is not None else []
        times += [self._next_look] if self._exit_idle is not None else []
        return max(0.0, min(times) - time.monotonic()) if times and self._engines else None

    def look(self, routes: Iterable[RunningRoute]) -> bool:
        """Does what is due; True when nobody has needed relay for long enough."""
        now = time.monotonic()
        if self.notifier.watchdog is not None and self._engines and now >= self._next_sign:
            if not self._silent:
                self.notifier.alive()
                self._ask()
            self._next_sign = now + self.notifier.watchdog / SIGNS
        if self._exit_idle is None or not self._engines or now < self._next_look:
            return False
        if any(route.home.call(partial(_in_use, route)) for route in routes if not route.over.is_set()):
            self._used = max(self._used, now)
        self._plan()
        return now >= self._next_look

    def _plan(self) -> None:
        self._next_look = self._used + (self._exit_idle or 0.0)

    def _ask(self) -> None:
        """Whoever has not answered is silent."""
        self._silent = set(self._engines)
        for engine in self._engines:
            engine.post(partial(self._silent.discard, engine))

    def end(self) -> None:
        """The server ends: no more looking."""
        self._engines = ()


def _in_use(route: RunningRoute) -> bool:
    return route.in_use
