"""Connections that come and go in every way, by the thousand, through a duplex route to servers that come and go.

One thread holds both ends of all of them; what it keeps for a connection is a few words.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from relays import Process

RESET = struct.pack("ii", 1, 0)
SIZES = (0, 1, 64, 64, 1000, 1000, 20_000, 200_000)
DATA = random.Random(11).randbytes(max(SIZES))
GONE = (ConnectionResetError, BrokenPipeError)


class Footprint(NamedTuple):
    """Of a process: descriptors, how many of them are pipes' ends, threads, resident KiB."""

    descriptors: int
    pipes: int
    threads: int
    resident: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """As it is now."""
        proc = Path(f"/proc/{pid}")
        found = []
        for entry in list((proc / "fd").iterdir()):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry))  # noqa: PTH115 - there are many
        resident = int((proc / "status").read_text().split("VmRSS:")[1].split()[0])
        threads = len(list((proc / "task").iterdir()))
        return cls(len(found), sum(one.startswith("pipe:") for one in found), threads, resident)


class Told(threading.Thread):
    """Reads a relay's log to its end and keeps nothing of it but how many `sessions` it told of."""

    MARK = b'"event": "session"'

    def __init__(self, served: Process) -> None:
        super().__init__(daemon=True)
        assert served.process.stderr is not None
        self._fd = served.process.stderr.fileno()
        self.sessions = 0
        self.errors: list[bytes] = []
        self.start()

    def run(self) -> None:
        """To the end of the log."""
        rest = b""
        while piece := os.read(self._fd, 1 << 18):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self.sessions += self.MARK in line
                if b'"level": "error"' in line:
                    self.errors.append(line)


