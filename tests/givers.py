"""Far sides of sources, of every kind: what a `Giver` is given comes out of relay."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import socket
import termios
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers import PATIENCE, accept, connected, eventually, reset, tcp_listener, unix_listener, wait_for
from relays import Relay


class Giver:
    """Where relay's source gets its bytes. `source` is what the route says; `start(relay)` once it is open."""

    def __init__(self, source: object) -> None:
        self.source = source
        self.whole = False  # the bytes must be there before relay opens it
        self.can_reset = False

    def prepare(self, data: bytes) -> None:
        """For files: the content."""

    def start(self, relay: Relay) -> None:
        """Relay is open: connect to it if that is how it is."""

    def give(self, data: bytes) -> None:
        """Hands the bytes over, in one call or several."""

    def end(self) -> None:
        """The stream ends."""

    def reset(self) -> None:
        """The stream breaks off."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what is left."""


class SocketGiver(Giver):
    """Connects to relay, or lets relay connect, or hands relay one end of a pair."""

    def __init__(
        self, source: object, *, sock: socket.socket | None = None, listener: socket.socket | None = None
    ) -> None:
        super().__init__(source)
        self.can_reset = True
        self.sock = sock
        self._listener = listener

    def start(self, relay: Relay) -> None:
        if self._listener is not None:
            self.sock = accept(self._listener)
        elif self.sock is None:
            self.sock = connected(relay.bound[-1])

    def give(self, data: bytes) -> None:
        assert self.sock is not None
        self.sock.settimeout(PATIENCE)
        self.sock.sendall(data)

    def end(self) -> None:
        assert self.sock is not None
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        assert self.sock is not None
        reset(self.sock)

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()


class FdGiver(Giver):
    """Writes to a descriptor: a pipe, a fifo, a terminal's other side."""

    def __init__(self, source: object, write: int = -1, open_path: Path | None = None) -> None:
        super().__init__(source)
        self._write = write
        self._path = open_path

    def start(self, relay: Relay) -> None:
        if self._path is not None:
            self._write = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)

    def give(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            wait_for(self._write, select.POLLOUT)
            view = view[os.write(self._write, view[:65536]) :]

    def end(self) -> None:
        self.close()

    def close(self) -> None:
        if self._write >= 0:
            os.close(self._write)
            self._write = -1


class TerminalGiver(FdGiver):
    """Types on a terminal. Its end is ^D on an empty line: hanging up would throw away what is unread."""

    def __init__(self, master: int, slave: int) -> None:
        super().__init__({"fd": slave}, master)
        self._slave = slave
        self._given = 0

    def start(self, relay: Relay) -> None:
        self._relay = relay

    def give(self, data: bytes) -> None:
        super().give(data)
        self._given += len(data)

    def end(self) -> None:
        eventually(lambda: self._relay.moved() == self._given, "what was typed is read")
        mode = termios.tcgetattr(self._slave)
        mode[3] |= termios.ICANON
        termios.tcsetattr(self._slave, termios.TCSANOW, mode)
        os.write(self._write, b"\x04")


class FileGiver(Giver):
    """The bytes lie in a file."""

    def __init__(self, source: object, path: Path) -> None:
        super().__init__(source)
        self.whole = True
        self._path = path

    def prepare(self, data: bytes) -> None:
        self._path.write_bytes(data)


@contextlib.contextmanager
def _listening(address: str) -> Iterator[Giver]:
    giver = SocketGiver({"listen": address})
    yield giver
    giver.close()


@contextlib.contextmanager
def _connecting(make: Any) -> Iterator[Giver]:
    with make as (listener, address):
        giver = SocketGiver({"connect": address}, listener=listener)
        yield giver
        giver.close()


@contextlib.contextmanager
def _file(path: Path) -> Iterator[Giver]:
    yield FileGiver(str(path), path)


@contextlib.contextmanager
def _fd_file(path: Path) -> Iterator[Giver]:
    path.touch()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    yield FileGiver({"fd": fd}, path)
    os.close(fd)


@contextlib.contextmanager
def _fifo(path: Path) -> Iterator[Giver]:
    os.mkfifo(path)
    giver = FdGiver({"fifo": str(path)}, open_path=path)
    yield giver
    giver.close()


@contextlib.contextmanager
def _fd_pipe(_path: Path) -> Iterator[Giver]:
    read, write = os.pipe()
    giver = FdGiver({"fd": read}, write)
    yield giver
    giver.close()
    os.close(read)


@contextlib.contextmanager
def _fd_socket(_path: Path) -> Iterator[Giver]:
    near, far = socket.socketpair()
    giver = SocketGiver({"fd": near.fileno()}, sock=far)
    yield giver
    assert near.getblocking(), "the given descriptor was made nonblocking"
    giver.close()
    near.close()


@contextlib.contextmanager
def _fd_terminal(_path: Path) -> Iterator[Giver]:
    master, slave = pty.openpty()
    tty.setraw(slave)
    giver = TerminalGiver(master, slave)
    yield giver
    giver.close()
    os.close(slave)


@contextlib.contextmanager
def _null(_path: Path) -> Iterator[Giver]:
    yield Giver("null:")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "tcp4": lambda _path: _listening("tcp://127.0.0.1:0"),
    "tcp6": lambda _path: _listening("tcp://[::1]:0"),
    "tcp-connect": lambda _path: _connecting(tcp_listener()),
    "unix": lambda path: _listening(f"unix://{path}/in.sock"),
    "unix-abstract": lambda path: _listening(f"unix://@relay-test-in-{os.getpid()}-{path.name}"),
    "unix-connect": lambda path: _connecting(unix_listener(path / "far.sock")),
    "file": lambda path: _file(path / "in"),
    "fifo": lambda path: _fifo(path / "in.fifo"),
    "fd-pipe": _fd_pipe,
    "fd-file": lambda path: _fd_file(path / "given"),
    "fd-socket": _fd_socket,
    "fd-terminal": _fd_terminal,
}
