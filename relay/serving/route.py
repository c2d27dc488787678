"""A route at work: what every one has, whichever way its bytes go.

Each route has a home engine, where its listeners and its account of what runs live. What it does with those who come
in is in stream_route.py and duplex_route.py.
"""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from relay.config.models import Route
from relay.endpoints.line import Lines
from relay.endpoints.listening import Accepted, Crowd
from relay.engine import Engine
from relay.errors import RelayError
from relay.journal import logs
from relay.journal.record import SessionRecord
from relay.kernel.probe import machine
from relay.pipeline.pipeline import Pipeline
from relay.serving.admission import Admission
from relay.serving.changes import Stages
from relay.serving.facts import Facts
from relay.serving.introductions import Introduced, Introductions
from relay.serving.names import End, Found
from relay.serving.reception import Reception, Take, nobody
from relay.serving.resumption import Resumption
from relay.spill.spills import Spills
from relay.ways import Ways


class RunningRoute(ABC):
    """One route at work: its listeners, who may come in, what an earlier run left. Lives on its home engine.

    `on_done(route)` is called once when a route whose source ends has nothing left to do. `once`: a listening
    source takes one connection. `pipelines` are those that carry a stream from its source to its sink.
    """

    pipelines: Iterable[Pipeline] = ()

    def __init__(
        self,
        name: str,
        route: Route,
        home: Engine,
        spread: Iterator[Engine],
        on_done: Callable[[RunningRoute], None],
        *,
        once: bool = False,
        on_record: Callable[[SessionRecord], None] = logs.session,
        spills: Spills | None = None,
        lines: Lines | None = None,
    ) -> None:
        self._spills = spills or Spills()
        self._lines = lines
        self.name = name
        self.route = route
        self.stages: Stages = route.stages + route.replies  # as they were changed since, see changes.py
        self.home = home
        self.records: list[SessionRecord] = []
        self.finite = once or route.source.verb == "read"
        self.cut_short = False
        self.failed: RelayError | None = None
        self._spread = spread
        self._on_done = on_done
        self._on_record = on_record
        self._once = once
        self._ways = Ways(machine(), route.method)
        self.reception = Reception(home, name, self._listens(), self._crowds())
        self._resumption = Resumption(home, name, route, self._spills, self._ways, self._look_whether_done)
        self._admission = Admission(name, route.source.limits)
        trust = route.source.proxy_protocol
        self._introductions = (
            Introductions(home, trust, self._admission, self._introduced, self._look_whether_done)
            if trust
            else None
        )
        self._ending = False
        self._done = False
        self.over = threading.Event()

    def open(self, found: Found | None = None, take: Take = nobody, *, wait: bool = False) -> None:
        """Binds every listener and opens the sinks that outlive a stream, and begins unless it is to `wait`.

        `found` is what the listeners' names mean, `take` may have sockets for them. Raises SourceError; see `bound`.
        """
        self.bind(found, take)
        self.stand()
        if not wait:
            self.begin()

    def bind(self, found: Found | None = None, take: Take = nobody) -> None:
        """The first half of `open`: every listener."""
        self.reception.open(found or {}, take)

    def stand(self) -> None:  # noqa: B027 - for those kinds that have any
        """The second half: what outlives a stream or a session. Unless a kind of route says otherwise, nothing."""

    def begin(self) -> None:
        """Whoever connects comes in from now on. Once."""
        self.reception.accept()

    def _listens(self) -> list[tuple[End, Accepted]]:
        """What listens, each with who gets its connections."""
        return [(self.route.source, self._accepted)] if self.route.source.verb == "listen" else []

    def _crowds(self) -> Crowd | None:
        """For a kind of route that takes many connections at once: who takes them, in place of `_accepted`."""
        return None

    def _accepted(self, sock: socket.socket, peer: str) -> None:
        self._crowd([(sock.detach(), peer)])

    def _crowd(self, connections: list[tuple[int, str]]) -> None:
        """Some connected at once: who comes from a proxy is let in when that has said for whom it connects."""
        came = []
        for fd, peer in connections:
            if self._introductions is not None and self._introductions.expects(peer):
                self._introductions.take(fd, peer)
            else:
                came.append(Introduced(fd, peer, "", ""))
        self._let_in(came)

    def _introduced(self, who: Introduced) -> None:
        self._let_in([who])

    @abstractmethod
    def _let_in(self, connections: list[Introduced]) -> None:
        """They are this route's from here, if they are admitted."""

    @property
    def bound(self) -> list[str]:
        """The addresses it listens on, those of its sinks first."""
        return self.reception.bound

    def change(self, stages: Stages) -> None:
        """Some of its stages have other settings from now on; what is under way goes on by them."""
        self.stages = stages

    def facts(self) -> Facts:
        """What there is to tell of it now. On its home engine."""
        over = "done" if self._done else "draining" if self._ending else ""
        return Facts(
            state="failed" if self.failed else over or ("" if self.reception.accepting else "starting"),
            listening=tuple(self.bound),
            connections=self._admission.connections,
            refused=self._admission.refused,
            waiting=0,
            resumed=self._resumption.left,
            pipelines=tuple(self.pipelines),
            sessions=(),
            failed=str(self.failed or ""),
        )

    # -- reload

    def follow(self, old: RunningRoute) -> None:  # noqa: B027 - for those kinds that have any
        """Before it is opened: it takes the place of `old`, from which it may take what both have."""

    def leave(self) -> None:
        """Another took its place: no newcomers of any kind, then as `drain`."""
        self.reception.finish(sources_only=False)
        self.drain()

    def reopen(self) -> None:
        """Files that were moved away are opened anew, by every stream that writes one; so are sockets' files."""
        self.reception.rebind()

    # -- ending

    @property
    def under_way(self) -> bool:
        """Whether a connection is open or bytes wait."""
        return bool(self._resumption or self._introductions)

    @property
    def in_use(self) -> bool:
        """Whether anything is under way or anybody watches who has not ended its own stream."""
        return self.under_way

    def drain(self) -> None:
        """No new streams but those that wait in a backlog; those under way go on. What has none is finished at once."""
        self.reception.finish(sources_only=True)
        self._ending = True
        self._look_whether_done()

    def abort(self, reason: str) -> None:
        """Ends everything now; what an earlier run left stays in its logs."""
        self._ending = True
        self.reception.refuse()
        self.cut_short = self.cut_short or bool(self._introductions or self._resumption)
        if self._introductions is not None:
            self._introductions.abort(reason)
        self._resumption.stop(reason)
        self._look_whether_done()

    def _look_whether_done(self) -> None:
        """For a kind of route to call, too, when it has nothing under way of its own."""
        if self._done or self._introductions or self._resumption:
            return
        if self._ending or (self.finite and (self.failed or self.records)):
            self._done = True
            self.over.set()
            self.reception.close()
            self._finished()
            self._on_done(self)

    def _finished(self) -> None:  # noqa: B027 - for those kinds that have any
        """It is done: what served all its streams or sessions goes."""

    def close(self) -> None:
        """On the main thread, when the route is done."""
        self.reception.close()
