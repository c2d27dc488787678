"""The desk of a running relay: what it can be asked and told, on any thread."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from relay.admin.inquiry import Inquiry
from relay.admin.ledger import Ledger
from relay.admin.rates import Rates
from relay.admin.status import Status
from relay.config.models import Config
from relay.errors import RelayBug, did_you_mean
from relay.kernel.probe import machine
from relay.serving.changes import NotChanged, changed, find, replaced
from relay.serving.route import RunningRoute
from relay.serving.server import Outcome, Server

if TYPE_CHECKING:
    from relay.admin.metrics import Figures
    from relay.planning.hops import RoutePlan

log = logging.getLogger("relay.admin")

ORDERED = 5.0  # seconds for an engine to obey
FRESH = 0.1  # seconds for which a look is good
PATIENT = 60.0  # seconds that a reload may take
ANSWER = 0.5  # seconds within which a healthy engine answers
STUCK = 10.0  # seconds without an answer after which an engine is not alive


class NotDone(Exception):
    """An order that was not obeyed: HTTP's `status`, and what to say."""

    def __init__(self, status: int, **data: Any) -> None:
        super().__init__(str(data.get("words", "")))
        self.status = status
        self.data = data


class Desk:
    """What `server` can be asked and told. `remote`: it may be asked from other machines."""

    def __init__(
        self, server: Server, ledger: Ledger, config: str, *, began: float = 0.0, remote: bool = False
    ) -> None:
        self.remote = remote
        self._server = server
        self._ledger = ledger
        self._figures: Figures | None = None
        self._plans: tuple[Config, dict[str, RoutePlan]] | None = None
        self._inquiry = Inquiry(server, ledger, config, began or time.monotonic())
        self._rates = Rates()
        self._looking = threading.Lock()
        self._last: tuple[float, Status] | None = None
        self._pinged: dict[str, float] = {}  # engines that owe an answer, and since when

    # -- asked

    def status(self) -> Status:
        """How everything stands, with rates: of the time since somebody looked, or of a moment."""
        with self._looking:
            if self._rates.stale(time.monotonic()):
                self._rates.rated(self._inquiry.look())
                time.sleep(Rates.LEAST)  # of the client's own thread
            return self._look()

    def _look(self) -> Status:
        if self._last is None or time.monotonic() - self._last[0] > FRESH:
            self._last = (time.monotonic(), self._rates.rated(self._inquiry.look()))
        return self._last[1]

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """What Prometheus is told, and its content type; rates may be missing at first."""
        # loaded when it is scraped for the first time
        from relay.admin.metrics import Figures

        with self._looking:
            if self._figures is None:
                self._figures = Figures()
            status = self._look()
            totals = self._ledger.totals(route.name for route in status.routes)
            return self._figures.text(status, totals, accept)

    def page(self, route: str) -> str:
        """The status page, of all routes or of one."""
        # planning comes with it, which a relay that nobody looks at does without
        from relay.admin.page import page
        from relay.planning.plan import make_plan

        status, config = self.status(), self._server.config
        with self._looking:
            if self._plans is None or self._plans[0] is not config:
                self._plans = (config, {plan.name: plan for plan in make_plan(config, machine()).routes})
            plans = self._plans[1]
        return page(status, plans, route)

    def live(self) -> tuple[bool, str]:
        """Whether every engine answers; and in words. An engine that is late is given STUCK seconds."""
        if self._server.state not in ("ready", "draining"):
            return True, self._server.state
        now = time.monotonic()
        answered = threading.Event()
        waiting = {engine.name for engine in self._server.engines}
        for engine in self._server.engines:
            since = self._pinged.setdefault(engine.name, now)

            def here(name: str = engine.name) -> None:
                self._pinged.pop(name, None)
                waiting.discard(name)
                if not waiting:
                    answered.set()

            if since == now or now - since > ANSWER:
                engine.post(here)
        answered.wait(ANSWER)
        stuck = [name for name in list(waiting) if now - self._pinged.get(name, now) > STUCK]
        if stuck and self._server.state in ("ready", "draining"):
            return False, f"{', '.join(sorted(stuck))} has not answered for more than {STUCK:g} s"
        return True, "alive"

    def ready(self) -> tuple[bool, str]:
        """Whether streams may come: from when all routes are open until a drain begins."""
        state = self._server.state
        return state == "ready", state

    # -- told

    def reload(self) -> dict[str, Any]:
        """Reads the configuration again; what came of it. NotDone when it was refused."""
        told: Future[Outcome] = Future()
        self._server.reload(told.set_result)
        try:
            outcome = told.result(PATIENT)
        except FutureTimeout:
            said = f"no outcome within {PATIENT:g} s: names are still being looked up, see the log"
            raise NotDone(504, result="waiting", words=said, problems=()) from None
        if outcome.result in ("refused", "draining"):
            raise NotDone(409, **asdict(outcome))
        return asdict(outcome)

    def drain(self) -> dict[str, Any]:
        """Streams under way may end, no new ones come, then the relay ends."""
        if self._server.state in ("draining", "ended"):
            return {"words": "it is draining already"}
        self._server.end("SIGTERM")
        return {"words": f"draining, {self._server.config.drain:g} s at most"}

    def set(self, route: str, stage: str, values: dict[str, Any]) -> dict[str, Any]:
        """Other settings for a stage, in what is under way and what comes. NotDone when it cannot be."""
        running = {one.name: one for one in reversed(self._server.routes)}  # of two of a name the one at work
        if route not in running:
            guess = did_you_mean(str(route), running) or f"; there are {', '.join(list(running)[:20])}"
            raise NotDone(404, words=f"there is no route '{route}'{guess}")
        if not isinstance(values, dict):
            raise NotDone(400, words="values are a mapping of keys to what they are to be")
        chosen = running[route]
        try:
            before, now = chosen.home.call(partial(_change, chosen, str(stage), values), ORDERED)
        except NotChanged as error:
            raise NotDone(400, words=str(error)) from None
        except RelayBug as error:
            raise NotDone(503, words=str(error)) from None
        told = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in now)
        log.info(
            "%s: %s: %s",
            route,
            stage,
            told,
            extra={"event": "set", "route": route, "stage": stage, "now": now},
        )
        return {"words": f"{route}: {stage}: {told}", "before": before, "now": now}


def _change(
    running: RunningRoute, stage: str, values: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """On the route's home engine: the values before, and now."""
    old = find(running.name, running.stages, stage)
    new = changed(old, values)
    running.change(replaced(running.stages, old, new))
    keys = sorted(values)
    return {key: getattr(old, key) for key in keys}, {key: getattr(new, key) for key in keys}
