"""All routes of one relay at work, and the exchange of some of them for others while the rest goes on.

Theory of operation. A reload compares the routes by their settings. One that is the same is not touched. The others
change places in this order, so that what does not work is found before anything is lost:

    1. listening sockets of old routes, those of subscribers too, whose very address a new route listens on wait to
       be handed over, with whoever waits in their backlogs; those that are merely in the way of a new address close
    2. new routes open whose ends can stand beside those of the old ones
    3. an old route that holds an end which only one can hold (a log, a file, a descriptor) is ended, then the new
       route that wants it opens; a log on disk is kept, and read on by whoever opens it
    4. the new routes let streams in
    5. the old routes that are left take who waits at the sockets that nobody wanted, close these, and drain: streams
       under way go on to their own ends

When a new route cannot be opened, the new ones are ended, the old ones have their sockets back, and those that were
ended are opened anew. All of this is ordered by the main thread and done on the engines of the routes. The names in
the addresses were looked up before (relay.serving.names).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from relay.config.models import Config, Route
from relay.endpoints.line import Lines
from relay.endpoints.listening import Key
from relay.engine import Engine
from relay.errors import RelayError
from relay.journal.record import SessionRecord
from relay.serving.names import Found, listening
from relay.serving.reception import Handover, keys
from relay.serving.route import RunningRoute
from relay.serving.spilling import spilling
from relay.serving.staged_route import route_of
from relay.spill.spills import Spills

log = logging.getLogger("relay.serve")

PATIENCE = 5.0  # seconds for a route that is ended to let go of what it holds


class Change(NamedTuple):
    """The names of routes by what a reload does to them."""

    removed: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        parts = [
            f"{word} {', '.join(names)}"
            for word, names in (("removed", self.removed), ("changed", self.changed), ("added", self.added))
            if names
        ]
        return "; ".join([*parts, f"{len(self.kept)} unchanged"])


def compare(old: Config, new: Config) -> Change:
    """What becomes of each route; settings that are equal are the same, however they are written."""
    both = [name for name in old.routes if name in new.routes]
    return Change(
        removed=tuple(name for name in old.routes if name not in new.routes),
        changed=tuple(name for name in both if old.routes[name] != new.routes[name]),
        added=tuple(name for name in new.routes if name not in old.routes),
        kept=tuple(name for name in both if old.routes[name] == new.routes[name]),
    )


def held(name: str, route: Route) -> set[tuple[str, str]]:
    """The ends of a route that two cannot hold at once; the many sessions of a duplex route have none."""
    found: set[tuple[str, str]] = set()
    if route.duplex:
        return found
    ends = [(sink, sink.placeholders, sink.append) for _place, sink in route.sinks()]
    for end, placeholders, append in [*ends, (route.source, frozenset(), True)]:
        address = end.address
        if address.scheme in ("stdio", "fd", "fifo") or (
            address.scheme == "file" and not placeholders and not append
        ):
            found.add(("end", str(address)))
    if route.turns() == "one":
        logs = [(slow.directory, sink) for _place, sink, slow, _stages in spilling(route) if slow.directory]
        found |= {("log", f"{directory}/{name}/{sink.address}") for directory, sink in logs}
    return found


def _sockets(config: Config, change: Change, found: Found) -> list[Key]:
    """What the new routes will listen on, as far as their names could be looked up."""
    wanted: list[Key] = []
    for name in (*change.changed, *change.added):
        for end in listening(config.routes[name]):
            with contextlib.suppress(RelayError):  # the route says so when it is opened
                wanted += keys(name, end, found)
    return wanted


class NotExchanged(Exception):
    """The route `name` could not be opened for the reason `error`; everything is as it was."""

    def __init__(self, name: str, error: RelayError) -> None:
        super().__init__(f"{name}: {error}")
        self.name = name
        self.error = error


class Fleet:
    """Owns the routes at work, those that are leaving, and their logs. Used on the main thread.

    `on_done(route)` is called on an engine's thread when a route has nothing left to do.
    """

    def __init__(
        self,
        config: Config,
        engines: list[Engine],
        on_done: Callable[[RunningRoute], None],
        on_record: Callable[[SessionRecord], None],
        *,
        once: bool,
    ) -> None:
        self.config = config
        self.at_work: dict[str, RunningRoute] = {}
        self.leaving: list[RunningRoute] = []
        self._engines = engines
        self._homes = itertools.cycle(engines)
        self._spread = itertools.cycle(engines)
        self._on_done = on_done
        self._on_record = on_record
        self._once = once
        self._spills = Spills()
        self._lines = Lines()
        self._draining = False
        self.refusal: RelayError | None = None

    def __iter__(self) -> Iterator[RunningRoute]:
        return iter([*self.at_work.values(), *self.leaving])

    def open(
        self, found: Found, interrupted: Callable[[], bool], bound: Callable[[], None] = lambda: None
    ) -> bool:
        """Before the engines run: opens every route. False when one cannot be opened, which is logged, or when
        `interrupted` says so between two; what was opened is ended then. `found`: what the listeners' names mean.

        `bound` is called when all listeners are bound and before anything else is opened.
        """
        reason = self._each(interrupted, lambda running: running.bind(found), making=True)
        if not reason:
            try:
                bound()
            except RelayError as error:
                log.error("%s", error, extra={"event": "error"})
                reason = "relay could not give up rights"
                self.refusal = error
        reason = reason or self._each(interrupted, lambda running: running.stand())
        if reason or interrupted():
            for running in self:
                running.abort(reason or "relay was told to end")
            for engine in self._engines:
                engine.turn(0)
            return False
        for path in self._spills.unclaimed():
            log.warning(
                "the log %s belongs to no route; it is kept: deliver it by naming its route again, or remove it",
                path,
            )
        for running in self:
            running.begin()
        return True

    def _each(
        self, interrupted: Callable[[], bool], opens: Callable[[RunningRoute], None], *, making: bool = False
    ) -> str:
        """Opens one half of every route; why it went no further, or nothing."""
        for name, route in self.config.routes.items():
            if interrupted():
                return "relay was told to end"
            if making:
                self.at_work[name] = self._make(name, route)
            try:
                opens(self.at_work[name])
            except RelayError as error:
                log.error("%s: %s", name, error, extra={"event": "error", "route": name})
                self.refusal = error
                return "another route could not be opened"
        return ""

    def _make(self, name: str, route: Route) -> RunningRoute:
        return route_of(
            name,
            route,
            next(self._homes),
            self._spread,
            self._on_done,
            once=self._once,
            on_record=self._on_record,
            spills=self._spills,
            lines=self._lines,
        )

    # -- reload

    def fresh_routes(self, config: Config) -> list[Route]:
        """Those routes of `config` that an exchange would open."""
        change = compare(self.config, config)
        return [config.routes[name] for name in (*change.changed, *change.added)]

    def exchange(self, config: Config, found: Found) -> Change:
        """From now on the routes of `config` are at work; NotExchanged when one of them cannot be opened.

        `found` is what the names of its `fresh_routes` mean.
        """
        change = compare(self.config, config)
        old = {name: self.at_work[name] for name in (*change.removed, *change.changed)}
        hand = Handover(_sockets(config, change, found))
        for running in old.values():
            release = partial(running.reception.release, hand.wants, hand.crosses)
            hand.give(running.home.call(release))
        ended: list[str] = []
        fresh: dict[str, RunningRoute] = {}
        try:
            for name, rivals in self._in_order(config, change, old):
                for rival in rivals:
                    if rival not in ended:
                        ended.append(rival)
                        self._end(old[rival], "the configuration of its route changed")
                fresh[name] = self._make(name, config.routes[name])
                if name in old:
                    fresh[name].follow(old[name])
                try:
                    fresh[name].home.call(partial(fresh[name].open, found, hand.take, wait=True))
                except RelayError as error:
                    raise NotExchanged(name, error) from error
        except BaseException:
            self._take_back(old, ended, fresh, hand)
            raise
        for running in fresh.values():
            running.home.post(running.begin)
        hand.close()
        both = {**self.at_work, **fresh}
        self.at_work = {name: both[name] for name in config.routes}  # at once: others may be looking
        for name, running in old.items():
            if running.over.is_set():
                running.close()
            else:
                self.leaving.append(running)
            if name not in ended:
                running.home.post(running.leave)
        self.config = config
        return change

    def _in_order(
        self, config: Config, change: Change, old: dict[str, RunningRoute]
    ) -> list[tuple[str, list[str]]]:
        """New routes with the old ones that must end before they open; those that end nobody first."""
        found = []
        for name in (*change.changed, *change.added):
            wanted = held(name, config.routes[name])
            found.append((name, [rival for rival in old if wanted & held(rival, old[rival].route)]))
        return sorted(found, key=lambda item: bool(item[1]))

    def _end(self, running: RunningRoute, reason: str) -> None:
        """Ends it now, and waits until it holds nothing any more."""
        running.home.call(partial(running.abort, reason))
        if not running.over.wait(PATIENCE) or not self._spills.wait_for_ends(running.name, PATIENCE):
            log.warning("%s: it has not let go of all it holds after %g s", running.name, PATIENCE)

    def _take_back(
        self, old: dict[str, RunningRoute], ended: list[str], fresh: dict[str, RunningRoute], hand: Handover
    ) -> None:
        for running in fresh.values():
            release = partial(running.reception.release, lambda _bound: True, lambda _bound: False)
            hand.give_back(running.home.call(release))
        hand.give_back([])
        for running in fresh.values():
            self._end(running, "the reload was taken back")
            running.close()
        for name, running in old.items():
            try:
                if name in ended:
                    running.close()
                    self.at_work[name] = again = self._make(name, running.route)
                    again.home.call(partial(again.open, running.reception.found, hand.take))
                else:
                    running.home.call(partial(running.reception.take_back, hand.returned))
            except RelayError as error:
                log.error("%s: it cannot go on as before: %s", name, error, extra={"route": name})
        hand.close()

    def reopen(self, names: tuple[str, ...]) -> None:
        """Files of these routes were moved away: they are opened anew."""
        for name in names:
            running = self.at_work[name]
            running.home.post(running.reopen)

    # -- ending

    def forget(self, running: RunningRoute) -> None:
        """It is done; if it was leaving it has left. While all drain nobody is forgotten: each may be cut short."""
        if running in self.leaving and not self._draining:
            self.leaving.remove(running)
            running.close()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(running.over.is_set() for running in self)

    def drain(self) -> None:
        """No new streams, anywhere."""
        self._draining = True
        for running in self:
            running.home.post(running.drain)

    def abort(self, reason: str) -> None:
        """Everything ends now."""
        for running in self:
            running.home.post(partial(running.abort, reason))

    def close(self) -> None:
        """Ends every engine, the routes' own and the readers of logs too. All routes must be over."""
        for running in self:
            running.close()
            if running.over.is_set():  # what its sinks say of their logs they say on the engines
                self._spills.wait_for_ends(running.name, PATIENCE)
        for engine in self._engines:
            engine.stop()
            engine.close()
        self._spills.close()
