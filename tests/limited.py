"""A route whose source has limits, connections to it, and whether they are let in."""

from __future__ import annotations

import socket

from peers import receive_all
from relays import Process


def route(limits: str, sink: str = '"null:"', host: str = "127.0.0.1", more: str = "") -> str:
    """One route whose source has limits."""
    return (
        f'routes: {{r: {{source: {{listen: "tcp://{host}:0", limits: {{{limits}}}{more}}}, sink: {sink}}}}}'
    )


def connect(served: Process, source: str = "127.0.0.1") -> socket.socket:
    """A connection from the address `source`."""
    return socket.create_connection(("127.0.0.1", served.port()), source_address=(source, 0))


def is_in(sock: socket.socket) -> bool:
    """Whether relay takes a whole stream from the connection; it refuses with a reset."""
    try:
        sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        return receive_all(sock) == b""
    except (ConnectionResetError, BrokenPipeError, OSError):
        return False
    finally:
        sock.close()


def was_reset(sock: socket.socket) -> bool:
    """Whether the connection ends with a reset, rather than with an end of stream."""
    try:
        receive_all(sock)
    except ConnectionResetError:
        return True
    finally:
        sock.close()
    return False
