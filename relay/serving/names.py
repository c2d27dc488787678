"""Names in the settings of listeners: hosts, users and groups, looked up where they hold up nobody.

A look-up may take as long as a resolver likes, and cannot be called off. So each runs on a thread of its own, and
the main thread goes on with its news meanwhile: signals are obeyed, and on the loops nothing is looked up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from relay.config.models import Route
from relay.endpoints import tcp, unix
from relay.endpoints.connecting import Place
from relay.endpoints.settings import SinkSettings, SourceSettings
from relay.errors import RelayError, SourceError

End = SourceSettings | SinkSettings
Name = tuple[str, object, object]  # ("tcp", host, port) or ("unix", user, group)


class Meaning:
    """What a listener's names stand for: the `places` of a tcp host, the ids of a unix socket's user and group."""

    def __init__(self, places: list[Place] | None = None, user: int = -1, group: int = -1) -> None:
        self.places = places or []
        self.user = user
        self.group = group


Found = Mapping[Name, Meaning | RelayError]


def name_of(end: End) -> Name:
    """What is looked up for a listener."""
    if end.address.scheme == "tcp":
        return ("tcp", end.address.host, end.address.port)
    return ("unix", end.owner, end.group)


def takes_time(end: End) -> bool:
    """Whether a database has to be asked; figures mean themselves."""
    if end.address.scheme == "tcp":
        return bool(end.address.host) and not tcp.is_numeric(end.address.host)
    return isinstance(end.owner, str) or isinstance(end.group, str)


def look_up(end: End) -> Meaning:
    """What the names of a listener mean; blocks. Raises SourceError."""
    if end.address.scheme == "tcp":
        return Meaning(tcp.places(end.address))
    return Meaning(user=unix.user_id(end.owner), group=unix.group_id(end.group))


def meaning(end: End, found: Found) -> Meaning:
    """As `found`, or looked up now if it is not there. Raises SourceError."""
    known = found.get(name_of(end))
    if known is None:
        return look_up(end)
    if isinstance(known, RelayError):
        raise known
    return known


def listening(route: Route) -> Iterator[End]:
    """The ends of a route that listen: its broadcasts, then its source."""
    yield from (sink for _place, sink in route.sinks() if sink.verb == "listen")
    if route.source.verb == "listen":
        yield route.source


class Names:
    """Looks names up for one reload at a time. `tell(word)` hands `word` to the main thread, on which all else runs."""

    def __init__(self, tell: Callable[[Callable[[], None]], None]) -> None:
        self._tell = tell
        self._pending: set[Name] = set()
        self._wanted: set[Name] = set()
        self._found: dict[Name, Meaning | RelayError] = {}
        self._then: Callable[[Found], None] | None = None

    @property
    def waiting(self) -> list[str]:
        """The names that somebody waits for."""
        return sorted(
            " and ".join(str(part) for part in (name[1:2] if name[0] == "tcp" else name[1:]) if part)
            for name in self._wanted - self._found.keys()
        )

    def look_up(self, routes: Iterable[Route], then: Callable[[Found], None]) -> None:
        """Calls `then(found)` on the main thread when all names are known, at once if there are none.

        Whoever waited before is forgotten; a look-up that is under way already serves for this one too.
        """
        ends = {name_of(end): end for route in routes for end in listening(route) if takes_time(end)}
        self._wanted, self._found, self._then = set(ends), {}, then
        for name, end in ends.items():
            if name not in self._pending:
                self._pending.add(name)
                threading.Thread(target=self._ask, args=(name, end), name="relay-names", daemon=True).start()
        self._look()

    def _ask(self, name: Name, end: End) -> None:
        """On a thread of its own."""
        answer: Meaning | RelayError
        try:
            answer = look_up(end)
        except RelayError as error:
            answer = error
        except Exception as error:  # whatever a resolver's module raises is the answer
            answer = SourceError(str(end.address), "looking up", 0, reason=f"{type(error).__name__}: {error}")
        self._tell(lambda: self._answered(name, answer))

    def _answered(self, name: Name, answer: Meaning | RelayError) -> None:
        self._pending.discard(name)
        self._found[name] = answer
        self._look()

    def _look(self) -> None:
        then = self._then
        if then is not None and self._wanted <= self._found.keys():
            self._then = None
            then(self._found)
