"""One of the two peers of a session with stages: a connection that is one pipeline's source and the other's sink.

Facts (man 7 epoll, 2 shutdown): a descriptor is in an epoll set once, so one struct of the two is registered and the
other, its twin, hears what that one does. shutdown(SHUT_WR) ends what is sent and leaves what is received as it is.

What this means here: the session owns the descriptor, in its C struct, as one without stages does; a party, its source
and its sink borrow it. Neither end closes it: each tells the session how its part ended. What the peer sends is never
discarded.
"""

from __future__ import annotations

import errno
import socket
from typing import Protocol

from relay.endpoints.base import Sink, Source
from relay.endpoints.socket import READ_WRITE, socket_of, unacknowledged
from relay.engine import Engine
from relay.kernel import core
from relay.kernel.pipe import LARGEST_CAPACITY


class Witness(Protocol):
    """Who hears what becomes of a party: its session. `broken`: one of its parties has failed."""

    @property
    def broken(self) -> bool: ...

    def broke(self, party: Party, code: int) -> None:
        """Its connection is broken, with that errno."""

    def hung(self, party: Party) -> None:
        """It failed, and what says how stands behind bytes that nobody has taken yet."""

    def look_soon(self) -> None:
        """Something came to its end."""


class PartySource(Source):
    """What comes from a party."""

    quiet = True

    def close(self, *, reset: bool = False) -> None:
        """Its pipeline reads no more; the connection stays as it is. Safe to call again."""
        del reset
        self.closed = True
        self.c.reads = core.ffi.NULL


class PartySink(Sink):
    """What goes to a party. `cut` and `finish` leave the connection open: the other way may go on."""

    def __init__(self, engine: Engine, address: str, party: Party) -> None:
        super().__init__(engine, address)
        self._party = party
        self.c.is_socket = 1

    def open(self) -> None:
        """It is connected already."""
        self.opened_at = self.started_at
        self.opened()

    def finish(self) -> None:
        """The other party's stream is over and went out: this one hears its end. In a session that broke it is cut."""
        if self.state != "open":
            return
        if self._party.witness.broken:
            self.cut("the session broke off")
            return
        self.c.last_ns = int(self.engine.now * 1e9)  # the end of a stream wants its answer, too
        try:
            socket_of(self.c.fd, lambda sock: sock.shutdown(socket.SHUT_WR))
        except OSError as error:
            self._party.witness.broke(self._party, error.errno or errno.EPIPE)
            return
        self.finished()
        self._party.witness.look_soon()

    def cut(self, reason: str) -> None:
        """All that there is went out. The session resets the connection when the peer's kernel has it."""
        if self.state == "open":
            self.state = "cutting"
            self.reason = reason
            self._party.witness.look_soon()

    def broke(self, code: int, reason: str = "") -> None:
        """The pump met `code`."""
        del reason
        self._party.witness.broke(self._party, code)

    def close(self) -> None:
        """The connection stays as it is."""
        self.closed = True


class Party:
    """Borrows a connection until `let_go`; `source` and `sink` are how two pipelines use it.

    `error` is the errno by which it broke, 0 while it has not. `address` is its end's in the configuration, `peer`
    names it for people. `witness` hears what becomes of it.
    """

    def __init__(
        self, engine: Engine, fd: int, scheme: str, address: str, peer: str, witness: Witness
    ) -> None:
        self._engine = engine
        self.peer = peer
        self.tcp = scheme == "tcp"
        self.error = 0
        self.witness = witness
        self.source = PartySource(engine, address)
        self.source.scheme, self.source.peer = scheme, peer
        self.source.c.is_socket = 1
        self.source.opened_at = engine.now
        self.sink = PartySink(engine, address, self)
        self.source.c.fd = self.sink.c.fd = fd
        self.source.c.twin = self.sink.c
        self.source.c.token = engine.register(lambda _what, _error, _mask: witness.hung(self))
        self._registered = False

    def attach(self) -> int:
        """From now on it wakes the pipelines that its source and sink are wired to: 0, or the errno."""
        if not self.tcp:  # what waits in a unix socket counts as the sender's: as much as the system lets it
            socket_of(
                self.source.c.fd,
                lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_CAPACITY),
            )
        code = self._engine.add_end(self.source.c, READ_WRITE)
        self._registered = not code
        return code

    @property
    def last_ns(self) -> int:
        """Monotonic time of the last byte that came from it or went to it."""
        return int(max(self.source.c.last_ns, self.sink.c.last_ns))

    def outstanding(self) -> int:
        """Bytes that a reset would destroy on their way to it."""
        if not self.tcp or self.error or self.source.c.fd < 0:
            return 0
        try:
            return unacknowledged(self.source.c.fd)
        except OSError:
            return 0

    def let_go(self) -> None:
        """The connection is about to be closed by whom it belongs to. Safe to call again."""
        if self._registered:
            self._registered = False
            self._engine.drop_end(self.source.c)
        self._engine.forget_token(self.source.c.token)
        for end in (self.source.c, self.sink.c):
            end.fd = -1
            end.reads = end.writes = core.ffi.NULL
