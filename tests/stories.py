"""Who closes first, and how: each story is told to a client and a server, and says what both saw."""

from __future__ import annotations

import random
import select
import socket
import time
from typing import Any

from duplexes import BOTH, in_background, outcome, reset
from peers import PATIENCE, assert_same, eventually, payload, receive_exactly

Ends = tuple[bytes, str]

# routes that are to look alike to both parties
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mirrored": BOTH,
    "staged": {"stages": ["meter", {"checksum": "xxh3"}], "replies": [{"limit": {"skip": 0}}]},
}
MIXES = [("tcp", "tcp"), ("unix", "unix"), ("tcp", "unix"), ("unix", "tcp")]


def client_ends_first(client: socket.socket, server: socket.socket) -> list[Ends]:
    """The client asks and half-closes; the whole answer still comes."""
    client.sendall(payload(1, 100_001))
    client.shutdown(socket.SHUT_WR)
    got = outcome(server)
    server.sendall(payload(2, 90_001))
    server.shutdown(socket.SHUT_WR)
    return [got, outcome(client)]


def server_ends_first(client: socket.socket, server: socket.socket) -> list[Ends]:
    """The server speaks first and half-closes; the client's answer still comes."""
    server.sendall(payload(3, 80_000))
    server.shutdown(socket.SHUT_WR)
    got = outcome(client)
    client.sendall(payload(4, 100_000))
    client.shutdown(socket.SHUT_WR)
    return [got, outcome(server)]


def both_at_once(client: socket.socket, server: socket.socket) -> list[Ends]:
    """Both send much before either reads, and end."""

    def send(sock: socket.socket, seed: int) -> None:
        sock.sendall(payload(seed, 5_000_001))
        sock.shutdown(socket.SHUT_WR)

    senders = [in_background(send, client, 5), in_background(send, server, 6)]
    heard: dict[str, Ends] = {}
    readers = [
        in_background(lambda: heard.update(client=outcome(client))),
        in_background(lambda: heard.update(server=outcome(server))),
    ]
    for thread in senders + readers:
        thread.join(PATIENCE)
    return [heard["client"], heard["server"]]


def nothing_is_said(client: socket.socket, server: socket.socket) -> list[Ends]:
    """The client closes without a byte, and the server hears the end."""
    client.close()
    got = outcome(server)
    server.close()
    return [got]


def client_closes_with_bytes_under_way(client: socket.socket, server: socket.socket) -> list[Ends]:
    """The client sends and closes at once: all it sent arrives."""
    client.sendall(payload(7, 100_000))
    client.close()
    return [outcome(server)]


def half_close_with_a_backlog(client: socket.socket, server: socket.socket) -> list[Ends]:
    """A half-close that stands behind more than all queues hold: the end comes after the last byte."""
    sender = in_background(lambda: (client.sendall(payload(8, 12_000_000)), client.shutdown(socket.SHUT_WR)))
    server.sendall(b"first")
    greeting = receive_exactly(client, 5)
    got = outcome(server)
    sender.join(PATIENCE)
    server.sendall(b"last")
    server.close()
    return [got, (greeting, ""), outcome(client)]


def a_server_that_closes_is_written_to(client: socket.socket, server: socket.socket) -> list[Ends]:
    """Whoever writes to a peer that has closed is told by an error in the end."""
    server.sendall(b"bye")
    server.close()
    got = outcome(client)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            client.send(b"more")
        except (BrokenPipeError, ConnectionResetError):
            return [got, (b"", "told")]
        select.select([], [], [], 0.002)
    return [got, (b"", "never told")]


STORIES = [
    client_ends_first,
    server_ends_first,
    both_at_once,
    nothing_is_said,
    client_closes_with_bytes_under_way,
    half_close_with_a_backlog,
    a_server_that_closes_is_written_to,
]


def client_resets(client: socket.socket, server: socket.socket) -> list[Ends]:
    """An idle client resets the connection."""
    reset(client)
    return [outcome(server)]


def server_answers_and_resets(client: socket.socket, server: socket.socket) -> list[Ends]:
    """What the server sent before its reset is read, then the reset."""
    client.sendall(b"question")
    receive_exactly(server, 8)
    server.sendall(payload(9, 50_000))
    got = receive_exactly(client, 50_000)
    reset(server)
    return [(got, ""), outcome(client)]


def server_closes_with_bytes_unread(client: socket.socket, server: socket.socket) -> list[Ends]:
    """A server that does not read all of a question answers and closes: the answer, then a reset."""
    client.sendall(payload(10, 1000))
    receive_exactly(server, 10)
    server.sendall(b"too long")
    server.close()
    return [outcome(client)]


def client_resets_a_reading_server(client: socket.socket, server: socket.socket) -> list[Ends]:
    """All that was received before a reset is read before it."""
    client.sendall(payload(11, 5000))
    server.setblocking(True)
    assert select.select([server], [], [], PATIENCE)[0]
    first = server.recv(1)
    eventually(lambda: len(server.recv(5000, socket.MSG_PEEK)) == 4999, "the rest arrived")
    reset(client)
    rest, end = outcome(server)
    return [(first + rest, end)]


RESETS = [
    client_resets,
    server_answers_and_resets,
    server_closes_with_bytes_unread,
    client_resets_a_reading_server,
]


def play(rng: random.Random, client: socket.socket, server: socket.socket) -> list[bytes]:
    """Random sends, stalls, reads and half-closes on both ends, then all to the end; returns what was sent."""
    ends = [client, server]
    for sock in ends:
        sock.setblocking(False)
    streams = [payload(rng.randrange(1000), rng.choice([0, 1, 100, 70_000, 900_000])) for _ in ends]
    sent, got, shut, over = [0, 0], [bytearray(), bytearray()], [False, False], [False, False]
    sizes = [1, 2, 100, 4096, 16384, 65536, 500_000]
    steps = 0
    while not all(over):
        steps += 1
        k = rng.randrange(2)
        if rng.random() < 0.5 and not shut[k]:
            piece = streams[k][sent[k] : sent[k] + rng.choice(sizes)]
            if piece:
                try:
                    sent[k] += ends[k].send(piece)
                except BlockingIOError:
                    pass
            elif sent[k] == len(streams[k]):
                ends[k].shutdown(socket.SHUT_WR)
                shut[k] = True
        elif not over[k] and (rng.random() < 0.7 or shut[k]):
            try:
                piece = ends[k].recv(rng.choice(sizes))
            except BlockingIOError:
                if all(shut):
                    select.select([s for s, done in zip(ends, over, strict=True) if not done], [], [], 0.01)
                continue
            got[k] += piece
            over[k] = not piece
        assert steps < 200_000, "the session hangs"
    assert_same(bytes(got[1]), streams[0])
    assert_same(bytes(got[0]), streams[1])
    return streams
