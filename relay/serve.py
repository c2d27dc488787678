"""The server: engines, routes at work, signals, reload, and the exit code."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from relay import logs
from relay.config.models import Config
from relay.engine import Engine
from relay.errors import RelayError
from relay.news import News
from relay.record import SessionRecord
from relay.route import RunningRoute
from relay.spills import Spills

log = logging.getLogger("relay.serve")


def exit_code(routes: list[RunningRoute]) -> int:
    """Send's codes: 4 a source failed, 5 every sink failed, 1 some did, 0 all was delivered."""
    records = [record for route in routes for record in route.records]
    if any(route.failed for route in routes) or any(record.source_failed for record in records):
        return 4
    sinks = [sink for record in records for sink in record.sinks]
    failed = sum(1 for sink in sinks if sink.result == "failed")
    if failed:
        return 5 if failed == len(sinks) else 1
    return 1 if any(record.result == "failed" for record in records) else 0


class Server:
    """All routes of a configuration at work. `run` returns the exit code; it is called on the main thread."""

    def __init__(
        self,
        config: Config,
        *,
        once: bool = False,
        on_record: Callable[[SessionRecord], None] = logs.session,
        on_ready: Callable[[list[RunningRoute]], None] = lambda _routes: None,
    ) -> None:
        self._config = config
        self._once = once
        self._on_record = on_record
        self._on_ready = on_ready
        self._spills = Spills()
        self._news = News()
        self._engines: list[Engine] = []
        self.routes: list[RunningRoute] = []
        self._done: set[str] = set()
        self.signalled = 0

    def run(self) -> int:
        """Opens every route, serves until told to end or until nothing is left to do; 4 when one cannot open."""
        self._news.listen()
        previous = self._catch_signals()
        count = self._config.engines or len(os.sched_getaffinity(0))
        self._engines = [Engine(f"engine-{i}") for i in range(count)]
        try:
            if not self._open():
                return 4
            self._on_ready(self.routes)
            for engine in self._engines:
                engine.start()
            return self._serve()
        finally:
            for route in self.routes:
                route.close()
            for engine in self._engines:
                engine.stop()
                engine.close()
            self._spills.close()
            self._news.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _catch_signals(self) -> dict[int, Any]:
        """SIGPIPE is ignored: splice has no MSG_NOSIGNAL. The others are news for the main thread."""

        def caught(number: int, _frame: FrameType | None) -> None:
            self._news.tell(signal.Signals(number).name)

        found: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            found[number] = signal.signal(number, caught)
        found[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if hasattr(signal, "SIGXFSZ"):
            found[signal.SIGXFSZ] = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return found

    def _open(self) -> bool:
        spread = itertools.cycle(self._engines)
        for (name, route), home in zip(
            self._config.routes.items(), itertools.cycle(self._engines), strict=False
        ):
            running = RunningRoute(
                name,
                route,
                home,
                spread,
                lambda done: self._news.tell(f"done {done.name}"),
                once=self._once,
                on_record=self._on_record,
                spills=self._spills,
            )
            self.routes.append(running)
            try:
                running.open()
            except RelayError as error:
                log.error("%s: %s", name, error, extra={"event": "error", "route": name})
                for opened in self.routes:
                    opened.abort("another route could not be opened")
                for engine in self._engines:
                    engine.turn(0)
                return False
        for path in self._spills.unclaimed():
            log.warning(
                "the log %s belongs to no route; it is kept: deliver it by naming its route again, or remove it",
                path,
            )
        return True

    def _serve(self) -> int:
        deadline: float | None = None
        while len(self._done) < len(self.routes):
            news = self._news.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if news is None:
                self._abort("the drain deadline passed")
                deadline = None
                continue
            if news.startswith("done "):
                self._done.add(news[5:])
            elif news in ("SIGTERM", "SIGINT"):
                if self.signalled:
                    self._abort(f"a second {news}")
                    continue
                self.signalled = int(signal.Signals[news])
                log.info("draining: %s, %.0f s at most", news, self._config.drain, extra={"event": "drain"})
                deadline = time.monotonic() + self._config.drain
                for route in self.routes:
                    route.home.post(route.drain)
        if self.signalled:
            return 1 if any(route.cut_short for route in self.routes) else 0
        return exit_code(self.routes)

    def _abort(self, reason: str) -> None:
        for route in self.routes:
            route.home.post(partial(route.abort, reason))
