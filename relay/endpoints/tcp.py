"""TCP: `tcp://host:port` to listen on or to connect to, IPv4 and IPv6.

Facts (man 7 tcp, 7 ipv6; RFC 8305 for trying addresses in turn):
- Name look-up may take seconds: it runs on a thread, never on the loop, and again at every connect.
- Without TCP_NODELAY the tail of a write waits for the acknowledgement of what is under way.
- An IPv6 socket bound to :: serves IPv4 as well when IPV6_V6ONLY is off.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

from relay.endpoints import passed
from relay.endpoints.address import Address
from relay.endpoints.base import hint
from relay.endpoints.connecting import Connecting, Place
from relay.endpoints.listening import BACKLOG, Bound, Key
from relay.endpoints.liveness import tune
from relay.endpoints.options import DEAD_AFTER
from relay.endpoints.pacing import unpace
from relay.endpoints.socket import SocketSink, SocketSource
from relay.engine import Engine
from relay.errors import SourceError

log = logging.getLogger("relay.endpoints")

CHECK_NAME = "check the name, or write the address in figures"


def lookup(host: str, port: int, *, passive: bool = False) -> list[Place]:
    """The places a name stands for, in the resolver's order. Blocks; raises socket.gaierror."""
    flags = socket.AI_PASSIVE if passive else socket.AI_ADDRCONFIG
    # text would load the codec of international names, which a sandbox may not even let us read by now
    name = (host.encode("ascii") if host.isascii() else host) or None
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        if passive:
            raise
        # AI_ADDRCONFIG hides loopback addresses on a machine without a network
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    places: list[Place] = []
    for family, _kind, _protocol, _canonical, place in found:
        if (family, place) not in places:
            places.append((family, place))
    return places


def is_numeric(host: str) -> bool:
    """Whether no look-up is needed: "" or an address in figures."""
    try:
        socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return False
    return True


def connect(
    engine: Engine,
    address: Address,
    done: Callable[[socket.socket | None, int, str], None],
    dead_after: float = DEAD_AFTER,
) -> Callable[[], None]:
    """Connects, looking the name up off the loop: `done(socket, errno, reason)`; returns how to cancel it."""
    state: dict[str, Any] = {}

    def settled(sock: socket.socket | None, code: int) -> None:
        if sock is not None:
            tune(sock, dead_after)
        done(sock, code, "")

    def found(places: list[Place] | None, failed: BaseException | None) -> None:
        if "cancelled" in state:
            return
        if failed is not None or not places:
            reason = failed.strerror if isinstance(failed, socket.gaierror) else str(failed)
            done(None, 0, f"looking up {address.host!r}: {reason}")
            return
        state["connecting"] = Connecting(engine, places, settled)

    def cancel() -> None:
        state["cancelled"] = True
        if "connecting" in state:
            state["connecting"].cancel()

    host = address.host or "localhost"
    if is_numeric(host):
        found(lookup(host, address.port), None)
    else:
        engine.work(lambda: lookup(host, address.port), found)
    return cancel


class TcpSink(SocketSink):
    """Connects out and writes there."""

    def __init__(
        self,
        engine: Engine,
        address: Address,
        *,
        close_with_peer: bool = False,
        patience: float = 0.0,
        dead_after: float = DEAD_AFTER,
    ) -> None:
        super().__init__(
            engine,
            str(address),
            close_with_peer=close_with_peer,
            patience=patience,
            dead_after=dead_after,
        )
        self._to = address
        self._cancel: Callable[[], None] | None = None

    def open(self) -> None:
        """Connects; the name is looked up on a thread."""
        self._cancel = connect(self.engine, self._to, self._connected, self.dead_after)

    def _connected(self, sock: socket.socket | None, code: int, reason: str) -> None:
        self._cancel = None
        if sock is not None:
            self.adopt(sock)
        else:
            self.not_connected(code, reason, CHECK_NAME * bool(reason))

    def close(self) -> None:
        """Gives up connecting, or closes the connection."""
        if self._cancel is not None:
            self._cancel()
            self._cancel = None
        super().close()


class TcpSource(SocketSource):
    """Connects out and reads from there."""

    def __init__(self, engine: Engine, address: Address, *, dead_after: float = DEAD_AFTER) -> None:
        super().__init__(engine, str(address), None, str(address))
        self.dead_after = dead_after
        self._to = address
        self._cancel: Callable[[], None] | None = None

    def open(self) -> None:
        """Connects; then on_open, or on_fail."""
        self._cancel = connect(self.engine, self._to, self._connected, self.dead_after)

    def _connected(self, sock: socket.socket | None, code: int, reason: str) -> None:
        self._cancel = None
        if sock is None:
            self.on_fail(self.error("connecting to", code, reason=reason, advice=CHECK_NAME * bool(reason)))
            return
        self._sock = sock
        sock.setblocking(False)
        super().open()

    def close(self, *, reset: bool = False) -> None:
        """Gives up connecting, or closes the connection."""
        if self._cancel is not None:
            self._cancel()
            self._cancel = None
        super().close(reset=reset)


def places(address: Address) -> list[Place]:
    """Where to listen for `address`; with an empty host that is one dual-stack socket. Looks names up, which blocks.

    Raises SourceError.
    """
    if not address.host:
        return [(socket.AF_INET6, ("::", address.port))]
    try:
        return lookup(address.host, address.port, passive=True)
    except (socket.gaierror, UnicodeError) as error:
        reason = str(error.strerror if isinstance(error, socket.gaierror) else error)
        raise SourceError(str(address), "looking up", 0, CHECK_NAME, reason=reason) from error


def keys(address: Address, at: Sequence[Place], owner: str) -> list[Key]:
    """Names the sockets that listen at these places. Any free port is a port of `owner`'s own."""
    own = owner if address.port == 0 else ""
    return [
        ("tcp", family, place[0], address.port, *place[2:], bool(address.host), own) for family, place in at
    ]


def bind(
    address: Address,
    at: Sequence[Place],
    owner: str = "",
    take: Callable[[Key], Bound | None] = lambda _key: None,
) -> list[Bound]:
    """Listens on all of these places; raises SourceError when one of them is refused.

    `take` may know a socket that listens there already. Where there is no IPv6 an empty host is 0.0.0.0. Port 0 takes
    any free port, the same in every family: the sockets' `address` says which.
    """
    found: list[Bound] = []
    made: list[Bound] = []
    port = address.port
    try:
        for key, (family, place) in zip(keys(address, at, owner), at, strict=True):
            bound = take(key)
            if bound is None:
                bound = _listen_at(address, family, (place[0], port, *place[2:]), key)
                made.append(bound)
            found.append(bound)
            if port == 0:  # the next family takes the same port
                port = Address.parse(found[0].address).port
    except SourceError:
        for bound in made:
            bound.close()
        raise
    return found


def _listen_at(address: Address, family: int, place: Any, key: Key) -> Bound:
    at = Address("tcp", host=str(place[0]) if address.host else "", port=int(place[1]))
    sock = passed.take(at, family)
    if sock is not None:
        host, port = sock.getsockname()[:2]
        return Bound(sock, str(Address("tcp", host=host, port=port)), key, passed=True)
    try:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            if address.host or error.errno != errno.EAFNOSUPPORT:
                raise
            family, place = socket.AF_INET, ("0.0.0.0", place[1])
            sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if address.host else 0)
        unpace(sock, str(place[0]))
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise SourceError(str(address), "listening on", error.errno or 0, hint(error.errno or 0)) from error

    bound = sock.getsockname()
    shown = Address("tcp", host=str(bound[0]), port=int(bound[1]))
    return Bound(sock, str(shown), key)
