"""The server: engines, routes at work, signals, reload, and the exit code."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from relay import logs
from relay.config.models import Config
from relay.engine import Engine
from relay.errors import ConfigError, ConfigErrors, EndpointError
from relay.fleet import Fleet, NotExchanged
from relay.news import News
from relay.record import SessionRecord
from relay.route import RunningRoute
from relay.settings import Place

if TYPE_CHECKING:
    from relay.config.load import Loaded  # and the YAML parser, which `relay run` does without

log = logging.getLogger("relay.serve")

ENDING = ("SIGTERM", "SIGINT")


def exit_code(routes: Iterable[RunningRoute]) -> int:
    """Send's codes: 4 a source failed, 5 every sink failed, 1 some did, 0 all was delivered."""
    routes = list(routes)
    records = [record for route in routes for record in route.records]
    if any(route.failed for route in routes) or any(record.source_failed for record in records):
        return 4
    sinks = [sink for record in records for sink in record.sinks]
    failed = sum(1 for sink in sinks if sink.result == "failed")
    if failed:
        return 5 if failed == len(sinks) else 1
    return 1 if any(record.result == "failed" for record in records) else 0


class Server:
    """All routes of a configuration at work. `run` returns the exit code; it is called on the main thread.

    `again` reads the configuration once more, for SIGHUP; without it only files are opened anew.
    """

    def __init__(
        self,
        config: Config,
        *,
        once: bool = False,
        on_record: Callable[[SessionRecord], None] = logs.session,
        on_ready: Callable[[list[RunningRoute]], None] = lambda _routes: None,
        again: Callable[[], Loaded] | None = None,
    ) -> None:
        self._config = config
        self._once = once
        self._on_record = on_record
        self._on_ready = on_ready
        self._again = again
        self._news: News[Callable[[], None]] = News()
        self._reload_asked = False
        self._interrupted = ""
        self._deadline: float | None = None
        self.signalled = 0

    def run(self) -> int:
        """Opens every route, serves until told to end or until nothing is left to do; 4 when one cannot open."""
        self._news.listen()
        previous = self._catch_signals()
        count = self._config.engines or len(os.sched_getaffinity(0))
        engines = [Engine(f"engine-{i}") for i in range(count)]
        self._fleet = Fleet(self._config, engines, self._done, self._on_record, once=self._once)
        try:
            if not self._fleet.open(lambda: bool(self._interrupted)):
                return self._not_opened()
            self._on_ready(list(self._fleet))
            for engine in engines:
                engine.start()
            return self._serve()
        finally:
            self._fleet.close()
            self._news.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _not_opened(self) -> int:
        if not self._interrupted:
            return 4
        self.signalled = int(signal.Signals[self._interrupted])
        log.info("%s came before relay was ready: it ends", self._interrupted, extra={"event": "drain"})
        return 0

    def _done(self, running: RunningRoute) -> None:
        self._news.tell(partial(self._fleet.forget, running))

    # -- signals

    def _catch_signals(self) -> dict[int, Any]:
        """SIGPIPE is ignored: splice has no MSG_NOSIGNAL. The others are news for the main thread."""

        def caught(number: int, _frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            if name in ENDING:
                self._interrupted = self._interrupted or name
                self._news.tell(partial(self._told_to_end, name))
            elif not self._reload_asked:  # several before one is looked at are one
                self._reload_asked = True
                self._news.tell(self._reload)

        found: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            found[number] = signal.signal(number, caught)
        found[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if hasattr(signal, "SIGXFSZ"):
            found[signal.SIGXFSZ] = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return found

    def _serve(self) -> int:
        while not self._fleet.done:
            deadline = self._deadline
            news = self._news.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if news is not None:
                news()
            else:
                self._deadline = None
                self._fleet.abort("the drain deadline passed")
        if self.signalled:
            return 1 if any(route.cut_short for route in self._fleet) else 0
        return exit_code(self._fleet)

    def _told_to_end(self, name: str) -> None:
        if self.signalled:
            self._fleet.abort(f"a second {name}")
            return
        self.signalled = int(signal.Signals[name])
        log.info("draining: %s, %g s at most", name, self._config.drain, extra={"event": "drain"})
        self._deadline = time.monotonic() + self._config.drain
        self._fleet.drain()

    # -- reload

    def _reload(self) -> None:
        self._reload_asked = False  # before the file is read: a signal from here on asks again
        if self.signalled:
            log.info("SIGHUP: relay is draining, nothing is reloaded")
            return
        before = dict(self._fleet.at_work)
        if self._again is not None:
            self._exchange(self._again)
        kept = tuple(name for name, route in self._fleet.at_work.items() if before.get(name) is route)
        self._fleet.reopen(kept)
        if self._again is None:
            log.info("SIGHUP: files are opened anew; there is no configuration file to read again")

    def _exchange(self, again: Callable[[], Loaded]) -> None:
        try:
            loaded = again()
        except (ConfigError, ConfigErrors) as error:
            self._refuse(error.errors if isinstance(error, ConfigErrors) else [error])
            return
        try:
            change = self._fleet.exchange(loaded.config)
        except NotExchanged as error:
            said = f"{loaded.where(_place(loaded.config, error))}: {error}"
            self._refuse([said])
            return
        if loaded.config.engines != self._config.engines:
            log.warning(
                "engines: %s takes a restart", loaded.config.engines, extra={"event": "restart_needed"}
            )
        self._config = loaded.config
        log.info("reloaded: %s", change, extra={"event": "reload", **change._asdict()})

    def _refuse(self, problems: Iterable[object]) -> None:
        for problem in problems:
            log.error("not reloaded: %s", problem, extra={"event": "reload_refused"})
        log.warning("the configuration stays as it was", extra={"event": "reload_refused"})


def _place(config: Config, error: NotExchanged) -> Place:
    """Where the configuration names what could not be opened; the route, where that cannot be told."""
    route, inner = config.routes[error.name], error.error
    base: Place = ("routes", error.name)
    if isinstance(inner, EndpointError):
        if inner.address == str(route.source.address):
            return (*base, "source", route.source.verb)
        for place, sink in route.sinks():
            if inner.address == str(sink.address):
                return (*base, *place, sink.verb)
    return base
