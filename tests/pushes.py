"""Whole streams into a relay that serves, and whether it took them."""

from __future__ import annotations

import socket

from peers import receive_all

EACH = """
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0"}}
    sink: {{file: "{file}"}}
"""
LIVE = """
routes:
  r:
    source: {listen: "tcp://127.0.0.1:0"}
    stages: [{tee: {to: {file: "in/{id}.bin"}}}]
    sink: {listen: "tcp://127.0.0.1:0"}
"""


def push(port: int, data: bytes) -> None:
    """Sends a whole stream and waits until relay closes, which it does once all is delivered."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b""


def accepted(port: int, data: bytes) -> bool:
    """Whether relay takes the stream; it refuses with a reset."""
    try:
        push(port, data)
    except ConnectionResetError:
        return False
    return True
