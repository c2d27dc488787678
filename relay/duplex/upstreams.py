"""The upstreams of a duplex route, shared by its sessions on every engine: which there are, and who gets which.

Facts: a name may stand for several addresses, and for others tomorrow; looking it up may take seconds and cannot be
called off. What a resolver says is good for some seconds at least.

What this means here: each place is an upstream of its own, whether a name stands for it or it was written in figures.
Names are looked up on threads, when a session wants one and the answer is older than FRESH; the old answer serves
meanwhile, unless it is older than STALE or there is none: then sessions wait, for half of their time to connect at
most. A place that is no longer in the answer gets no new sessions; those it has go on.

Sessions ask from any engine's thread, some thousand times a second, so everything is under one lock that nobody holds
for longer than a few comparisons take. Routes that follow each other in a reload share the lock and the upstreams that
both have, so counts and ejections go on.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from relay.duplex.balance import choose, passed_over
from relay.duplex.upstream import Attempt, Upstream, UpstreamState, in_words, shown
from relay.endpoints import tcp, unix
from relay.endpoints.address import Address
from relay.endpoints.connecting import Place
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine

log = logging.getLogger("relay.serve")

FRESH = 5.0  # seconds for which an answer about a name is good
STALE = 30.0  # seconds after which it is not used even while another is awaited
AGAIN = 1.0  # seconds until a look-up that failed is tried again


class _Name:
    """An address as it was configured, and the places that it stands for."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.places: list[Place] = []
        self.fresh_until = 0.0
        self.asked_at: float | None = None  # when it was last answered for, well or not
        self.looking = False
        self.failed = ""
        if address.scheme == "unix":
            self.places, self.fresh_until = [(socket.AF_UNIX, unix.place(address))], float("inf")
        elif tcp.is_numeric(address.host):
            self.places, self.fresh_until = tcp.lookup(address.host, address.port), float("inf")

    def holds_up(self, now: float) -> bool:
        """Whether a session should rather wait for the look-up that is under way."""
        return self.looking and (self.asked_at is None or now - self.asked_at > STALE)


