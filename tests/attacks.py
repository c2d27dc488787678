"""A relay to be attacked: its route, connections to it, and their end."""

from __future__ import annotations

import contextlib
import socket

from peers import receive_all
from relays import Process

MIB = 1 << 20


def routes(text: str) -> str:
    """A configuration of one route called r."""
    return "drain: 5s\nroutes:\n  r: " + text + "\n"


def connect(served: Process, number: int = 0) -> socket.socket:
    """A connection to the address `number` that relay listens on."""
    return socket.create_connection(("127.0.0.1", served.port(number)))


def finish(sock: socket.socket) -> None:
    """Ends the stream and waits until relay has closed."""
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        receive_all(sock)
    sock.close()
