"""`relay send` in a process of its own, and receivers that keep what arrives."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import peers
from peers import PATIENCE, accept, receive_all, tcp_listener

MIB = 1 << 20
RELAY = [sys.executable, "-m", "relay"]


def relay(*words: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """`relay send` in a process of its own, run to its end."""
    options.setdefault("stdin", subprocess.DEVNULL)
    return peers.run([*RELAY, "send", *words], **options)


class Receivers:
    """Threads that each take connections on a listener of their own and keep what arrives, in order."""

    def __init__(self, count: int, connections: int = 1) -> None:
        self.streams: list[list[bytes]] = [[] for _ in range(count)]
        self.addresses: list[str] = []
        self._stack = contextlib.ExitStack()
        self._threads: list[threading.Thread] = []
        for streams in self.streams:
            listener, address = self._stack.enter_context(tcp_listener())
            self.addresses.append(address)
            wanted = (listener, connections, streams)
            self._threads.append(threading.Thread(target=self._receive, args=wanted, daemon=True))
            self._threads[-1].start()

    def _receive(self, listener: socket.socket, connections: int, streams: list[bytes]) -> None:
        for _ in range(connections):
            with accept(listener) as sock:
                streams.append(receive_all(sock))

    def __enter__(self) -> Receivers:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
        self._stack.close()

    @property
    def options(self) -> list[str]:
        """`--to ADDRESS` for each."""
        return [word for address in self.addresses for word in ("--to", address)]


@contextlib.contextmanager
def thread(function: Callable[[], None]) -> Iterator[None]:
    """`function` beside the block, joined at its end; what it raises is raised there."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    beside = threading.Thread(target=run, daemon=True)
    beside.start()
    yield
    beside.join(PATIENCE)
    assert not beside.is_alive()
    if failed:
        raise failed[0]
