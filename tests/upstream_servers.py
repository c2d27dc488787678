"""Servers that say who they are, are killed and come back; clients that hear it; what a route says of its upstreams."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duplexes import Duplex, connected, in_background, reset
from peers import PATIENCE, assert_same, receive_exactly

HELLO = 8  # bytes: every server says its name first


class Server:
    """Says its name to whoever connects and echoes the rest; one thread for all of its connections. It can be killed,
    with everybody on it, and started again at its address."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name = name.ljust(HELLO).encode()
        self._at: Any = ("127.0.0.1", 0) if path is None else str(path)
        self._family = socket.AF_INET if path is None else socket.AF_UNIX
        self._listener: socket.socket | None = None
        self._connections: dict[int, socket.socket] = {}
        self._thread: threading.Thread | None = None
        self.served = 0
        self.start()

    @property
    def address(self) -> str:
        """As relay writes it."""
        return f"unix://{self._at}" if self._family == socket.AF_UNIX else f"tcp://127.0.0.1:{self._at[1]}"

    def start(self) -> None:
        """Listens, at the same address as before."""
        listener = self._listener = socket.socket(self._family)
        if self._family == socket.AF_UNIX:
            Path(self._at).unlink(missing_ok=True)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(self._at)
        listener.listen(128)
        listener.setblocking(False)
        self._at = listener.getsockname()
        self._wake, self._woken = socket.socketpair()
        self._thread = in_background(self._run, listener, self._woken, select.epoll())

    def _run(self, listener: socket.socket, woken: socket.socket, poll: select.epoll) -> None:
        with poll:
            poll.register(listener, select.EPOLLIN)
            poll.register(woken, select.EPOLLIN)
            while True:
                for fd, _mask in poll.poll():
                    if fd == woken.fileno():
                        return
                    if fd == listener.fileno():
                        with contextlib.suppress(OSError):  # it may be gone by now
                            sock = listener.accept()[0]
                            self._connections[sock.fileno()] = sock
                            poll.register(sock, select.EPOLLIN)
                            self.served += 1
                            sock.send(self.name)
                        continue
                    sock = self._connections[fd]
                    try:
                        piece = sock.recv(65536)
                        if piece:
                            sock.sendall(piece)
                            continue
                    except OSError:
                        pass
                    poll.unregister(fd)
                    del self._connections[fd]
                    sock.close()

    def kill(self) -> None:
        """Nobody listens any more, and whoever was connected is reset. Safe to call again."""
        if self._listener is None:
            return
        self._wake.close()
        assert self._thread is not None
        self._thread.join(PATIENCE)
        self._listener.close()
        self._woken.close()
        for sock in self._connections.values():
            reset(sock)
        self._connections.clear()
        self._listener = None


LISTEN = {"listen": "tcp://127.0.0.1:0"}


@contextlib.contextmanager
def several(count: int) -> Iterator[list[Server]]:
    """So many that are up, called s0, s1 and so on; all are killed at the end."""
    made = [Server(f"s{number}") for number in range(count)]
    try:
        yield made
    finally:
        for server in made:
            server.kill()


def addresses(servers: list[Server]) -> list[str]:
    """As a sink's `connect` has them."""
    return [server.address for server in servers]


class Client:
    """A connection through relay: who serves it, and whether it still works."""

    def __init__(self, address: str, host: str = "", first: bytes = b"") -> None:
        if host:
            to = address.removeprefix("tcp://").rpartition(":")
            self.sock = socket.create_connection((to[0], int(to[2])), PATIENCE, (host, 0))
        else:
            self.sock = connected(address)
        self.sock.sendall(first)
        self.by = receive_exactly(self.sock, HELLO).decode().strip()
        self.chance = random.Random(1)

    def works(self, size: int = 1000) -> None:
        """What it sends comes back."""
        data = self.chance.randbytes(size)
        self.sock.sendall(data)
        assert_same(receive_exactly(self.sock, size), data)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.sock.close()


def served_by(duplex: Duplex, count: int = 12) -> list[str]:
    """Who serves newcomers, one after another."""
    found = []
    for _ in range(count):
        with Client(duplex.address) as client:
            client.works(10)
            found.append(client.by)
    return found


def states(duplex: Duplex) -> list[str]:
    """In the order of the configuration."""
    return [one.state for one in duplex.route.upstreams.snapshot()]
