"""A route's listeners, of its source and of its broadcasts, and how they pass from one route to another."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from relay.endpoints import tcp, unix
from relay.endpoints.listening import Accepted, Bound, Crowd, Key, Listener
from relay.endpoints.liveness import tune
from relay.endpoints.settings import SourceSettings
from relay.endpoints.turnstile import Turnstile
from relay.engine import Engine
from relay.errors import RelayError
from relay.serving.names import End, Found, meaning

log = logging.getLogger("relay.serve")

Take = Callable[[Key], Bound | None]


def nobody(_key: Key) -> Bound | None:
    """Nothing is handed over."""
    return None


def keys(route: str, end: End, found: Found) -> list[Key]:
    """Names the sockets that `end` of the route of that name listens on. Raises SourceError."""
    if end.address.scheme != "tcp":
        return [unix.key(end.address)]
    return tcp.keys(end.address, meaning(end, found).places, _owner(route, end))


def _owner(route: str, end: End) -> str:
    return f"{route} {type(end).__name__}"


class Reception:
    """Owns the listeners of one route; `ends` are what listens, each with who gets its connections, or `crowd` does.

    Lives on the route's home engine. A listener of a broadcast takes subscribers until the route is over, one of a
    source only while the route takes new streams.
    """

    def __init__(
        self, engine: Engine, route: str, ends: Sequence[tuple[End, Accepted]], crowd: Crowd | None = None
    ) -> None:
        self._engine = engine
        self._route = route
        self._ends = ends
        self._crowd = crowd
        self.found: Found = {}
        self._listeners: dict[int, list[Listener]] = {}  # by the place of their end in `ends`
        self._released: list[tuple[Listener, Bound]] = []
        self.bound: list[str] = []
        self.accepting = not ends  # whether streams may come in; with nobody who listens they always may

    def __iter__(self) -> Iterator[Listener]:
        return (listener for listeners in self._listeners.values() for listener in listeners)

    def open(self, found: Found, take: Take = nobody) -> None:
        """Binds what `take` does not know, and accepts from nobody yet. Raises SourceError; then `close` it."""
        self.found = found
        for number in range(len(self._ends)):
            self._open(number, take)

    def _open(self, number: int, take: Take) -> None:
        end, accepted = self._ends[number]
        means = meaning(end, self.found)
        if end.address.scheme == "tcp":
            bounds = tcp.bind(end.address, means.places, _owner(self._route, end), take)
            accepted = partial(_tuned, accepted, end.dead_after)
        else:
            bounds = unix.bind(end.address, mode=end.mode, owner=means.user, group=means.group, take=take)
        rate = end.limits.rate if isinstance(end, SourceSettings) else None
        gate = Turnstile(rate) if rate else None
        self._listeners[number] = [Listener(self._engine, bound, accepted, gate) for bound in bounds]
        if self._crowd is not None:
            for listener in self._listeners[number]:
                listener.by_the_crowd(self._crowd)
            for bound in bounds if end.address.scheme == "tcp" else []:
                tune(bound.sock, end.dead_after)
        does, role = ("listening", "source") if _is_source(end) else ("broadcasting", "sink")
        for bound in bounds:
            self.bound.append(bound.address)
            told = {"event": "listening", "route": self._route, "role": role, "address": bound.address}
            log.info("%s: %s on %s", self._route, does, bound.address, extra=told)

    def accept(self) -> None:
        """Whoever connects comes in."""
        self.accepting = True
        for listener in self:
            listener.resume()

    def cannot_accept(self, code: int) -> None:
        """There was no descriptor for what a connection needs: newcomers wait in the kernel for a moment."""
        for listener in self:
            listener.cannot_accept(code)

    # -- reload

    def release(self, wanted: Callable[[Bound], bool], in_the_way: Callable[[Bound], bool]) -> list[Bound]:
        """Gives away the sockets that are `wanted`, with their backlogs, and closes those `in_the_way` of others.

        The rest stays open until the route ends or takes no more streams.
        """
        self._released = []
        for listener in self:
            bound = listener.bound
            if bound is None:
                continue
            if wanted(bound) and bound.reachable:
                listener.release()
                self._released.append((listener, bound))
            elif in_the_way(bound) or not bound.reachable:
                listener.finish()
        return [bound for _listener, bound in self._released]

    def take_back(self, returned: Callable[[Bound], bool]) -> None:
        """After `release`: as before, with the same sockets where they are `returned`.

        Raises SourceError when somebody took an address meanwhile.
        """
        for listener, bound in self._released:
            if returned(bound):
                listener.restore(bound)
        self._released = []
        for number, (end, _accepted) in enumerate(self._ends):
            if any(listener.bound is None for listener in self._listeners.get(number, ())):
                for listener in self._listeners[number]:
                    listener.finish()
                    self.bound.remove(listener.address)
                self._open(number, nobody)
                for listener in self._listeners[number]:
                    listener.resume()
            elif end.address.scheme != "tcp":
                means = meaning(end, self.found)
                unix.dress(end.address, mode=end.mode, owner=means.user, group=means.group)

    def rebind(self) -> None:
        """A unix listener whose file was removed or replaced is bound anew, so that people find it again."""
        for number, (_end, _accepted) in enumerate(self._ends):
            old = self._listeners.get(number, [])
            lost = [each.bound for each in old if each.bound is not None and not each.bound.reachable]
            if not lost:
                continue
            try:
                self._open(number, nobody)
            except RelayError as error:
                log.error("%s: %s", self._route, error, extra={"event": "error", "route": self._route})
                continue
            for listener in old:
                self.bound.remove(listener.address)
                listener.finish()
            for listener in self._listeners[number]:
                listener.resume()

    # -- ending

    def finish(self, *, sources_only: bool) -> None:
        """Nobody new: whoever waits in a backlog is let in, then the listeners close."""
        for number, (end, _accepted) in enumerate(self._ends):
            if _is_source(end) or not sources_only:
                for listener in self._listeners.get(number, ()):
                    listener.finish()

    def finish_one(self, end: End) -> None:
        """The same for the listeners of one end."""
        for number, (each, _accepted) in enumerate(self._ends):
            if each is end:
                for listener in self._listeners.get(number, ()):
                    listener.finish()

    def refuse(self) -> None:
        """Nobody new, and whoever waits in a backlog is reset, which is counted and said."""
        for listener in self:
            count = listener.refuse()
            if count:
                log.warning(
                    "%s: %d connections that waited at %s were refused: the route ended",
                    self._route,
                    count,
                    listener.address,
                    extra={"event": "refused", "route": self._route, "count": count},
                )

    def close(self, *, sources_only: bool = False) -> None:
        """Closes what is left. Safe to call again."""
        for number, (end, _accepted) in enumerate(self._ends):
            if _is_source(end) or not sources_only:
                for listener in self._listeners.get(number, ()):
                    listener.close()


def _is_source(end: End) -> bool:
    return isinstance(end, SourceSettings)


def _tuned(accepted: Accepted, dead_after: float, sock: socket.socket, peer: str) -> None:
    tune(sock, dead_after)
    accepted(sock, peer)


class Handover:
    """Sockets on their way from routes that leave to routes that come; owns them in between.

    `wanted` names the sockets that the new routes listen on, in the order in which they may ask.
    """

    def __init__(self, wanted: Sequence[Key]) -> None:
        self._wanted = list(wanted)
        self._ports = {key[3] for key in wanted if key[0] == "tcp" and key[3]}
        self._paths = {os.path.realpath(key[1]) for key in wanted if key[0] == "unix"}
        self._free: list[Bound] = []
        self._all: list[Bound] = []

    def wants(self, bound: Bound) -> bool:
        """Whether a new route listens on this very socket; each is promised once."""
        if bound.key in self._wanted:
            self._wanted.remove(bound.key)
            return True
        return False

    def crosses(self, bound: Bound) -> bool:
        """Whether it may keep a new route from binding."""
        if bound.key[0] == "unix":
            return os.path.realpath(bound.key[1]) in self._paths
        return int(bound.address.rpartition(":")[2]) in self._ports

    def give(self, bounds: Sequence[Bound]) -> None:
        """They wait here for whoever comes."""
        self._free += bounds
        self._all += [bound for bound in bounds if bound not in self._all]

    def take(self, key: Key) -> Bound | None:
        """The socket of that name, if it is here; whoever gets it owns it."""
        for bound in self._free:
            if bound.key == key:
                self._free.remove(bound)
                return bound
        return None

    def give_back(self, bounds: Sequence[Bound]) -> None:
        """Of routes that did not come to be: what was handed over waits here again, what is new is closed."""
        for bound in bounds:
            if bound not in self._all:
                bound.close()
        self._free = [bound for bound in self._all if bound.sock.fileno() >= 0]

    def returned(self, bound: Bound) -> bool:
        """Takes this very socket out again; whether it was here."""
        if bound in self._free:
            self._free.remove(bound)
            return True
        return False

    def close(self) -> None:
        """Nobody comes any more."""
        for bound in self._free:
            bound.close()
        self._free.clear()
