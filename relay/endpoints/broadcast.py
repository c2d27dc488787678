"""A sink that listens: whoever connects gets the stream from then on.

The chain's last node moves the stream into a ring that subscribers read (subscribers.py); without any, bytes pass.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial

from relay.endpoints.base import Sink
from relay.endpoints.socket import SocketSink
from relay.engine import Engine
from relay.kernel import core


class Subscriber(SocketSink):
    """One accepted connection of a broadcast; owns the socket."""

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        peer: str,
        *,
        unix: bool,
        close_with_peer: bool,
        dead_after: float,
    ) -> None:
        super().__init__(
            engine, peer, close_with_peer=close_with_peer, dead_after=0.0 if unix else dead_after
        )
        self.counts_fin = not unix
        self._accepted = sock

    def open(self) -> None:
        """Registers the socket."""
        self.adopt(self._accepted)


class Broadcast(Sink):
    """Takes connections of the route's listeners; its struct counts what came to it, and has no descriptor.

    Until `accept` names who takes them, connections wait. Listeners live on the route's home engine, which need
    not be the engine of the pipeline that the connections join. Whoever connected before the stream's end gets that
    end: connections that the kernel still held then are taken before the listeners are closed.
    """

    def __init__(self, engine: Engine, address: str) -> None:
        super().__init__(engine, address)
        self._lock = threading.Lock()
        self._early: list[tuple[socket.socket, str]] = []
        self._join: Callable[[socket.socket, str], None] | None = None
        self._there: Engine | None = None
        self.leave: Callable[[], None] = lambda: (
            None
        )  # takes whoever waits at its listeners, then closes these

    def joined(self, sock: socket.socket, peer: str) -> None:
        """For the listeners: a connection was accepted."""
        with self._lock:
            join, there = self._join, self._there
            if join is None or there is None:
                self._early.append((sock, peer))
                return
        there.post(partial(join, sock, peer))

    def accept(self, engine: Engine, join: Callable[[socket.socket, str], None]) -> None:
        """From now on `join` gets every connection and its peer's name, on `engine`, and owns it. From any thread."""
        with self._lock:
            self._join, self._there = join, engine
            early, self._early = self._early, []
        for sock, peer in early:
            engine.post(partial(join, sock, peer))

    def open(self) -> None:
        """Is open at once; the listeners were opened with the route."""
        self.c.kind = core.INSTANT
        self.c.method = core.COPY
        self.opened()

    def finish(self) -> None:
        """Takes whoever has connected by now, on the listeners' engine; then it is finished."""
        if self._there is None:
            self.finished()
        elif self.state == "open":
            self.state = "finishing"
            self.engine.post(self._take_the_last)

    def _take_the_last(self) -> None:
        self.leave()
        assert self._there is not None
        self._there.post(self.finished)  # behind the joins

    def close(self) -> None:
        """Closes whoever came too early to be taken."""
        with self._lock:
            early, self._early = self._early, []
        for sock, _peer in early:
            sock.close()
        super().close()
