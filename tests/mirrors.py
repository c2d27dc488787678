"""Where the tees of a duplex route lead in tests: a receiver of many connections, and the reader of a fifo."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from duplexes import (
    in_background,
    outcome,
)
from peers import (
    PATIENCE,
    eventually,
    tcp_listener,
    unix_listener,
)


class Mirror:
    """A listener that keeps what each connection sent, or reads nothing while it is `deaf`."""

    def __init__(self, directory: Path, scheme: str = "tcp", *, deaf: bool = False) -> None:
        self._made = unix_listener(directory / f"mirror-{id(self)}") if scheme == "unix" else tcp_listener()
        self._deaf = deaf
        self.got: list[bytes] = []
        self.held: list[socket.socket] = []

    def __enter__(self) -> Mirror:
        self._listening, self.address = self._made.__enter__()
        self._thread = in_background(self._run)
        return self

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                if self._deaf:
                    self.held.append(sock)
                    continue
                with sock:
                    self.got.append(outcome(sock)[0])

    def hears_again(self) -> bytes:
        """All that its one connection has for it."""
        eventually(lambda: self.held, "somebody has connected")
        return outcome(self.held[0])[0]

    def __exit__(self, *error: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._made.__exit__(None, None, None)
        for sock in self.held:
            sock.close()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[list[bytes]]:
    """Somebody who reads a fifo to its end; afterwards the list has what came."""
    os.mkfifo(path)
    got: list[bytes] = []

    def read() -> None:
        with path.open("rb") as fifo:
            got.append(fifo.read())

    thread = in_background(read)
    yield got
    thread.join(PATIENCE)
