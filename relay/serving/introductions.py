"""Connections of proxies that have not said yet for whom they come.

Facts (man 2 recv): MSG_PEEK looks at what has come and leaves it there. What follows a PROXY header belongs to the
stream and may have come with it.

What this means here: what has come is looked at, and exactly what belongs to the header is taken, so that the
connection goes to its session as if there had been none. Until then it counts among the open connections of its
route; one that does not introduce itself in time, or says something else, is reset.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import NamedTuple

from relay.endpoints.awaited import Awaited
from relay.endpoints.options import Network, Trust
from relay.endpoints.proxy_header import LONGEST, Malformed, Origin, parse, scan
from relay.endpoints.socket import close_with_reset
from relay.engine import Engine
from relay.errors import KernelError, name_of
from relay.serving.admission import Admission, host_of

log = logging.getLogger("relay.serve")


class Introduced(NamedTuple):
    """A connection, nonblocking, for whom it comes, where that one had connected to ("": to this socket), and the proxy
    that says so ("": nobody does, the peer is who connected)."""

    fd: int
    peer: str
    local: str
    via: str


class _Newcomer(Awaited):
    """A connection whose header has not come yet, or not whole; owns the socket."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        super().__init__(sock)
        self.peer = peer
        self.header = b""

    def detach(self) -> int:
        """Looked at no more; its descriptor is the caller's."""
        sock = self.let_go()
        assert sock is not None
        return sock.detach()


class Introductions:
    """Reads the PROXY headers of those who are trusted; lives on the route's home engine.

    `known(introduced)` owns each connection that has said for whom it comes. `gone()` is called when one is gone
    without that.
    """

    def __init__(
        self,
        engine: Engine,
        trust: Trust,
        admission: Admission,
        known: Callable[[Introduced], None],
        gone: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._trust = trust
        self._admission = admission
        self._known = known
        self._gone = gone
        self._waiting: set[_Newcomer] = set()
        self._judged: dict[str, bool] = {}  # of the last hosts, whether they are trusted: proxies are few

    def __len__(self) -> int:
        """How many have not said for whom they come."""
        return len(self._waiting)

    def expects(self, peer: str) -> bool:
        """Whether a connection from `peer` must begin with a header; one from elsewhere is as it is."""
        if not self._trust.trust:
            return True  # a unix socket: whoever may connect is trusted
        host = host_of(peer)
        judged = self._judged.get(host)
        if judged is None:
            if len(self._judged) >= 4096:
                self._judged.clear()
            judged = self._judged[host] = _within(host, self._trust.trust)
        return judged

    def take(self, fd: int, peer: str) -> None:
        """A new connection that must introduce itself; its descriptor is this object's from here."""
        if not self._admission.expect(peer):
            close_with_reset(fd)
            return
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        newcomer = _Newcomer(sock, peer)
        self._waiting.add(newcomer)
        if self._look(newcomer):
            return
        try:
            newcomer.watch = self._engine.watch(fd, select.EPOLLIN, partial(self._readable, newcomer))
        except KernelError as error:
            self._refuse(newcomer, f"it cannot be watched: {error}")
            return
        limit = self._trust.timeout
        late = f"its PROXY header was not there after {limit:g} s (proxy_protocol.timeout)"
        newcomer.timer = self._engine.later(limit, partial(self._refuse, newcomer, late))

    def _readable(self, newcomer: _Newcomer, _mask: int) -> None:
        if newcomer in self._waiting:
            self._look(newcomer)

    def _look(self, newcomer: _Newcomer) -> bool:
        """Takes of a header what has come; whether the newcomer is dealt with."""
        sock = newcomer.sock
        assert sock is not None
        try:
            seen = sock.recv(LONGEST, socket.MSG_PEEK)
            if not seen:
                self._refuse(newcomer, "it closed before it said for whom it comes (proxy_protocol)")
                return True
            length, whole = scan(newcomer.header + seen)
            while len(newcomer.header) < length:
                newcomer.header += sock.recv(length - len(newcomer.header))
            if not whole:
                return False
            origin = parse(newcomer.header)
        except (BlockingIOError, InterruptedError):
            return False
        except Malformed as error:
            self._refuse(newcomer, f"{error} (proxy_protocol)")
            return True
        except OSError as error:
            code = error.errno or 0
            self._refuse(newcomer, f"{os.strerror(code)} ({name_of(code)}) before its PROXY header had come")
            return True
        self._introduce(newcomer, origin)
        return True

    def _introduce(self, newcomer: _Newcomer, origin: Origin) -> None:
        self._waiting.discard(newcomer)
        self._admission.expected()
        log.debug("%s connects for %s", newcomer.peer, origin.peer or "nobody but itself")
        peer, via = (origin.peer, newcomer.peer) if origin.peer else (newcomer.peer, "")
        self._known(Introduced(newcomer.detach(), peer, origin.local, via))

    def _refuse(self, newcomer: _Newcomer, reason: str) -> None:
        if newcomer not in self._waiting:
            return
        self._waiting.discard(newcomer)
        self._admission.expected()
        self._admission.refuse(newcomer.peer, reason)
        close_with_reset(newcomer.detach())
        self._gone()

    def abort(self, reason: str) -> None:
        """Resets everybody who has not said for whom he comes."""
        for newcomer in list(self._waiting):
            self._refuse(newcomer, reason)


def _within(host: str, networks: tuple[Network, ...]) -> bool:
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return any(address.version == network.version and address in network for network in networks)
