"""The server: engines, routes at work, signals, reload, and the exit code."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from relay.config.models import Config
from relay.confinement.confinement import Confinement
from relay.engine import Engine
from relay.errors import ConfigError, ConfigErrors, EndpointError, RelayError
from relay.journal import logs
from relay.journal.record import SessionRecord
from relay.news import News
from relay.serving.fleet import Fleet, NotExchanged
from relay.serving.heap import Heap
from relay.serving.names import Found, Names
from relay.serving.route import RunningRoute
from relay.serving.vigil import Vigil
from relay.settings import Place

if TYPE_CHECKING:
    from relay.config.load import Loaded  # and the YAML parser, which `relay run` does without

log = logging.getLogger("relay.serve")

ENDING = ("SIGTERM", "SIGINT")
RESTARTS = ("engines", "admin")  # keys that a reload does not apply
ENDING_TIME = 2.0  # seconds that routes have to end after a failure of the program around them


State = Literal["starting", "ready", "draining", "ended"]


@dataclass(frozen=True)
class Outcome:
    """What a reload came to, in words; `problems` say why a configuration was refused, one line each."""

    result: Literal["reloaded", "reopened", "refused", "draining"]
    words: str
    problems: tuple[str, ...] = ()


ENDING_OUTCOME = Outcome("draining", "relay is draining, nothing is reloaded")


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

    `again` reads the configuration once more, for SIGHUP; without it only files are opened anew. Without
    `signals` it runs on any thread, and `end` ends it. `on_progress` is called every `interval` seconds, `on_reopen`,
    on the main thread, when files are opened anew, `compact` when memory is given back after many sessions.
    """

    def __init__(
        self,
        config: Config,
        *,
        once: bool = False,
        on_record: Callable[[SessionRecord], None] = logs.session,
        on_ready: Callable[[list[RunningRoute]], None] = lambda _routes: None,
        again: Callable[[], Loaded] | None = None,
        signals: bool = True,
        on_progress: Callable[[list[RunningRoute]], None] | None = None,
        interval: float = 0.2,
        vigil: Vigil | None = None,
        confinement: Confinement | None = None,
        compact: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._once = once
        self._vigil = vigil or Vigil()
        self._confinement = confinement or Confinement(config)
        self._on_record = self._vigil.watched(on_record)
        self._on_ready = on_ready
        self._again = again
        self._signals = signals
        self._on_progress = on_progress
        self._interval = interval
        self.on_reopen: Callable[[], None] = lambda: None
        self._news: News[Callable[[], None]] = News()
        self._heap: Heap | None = None
        if signals and not once:  # the process is this server's
            self._heap = Heap(self._news.tell, compact)
            self._on_record = self._heap.watched(self._on_record)
        self._names = Names(self._news.tell)
        self._reload_asked = False
        self._ready = False
        self._interrupted = ""
        self._deadline: float | None = None
        self._askers: list[Callable[[Outcome], None]] = []  # who waits for the outcome of a reload
        self._ended = False
        self.engines: list[Engine] = []
        self.signalled = 0

    def run(self) -> int:
        """Opens every route, serves until told to end or until nothing is left to do; 4 when one cannot open."""
        self._news.listen(signals=self._signals)
        previous = self._catch_signals() if self._signals else {}
        count = self._config.engines or len(os.sched_getaffinity(0))
        engines = self.engines = [Engine(f"engine-{i}") for i in range(count)]
        self._fleet = Fleet(self._config, engines, self._done, self._on_record, once=self._once)
        try:
            found = self._look_up()
            if found is None or not self._fleet.open(
                found, lambda: bool(self._interrupted), self._confinement.close
            ):
                return self._not_opened()
            if self._heap is not None:
                self._heap.own()
            for engine in engines:
                engine.start()
            self._vigil.begin(engines)
            self._ready = True
            self._say_ready()
            self._on_ready(list(self._fleet))
            if self._reload_asked:  # it came before there was anything to exchange
                self._news.tell(self._reload)
            return self._serve_on()
        finally:
            self._vigil.end()
            self._ended = True
            self._settled(ENDING_OUTCOME)
            self._fleet.close()
            self._news.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _serve_on(self) -> int:
        try:
            return self._serve()
        except BaseException:
            # KeyboardInterrupt, or whoever is told of the progress failed: nothing is left running
            self._on_progress = None
            self._fleet.abort("the program that runs the routes failed")
            self._deadline = time.monotonic() + ENDING_TIME
            self._serve(until_deadline=True)
            raise

    def _look_up(self) -> Found | None:
        """What the names of all listeners mean; None when relay was told to end before that was known."""
        answers: list[Found] = []
        self._names.look_up(self._config.routes.values(), answers.append)
        waiting = self._names.waiting
        if waiting:
            log.info("looking up %s", ", ".join(waiting))
        while not answers and not self._interrupted:
            news = self._news.wait()
            if news is not None:
                news()
        return answers[0] if answers else None

    def _not_opened(self) -> int:
        if not self._interrupted:
            return 4
        self.signalled = int(signal.Signals[self._interrupted])
        log.info("%s came before relay was ready: it ends", self._interrupted, extra={"event": "drain"})
        return 0

    def _done(self, running: RunningRoute) -> None:
        self._news.tell(partial(self._fleet.forget, running))

    # -- signals

    def end(self, name: str = "SIGTERM") -> None:
        """As the signal `name` does: drains, and ends at once the second time. From any thread."""
        self._interrupted = self._interrupted or name
        self._news.tell(partial(self._told_to_end, name))

    def reload(self, tell: Callable[[Outcome], None]) -> None:
        """As SIGHUP does, and `tell(outcome)` on the main thread when it is known. From any thread."""
        if self._ended:
            tell(ENDING_OUTCOME)
            return
        self._news.tell(partial(self._asked_to_reload, tell))

    @property
    def state(self) -> State:
        """Where it is in its life; draining from the moment at which a signal came. From any thread."""
        if self._ended:
            return "ended"
        if self._interrupted:
            return "draining"
        return "ready" if self._ready else "starting"

    @property
    def routes(self) -> list[RunningRoute]:
        """Those at work and those that are leaving. From any thread."""
        fleet = getattr(self, "_fleet", None)
        return list(fleet) if fleet is not None else []

    def at_work(self, running: RunningRoute) -> bool:
        """Whether it is the present route of its name, and none that is leaving. From any thread."""
        return self._fleet.at_work.get(running.name) is running

    @property
    def config(self) -> Config:
        """The present one. From any thread."""
        return self._config

    @property
    def refusal(self) -> RelayError | None:
        """Why a route could not be opened, or its source; None when all could."""
        return self._fleet.refusal or next((route.failed for route in self._fleet if route.failed), None)

    def _catch_signals(self) -> dict[int, Any]:
        """SIGPIPE is ignored: splice has no MSG_NOSIGNAL. The others are news for the main thread."""

        def caught(number: int, _frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            if name in ENDING:
                self.end(name)
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

    def _serve(self, *, until_deadline: bool = False) -> int:
        while not self._fleet.done and (not until_deadline or self._deadline is not None):
            deadline = self._deadline
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._on_progress is not None:
                self._on_progress(list(self._fleet))
                left = self._interval if left is None else min(left, self._interval)
            dues = (left, self._vigil.due, None if self._heap is None else self._heap.due)
            left = min((due for due in dues if due is not None), default=None)
            news = self._news.wait(left)
            if self._heap is not None:
                self._heap.look()
            if self._vigil.look(self._fleet) and not self.signalled:
                self._told_to_end("SIGTERM", why="nobody has needed relay for long enough")
            if news is not None:
                news()
            elif deadline is not None and time.monotonic() >= deadline:
                self._deadline = None
                self._fleet.abort("the drain deadline passed")
        if self.signalled:
            return 1 if any(route.cut_short for route in self._fleet) else 0
        return exit_code(self._fleet)

    def _told_to_end(self, name: str, why: str = "") -> None:
        if self.signalled:
            self._fleet.abort(f"a second {name}")
            return
        self.signalled = int(signal.Signals[name])
        self._interrupted = self._interrupted or name
        log.info("draining: %s, %g s at most", why or name, self._config.drain, extra={"event": "drain"})
        self._vigil.notifier.stopping(f"draining: {why or name}", self._config.drain)
        self._deadline = time.monotonic() + self._config.drain
        self._fleet.drain()

    # -- reload

    def _asked_to_reload(self, tell: Callable[[Outcome], None]) -> None:
        self._askers.append(tell)
        if self._ended or self.signalled:
            self._settled(ENDING_OUTCOME)
        else:
            self._reload_asked = True
            self._reload()

    def _settled(self, outcome: Outcome) -> None:
        """Whoever asked for a reload learns what it came to."""
        askers, self._askers = self._askers, []
        for tell in askers:
            tell(outcome)

    def _reload(self) -> None:
        if not self._ready or not self._reload_asked:  # done when it is, or done already
            return
        self._vigil.notifier.reloading()
        self._reload_asked = False  # before the file is read: a signal from here on asks again
        if self.signalled:
            log.info("SIGHUP: relay is draining, nothing is reloaded")
            self._vigil.notifier.stopping("draining", self._config.drain)
            self._settled(ENDING_OUTCOME)
            return
        self.on_reopen()
        if self._again is None:
            self._fleet.reopen(tuple(self._fleet.at_work))
            self._say_ready()
            said = "files are opened anew; there is no configuration file to read again"
            log.info("SIGHUP: %s", said)
            self._settled(Outcome("reopened", said))
        else:
            self._reload_from(self._again)

    def _reload_from(self, again: Callable[[], Loaded]) -> None:
        try:
            loaded = again()
        except (ConfigError, ConfigErrors) as error:
            self._fleet.reopen(tuple(self._fleet.at_work))
            self._refuse(error.errors if isinstance(error, ConfigErrors) else [error])
            return
        refused = [
            f"{loaded.where(place)}: {said}"
            for place, said in self._confinement.refusals(loaded.config, self._config)
        ]
        if refused:
            self._fleet.reopen(tuple(self._fleet.at_work))
            self._refuse(refused)
            return
        self._names.look_up(self._fleet.fresh_routes(loaded.config), partial(self._exchange, loaded))
        waiting = self._names.waiting
        if waiting:  # everything goes on meanwhile; another signal reads the file again
            log.info("the reload waits for the addresses of %s", ", ".join(waiting))
            self._fleet.reopen(tuple(self._fleet.at_work))

    def _exchange(self, loaded: Loaded, found: Found) -> None:
        if self.signalled:
            self._settled(ENDING_OUTCOME)
            return
        before = dict(self._fleet.at_work)
        try:
            change = self._fleet.exchange(loaded.config, found)
        except NotExchanged as error:
            said = f"{loaded.where(_place(loaded.config, error))}: {error}"
            self._refuse([said])
            return
        finally:
            kept = tuple(name for name, route in self._fleet.at_work.items() if before.get(name) is route)
            self._fleet.reopen(kept)
        later = [key for key in RESTARTS if getattr(loaded.config, key) != getattr(self._config, key)]
        for key in later:
            log.warning("%s: a change of it takes a restart", key, extra={"event": "restart_needed"})
        self._config = loaded.config
        self._say_ready()
        log.info("reloaded: %s", change, extra={"event": "reload", **change._asdict()})
        restart = f"; a change of {', '.join(later)} takes a restart" if later else ""
        self._settled(Outcome("reloaded", f"{change}{restart}"))

    def _refuse(self, problems: Iterable[object]) -> None:
        said = tuple(str(problem) for problem in problems)
        for problem in said:
            log.error("not reloaded: %s", problem, extra={"event": "reload_refused"})
        log.warning("the configuration stays as it was", extra={"event": "reload_refused"})
        self._say_ready("; the last reload was refused, see the log")
        self._settled(Outcome("refused", "the configuration stays as it was", said))

    def _say_ready(self, more: str = "") -> None:
        routes = list(self._fleet.at_work.values())
        count = sum(len(route.bound) for route in routes)
        names = "1 route" if len(routes) == 1 else f"{len(routes)} routes"
        self._vigil.notifier.ready(f"{names}, listening on {count} addresses{more}")


def _place(config: Config, error: NotExchanged) -> Place:
    """Where the configuration names what could not be opened; the route, where that cannot be told."""
    route, inner = config.routes[error.name], error.error
    base: Place = ("routes", error.name)
    if isinstance(inner, EndpointError):
        if inner.address == str(route.source.address):
            return (*base, "source", "shared" if route.source.shared else route.source.verb)
        for place, sink in route.sinks():
            if inner.address == str(sink.address):
                return (*base, *place, "shared" if sink.shared else sink.verb)
    return base