class Crowd:
    """Clients of a route at `to`, and the servers behind it, which say back whatever they are sent.

    `whole` counts the clients that had everything back, `broken` those that were reset, whoever did it. Owns all of
    the sockets; `close` it.
    """

    def __init__(self, seed: int, servers: int = 3) -> None:
        self.chance = random.Random(seed)
        self.whole = self.broken = self.came = self.unanswered = 0
        self._poll = select.epoll()
        self._listeners: list[socket.socket | None] = []
        self._places: list[tuple[str, int]] = []
        self._accepting: dict[int, int] = {}
        self._served: list[dict[int, socket.socket]] = []
        self._of: dict[int, tuple[socket.socket, int, bytearray]] = {}
        self._clients: dict[int, list[object]] = {}  # socket, bytes to come, bytes to send, end when whole
        self._order: list[int] = []
        for number in range(servers):
            self._places.append((f"127.0.0.{number + 1}", 0))
            self._listeners.append(None)
            self._served.append({})
            self.up(number)

    @property
    def addresses(self) -> list[str]:
        """Of the servers."""
        return [f"tcp://{host}:{port}" for host, port in self._places]

    @property
    def here(self) -> int:
        """Clients that are connected."""
        return len(self._clients)

    # -- servers

    def up(self, number: int) -> None:
        """The server listens, at its own address. Nothing happens if it does."""
        if self._listeners[number] is None:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self._places[number])
            sock.listen(1024)
            sock.setblocking(False)
            self._places[number] = sock.getsockname()
            self._listeners[number] = sock
            self._accepting[sock.fileno()] = number
            self._poll.register(sock, select.EPOLLIN)

    def down(self, number: int) -> None:
        """It is killed: nobody listens, whoever was connected is reset."""
        sock = self._listeners[number]
        if sock is not None:
            self._poll.unregister(sock)
            del self._accepting[sock.fileno()]
            sock.close()
            self._listeners[number] = None
        for fd, one in list(self._served[number].items()):
            self._part(fd, one, number, reset=True)

    def _part(self, fd: int, sock: socket.socket, number: int, *, reset: bool = False) -> None:
        self._poll.unregister(fd)
        del self._served[number][fd], self._of[fd]
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()

    def _accept(self, number: int) -> None:
        listener = self._listeners[number]
        assert listener is not None
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = listener.accept()
                sock.setblocking(False)
                self._served[number][sock.fileno()] = sock
                self._of[sock.fileno()] = (sock, number, bytearray())
                self._poll.register(sock, select.EPOLLIN)

    def _serve(self, fd: int) -> None:
        """It takes more when what it says back is under way."""
        sock, number, back = self._of[fd]
        try:
            if not back:
                piece = sock.recv(1 << 16)
                back += piece
                if not piece:
                    self._part(fd, sock, number)
                    return
            del back[: sock.send(back)]
        except BlockingIOError:
            pass
        except OSError:
            self._part(fd, sock, number)
            return
        self._poll.modify(fd, select.EPOLLOUT if back else select.EPOLLIN)

    # -- clients

    def come(self, to: tuple[str, int]) -> None:
        """One more client, which sends something, maybe nothing, and may end its stream behind it."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind((f"127.0.{self.chance.randrange(1, 200)}.{self.chance.randrange(1, 200)}", 0))
        with contextlib.suppress(BlockingIOError):
            sock.connect(to)
        fd = sock.fileno()
        size = self.chance.choice(SIZES)
        self._clients[fd] = [sock, size, size, self.chance.random() < 0.5]
        self._order.append(fd)
        self._poll.register(fd, select.EPOLLIN | select.EPOLLOUT)
        self.came += 1
        self.unanswered += size > 0

    def go(self) -> None:
        """One of the clients, by chance, closes or resets, whatever it waits for."""
        number = self.chance.randrange(len(self._order))
        self._order[number], self._order[-1] = self._order[-1], self._order[number]
        self._gone(self._order.pop(), listed=False, reset=self.chance.random() < 0.5)

    def _gone(self, fd: int, *, listed: bool = True, reset: bool = False) -> None:
        sock, to_come = self._clients.pop(fd)[:2]
        assert isinstance(sock, socket.socket)
        self.unanswered -= to_come != 0
        if listed:
            self._order.remove(fd)
        self._poll.unregister(fd)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()

    def _client(self, fd: int, mask: int) -> None:
        state = self._clients[fd]
        sock, to_come, to_send, ends = state
        assert isinstance(sock, socket.socket)
        assert isinstance(to_come, int)
        assert isinstance(to_send, int)
        try:
            if mask & select.EPOLLIN:
                piece = sock.recv(1 << 16)
                to_come -= len(piece)
                state[1] = to_come
                self.unanswered -= not to_come and len(piece) > 0
                if not piece:
                    self.whole += not to_come
                    self.broken += bool(to_come)
                    self._gone(fd)
                    return
            if mask & select.EPOLLOUT:
                if to_send:
                    to_send -= sock.send(DATA[:to_send])
                    state[2] = to_send
                if not to_send:
                    self._poll.modify(fd, select.EPOLLIN)
                    if ends:
                        sock.shutdown(socket.SHUT_WR)
            elif mask & (select.EPOLLHUP | select.EPOLLERR):
                sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            if not isinstance(error, GONE) and error.errno not in (errno.ENOTCONN, errno.ECONNREFUSED):
                raise
            self.broken += 1
            self._gone(fd)

    # -- all of them

    def turn(self, seconds: float = 0.0) -> int:
        """Does what there is to do now, or within `seconds`; on how many sockets."""
        events = self._poll.poll(seconds)
        for fd, mask in events:
            if fd in self._accepting:
                self._accept(self._accepting[fd])
            elif fd in self._of:
                self._serve(fd)
            elif fd in self._clients:
                self._client(fd, mask)
        return len(events)

    def churn(self, to: tuple[str, int], at_once: int, total: int, flap: int = 0) -> None:
        """`total` more clients come, `at_once` at most are there; as fast as they are answered. Every `flap` of them
        another server is killed, and the one killed before is back."""
        until, most = self.came + total, 100
        away = -1
        while self.came < until:
            for _ in range(min(50, until - self.came)):
                if self.here >= at_once:
                    self.go()
                self.come(to)
                if flap and self.came % flap == 0:
                    if away >= 0:
                        self.up(away)
                    away = self.chance.randrange(len(self._listeners))
                    self.down(away)
            self.turn()
            while self.unanswered > most and self.turn(1.0):
                pass
        if away >= 0:
            self.up(away)

    def leave(self) -> None:
        """All clients go."""
        while self._order:
            self.go()

    def close(self) -> None:
        """Everything."""
        self.leave()
        for number in range(len(self._listeners)):
            self.down(number)
        self._poll.close()


@contextlib.contextmanager
def crowd(seed: int = 5) -> Iterator[Crowd]:
    """A crowd that is gone in the end."""
    made = Crowd(seed)
    try:
        yield made
    finally:
        made.close()


def until(crowd: Crowd, told: Told, patience: float = 60.0) -> None:
    """The servers serve on until relay has told of every client that ever came."""
    end = time.monotonic() + patience
    while told.sessions < crowd.came:
        assert time.monotonic() < end, f"{told.sessions} sessions of {crowd.came} are over after {patience} s"
        crowd.turn(0.05)
