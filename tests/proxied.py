"""Who is named in PROXY headers, routes that expect them, and what they say of a connection's two ends."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from typing import Any

from duplexes import Duplex
from peers import accept, receive_exactly, tcp_listener

from relay.endpoints.proxy_header import make

HERE = "127.0.0.0/8"
CLIENT, SERVICE = "192.0.2.7:4711", "198.51.100.2:443"
HEADERS = {version: make(version, CLIENT, SERVICE) for version in ("v1", "v2")}  # type: ignore[arg-type] # these two
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"


def has_ipv6() -> bool:
    """Whether somebody can listen on ::1."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


HAS_IPV6 = has_ipv6()


def trusting(**limits: Any) -> dict[str, Any]:
    """A source that believes everybody on this machine."""
    return {"listen": "tcp://127.0.0.1:0", "proxy_protocol": HERE, **({"limits": limits} if limits else {})}


def name_of(sock: socket.socket) -> str:
    """A connection's own end as records name it."""
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def peer_of(sock: socket.socket) -> str:
    """Its other end."""
    host, port = sock.getpeername()[:2]
    return f"{host}:{port}"


@contextlib.contextmanager
def behind(source: Any, **sink: Any) -> Iterator[tuple[Duplex, socket.socket]]:
    """A duplex route from `source` to a listening socket of the test's."""
    with tcp_listener() as (listening, address), Duplex(source, {"connect": address, **sink}) as duplex:
        yield duplex, listening


@contextlib.contextmanager
def accept_after(client: socket.socket, listening: socket.socket) -> Iterator[socket.socket]:
    """What the server gets once `client` has introduced itself and said one byte."""
    client.sendall(HEADERS["v1"] + b"x")
    with accept(listening) as server:
        assert receive_exactly(server, 1) == b"x"
        yield server


def refusals(text: str) -> list[str]:
    """Why connections were refused, as the log has it."""
    return re.findall(r"refused: (.*?) \(\d+ refused", text)