class Upstreams:
    """All upstreams of the route named `route`. `before`: those of the route whose place it takes.

    `on_change` is called on the home engine when there are others than before.
    """

    def __init__(self, route: str, sink: SinkSettings, home: Engine, before: Upstreams | None = None) -> None:
        self._route = route
        self._home = home
        self._balance = sink.balanced
        self._dead_after = sink.dead_after
        self._patience = sink.connect_timeout / 2
        self._names = [_Name(address) for address in sink.addresses]
        self._lock: threading.Lock = before._lock if before is not None else threading.Lock()
        self._known: dict[str, Upstream] = dict(before._known) if before is not None else {}
        self._upstreams: tuple[Upstream, ...] = ()
        self._turn = 0
        self._waiting: list[tuple[Engine, Callable[[], None]]] = []
        self._fresh_until = 0.0
        self.on_change: Callable[[], None] = lambda: None
        with self._lock:
            for one in self._known.values() if sink.health is None else ():
                one.unchecked()
            self._list()

    def __len__(self) -> int:
        return len(self._upstreams)

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._upstreams)

    # -- names

    def known(self, now: float) -> bool:
        """Whether `ready` would call at once."""
        return now < self._fresh_until

    def ready(self, engine: Engine, then: Callable[[], None]) -> None:
        """Calls `then` on `engine`, whose thread this is, at once or when names that nothing is known of were looked
        up. `reason` says why none is known after that."""
        now = engine.now
        if self.known(now):
            then()
            return
        with self._lock:
            asking = [name for name in self._names if now >= name.fresh_until and not name.looking]
            for name in asking:
                name.looking = True
            waits = self._hold_up(now)
            once = _Once(then)
            if waits:
                self._waiting.append((engine, once))
        for name in asking:
            host, port = name.address.host, name.address.port
            self._home.work(partial(tcp.lookup, host, port), partial(self._answered, name))
        if waits:
            engine.later(self._patience, partial(self._out_of_patience, engine, once))
        else:
            then()

    def _hold_up(self, now: float) -> bool:
        """Whether sessions wait for a look-up."""
        if not self._upstreams:
            return any(name.looking for name in self._names)
        return any(name.holds_up(now) for name in self._names)

    def _out_of_patience(self, here: Engine, once: _Once) -> None:
        """On any engine, `here`: a resolver is slow. Where upstreams are known nobody waits for it any more, all at
        once: who comes now does not go before those who waited."""
        now = self._home.now
        waiting = []
        with self._lock:
            for name in self._names if once.pending else ():
                name.asked_at = now if name.looking else name.asked_at
            if not self._hold_up(now):
                waiting, self._waiting = self._waiting, []
        self._let_go(here, waiting)
        once()

    def _answered(self, name: _Name, places: list[Place] | None, failed: BaseException | None) -> None:
        """On the home engine."""
        now = self._home.now
        before = name.failed
        with self._lock:
            name.looking, name.asked_at = False, now
            if failed is not None or not places:
                why = failed.strerror if isinstance(failed, socket.gaierror) else failed or "no address"
                name.failed = f"looking up {name.address.host!r}: {why}"
                name.fresh_until = now + AGAIN
            else:
                name.failed, name.places, name.fresh_until = "", list(places), now + FRESH
            fresh, gone = self._list()
            waiting = []
            if not self._hold_up(now):
                waiting, self._waiting = self._waiting, []
        if name.failed and not before:
            known = "; what it meant before is used" if name.places else ""
            log.warning("%s: %s%s", self._route, name.failed, known, extra={"route": self._route})
        for one, now_or_gone in [*((one, "is new") for one in fresh), *((one, "is gone") for one in gone)]:
            if len(self) > 1 or gone:
                log.info("%s: %s %s", self._route, _both(one), now_or_gone, extra={"route": self._route})
        if fresh or gone:
            self.on_change()
        self._let_go(self._home, waiting)

    def _let_go(self, here: Engine, waiting: list[tuple[Engine, Callable[[], None]]]) -> None:
        """On the engine `here`: these need wait no longer."""
        for engine, then in waiting:
            if engine is here:
                then()
            else:
                engine.post(then)

    def _list(self) -> tuple[list[Upstream], list[Upstream]]:
        """Names and places may have changed: those that are new, those that get no more sessions."""
        now = self._home.now
        listed: dict[str, Upstream] = {}
        for name in self._names:
            for place in name.places:
                said, address = shown(place), str(name.address)
                if said in listed:
                    continue
                known = self._known.get(said)
                if known is None:
                    known = Upstream(address, place, self._dead_after, now)
                elif known not in self._upstreams:
                    known.configure(address, self._dead_after)
                listed[said] = known
        gone = [one for one in self._upstreams if one.name not in listed]
        fresh = [one for one in listed.values() if one not in self._upstreams]
        self._known = {**{said: one for said, one in self._known.items() if one.sessions}, **listed}
        self._upstreams = tuple(listed.values())
        self._fresh_until = min(name.fresh_until for name in self._names)
        return fresh, gone

    @property
    def reason(self) -> str:
        """Why there is none."""
        return next((name.failed for name in self._names if name.failed), "its name is still looked up")

    # -- sessions, on any engine's thread

    def pick(self, peer: str, tried: Sequence[Upstream] = ()) -> Attempt | None:
        """An upstream for a connection of `peer`, none of those `tried`; the least bad one where none is usable."""
        now = time.monotonic()
        with self._lock:
            everyone = self._upstreams
            if len(everyone) == 1 and not tried:
                return everyone[0].begin(now, [])  # whatever it is like, there is no other
            fit = [one for one in everyone if one.usable(now)]
            usable = [one for one in fit if one not in tried] if tried else fit
            if usable:
                self._turn += 1
                one = choose(self._balance, usable, peer, self._turn - 1)
            else:
                rest = [one for one in everyone if one not in tried]
                if not rest:
                    return None
                one = min(rest, key=Upstream.badness)
            passed = []
            if len(fit) < len(everyone):
                passed = [
                    (other.name, f"{other.state}: {other.why}")
                    for other in passed_over(self._balance, one, everyone, peer)
                    if other not in fit and other not in tried
                ]
            return one.begin(now, passed)

    def refused(self, attempt: Attempt, code: int) -> None:
        """It could not be connected."""
        one = attempt.upstream
        with self._lock:
            was = one.state
            wait = one.refused(attempt, code, time.monotonic())
            alone = len(self._upstreams) == 1
        if wait is not None and was == "up" and not alone:
            self._tell(logging.WARNING, one, f"is passed over, its connects fail: {in_words(code)}")

    def connected(self, attempt: Attempt) -> None:
        """A trial is connected."""
        with self._lock:
            changed = attempt.upstream.connected(attempt, time.monotonic())
            alone = len(self._upstreams) == 1
        if changed and not alone:
            self._tell(logging.INFO, attempt.upstream, "takes connections again")

    def leave(self, attempt: Attempt) -> None:
        """Its session is over, whether or not it ever was connected."""
        with self._lock:
            attempt.upstream.leave(attempt)

    # -- checks, on the home engine

    def checked(self, one: Upstream, why: str, began: float, fall: int, rise: int) -> None:
        """A check of it that began then went well, or did not and `why`."""
        with self._lock:
            changed = one.checked(why, began, time.monotonic(), fall, rise)
            state = one.state
        if changed and state == "down":
            self._tell(logging.WARNING, one, f"is down: {why}")
        elif changed:
            self._tell(logging.INFO, one, "is up")

    def _tell(self, level: int, one: Upstream, words: str) -> None:
        everyone = self._upstreams
        well = sum(other.state == "up" for other in everyone)
        log.log(
            level,
            "%s: %s %s; %d of %d are up",
            self._route,
            _both(one),
            words,
            well,
            len(everyone),
            extra={"event": "upstream", "route": self._route, "upstream": one.name, "state": one.state},
        )

    # -- for whoever asks

    def snapshot(self) -> tuple[UpstreamState, ...]:
        """How all are at this moment, in the order of the configuration; those that only have sessions left come
        last. From any thread."""
        now = time.monotonic()
        with self._lock:
            listed = self._upstreams
            rest = [one for one in self._known.values() if one not in listed and one.sessions]
            return (*(one.told(now) for one in listed), *(one.told(now, listed=False) for one in rest))


class _Once:
    """A call that happens once, whoever is first."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    @property
    def pending(self) -> bool:
        """Whether it has not happened."""
        return self._action is not None

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


def _both(one: Upstream) -> str:
    """As it was configured, and in figures where that is something else."""
    return one.name if one.name == one.address else f"{one.address} ({one.name})"
