"""Duplex routes, plain and with stages: who closes first, how, and with what under way, against a direct connection."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from duplexes import direct, outcome, relayed, reset
from peers import eventually, payload
from stories import SHAPES, Ends

IN_FLIGHT = 40_000  # bytes; fits into any socket's queues
HOW = ("half-close", "close", "reset")
FLIGHTS = ("nothing", "from it", "to it", "both ways")


def cases() -> Iterator[tuple[str, str, str, str, str]]:
    """Kind of client, kind of server, who closes first, how, and what is under way then.

    A unix socket has no reset of its own, and its close with bytes unread is no end of stream to a tcp peer: only
    what can be the same on both sides of relay is compared there.
    """
    for closer, how, flight in itertools.product(("client", "server"), HOW, FLIGHTS):
        yield "tcp", "tcp", closer, how, flight
        destroys = how == "reset" or (how == "close" and flight in ("to it", "both ways"))
        if not destroys:
            for source, sink in (("unix", "unix"), ("tcp", "unix"), ("unix", "tcp")):
                yield source, sink, closer, how, flight


def story(client: socket.socket, server: socket.socket, closer: str, how: str, flight: str) -> list[Ends]:
    """What the one saw that did not close first, and what the closer still got after a half-close."""
    first, other = (client, server) if closer == "client" else (server, client)
    for from_, to, wanted in ((first, other, "from it"), (other, first, "to it")):
        if flight in (wanted, "both ways"):
            from_.sendall(payload(len(wanted), IN_FLIGHT))
            eventually(lambda sock=to: arrived(sock) == IN_FLIGHT, "what is under way has arrived")
    match how:
        case "half-close":
            first.shutdown(socket.SHUT_WR)
        case "close":
            first.close()
        case "reset":
            reset(first)
    seen = [outcome(other)]
    if how == "half-close":
        other.sendall(b"good bye")
        other.shutdown(socket.SHUT_WR)
        seen.append(outcome(first))
    return seen


def arrived(sock: socket.socket) -> int:
    """How many bytes wait to be received."""
    with contextlib.suppress(BlockingIOError):
        return len(sock.recv(IN_FLIGHT + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("source", "sink", "closer", "how", "flight"), list(cases()))
def test_the_half_close_matrix(
    tmp_path: Path, source: str, sink: str, closer: str, how: str, flight: str, shape: str
) -> None:
    """Whoever closes first, whichever way, with whatever under way: both see what they see without relay."""
    with direct(source, tmp_path) as (client, server):
        expected = story(client, server, closer, how, flight)
    with relayed(source, sink, tmp_path, **SHAPES[shape]) as (client, server, duplex):
        assert story(client, server, closer, how, flight) == expected
        client.close()
        server.close()
        record = duplex.record()
        broken = any(end == "ConnectionResetError" for _, end in expected)
        assert record.result == ("failed" if broken else "delivered"), record.reason
        assert record.ended_by == ("source" if closer == "client" else "sinks")
