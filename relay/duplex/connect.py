"""One connection to the sink of a duplex route with stages."""

from __future__ import annotations

import socket
from collections.abc import Callable

from relay.endpoints import tcp, unix
from relay.endpoints.address import Address
from relay.endpoints.connecting import Connecting
from relay.engine import Engine

Connected = Callable[[int, int, str], None]


def connect(engine: Engine, address: Address, dead_after: float, done: Connected) -> Callable[[], None]:
    """Connects to tcp or unix; returns how to cancel it.

    `done(fd, 0, "")`, with a nonblocking descriptor that is the caller's, or `done(-1, errno, reason)`; `reason` is
    there when a name could not be looked up. It may be called before this returns.
    """

    def settled(sock: socket.socket | None, code: int, reason: str = "") -> None:
        if sock is None:
            done(-1, code, f"{reason}; {tcp.CHECK_NAME}" if reason else "")
            return
        sock.setblocking(False)
        done(sock.detach(), 0, "")

    if address.scheme == "tcp":
        return tcp.connect(engine, address, settled, dead_after)
    return Connecting(engine, [(socket.AF_UNIX, unix.place(address))], settled).cancel
