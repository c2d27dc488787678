"""Far sides of sinks, of every kind: a `Taker`'s thread reads what relay writes, once it was told to."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers import PATIENCE, accept, connected, received, reset, tcp_listener, unix_listener, wait_for
from relays import Relay


class Taker:
    """Where relay's sink leaves its bytes. `sink` is what the route says.

    `take` starts the thread that reads; `taken` waits for it and returns all it got. `end_given` closes what the
    test itself holds of a descriptor that relay was given, so that the reader sees the end.
    """

    def __init__(self, sink: object) -> None:
        self.sink: Any = sink
        self.can_clog = True
        self.can_reset = False
        self.got = bytearray()
        self.broke: OSError | None = None
        self._thread: threading.Thread | None = None

    def start(self, relay: Relay) -> None:
        """Relay is open: connect to it if that is how it is."""

    def take(self) -> None:
        """Reads from now on, on a thread."""
        self._thread = threading.Thread(target=self._take, name="taker", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            for piece in self.pieces():
                self.got += piece
        except OSError as error:
            self.broke = error

    def pieces(self) -> Iterator[bytes]:
        """What comes, until the end."""
        yield from ()

    def end_given(self) -> None:
        """See the class."""

    def taken(self) -> bytes:
        """All that came."""
        self.end_given()
        if self._thread is None:
            self.take()
        assert self._thread is not None
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the reader saw no end of stream"
        return bytes(self.got)

    def reset(self) -> None:
        """Breaks the connection off."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what is left."""


class SocketTaker(Taker):
    """Accepts relay's connection, or joins its broadcast, or holds the other end of a pair."""

    def __init__(
        self,
        sink: object,
        *,
        listener: socket.socket | None = None,
        sock: socket.socket | None = None,
        given: socket.socket | None = None,
        joins: bool = False,
    ) -> None:
        super().__init__(sink)
        self.can_reset = True
        self._given = given
        self.sock = sock
        self._listener = listener
        self._joins = joins
        if listener is not None and listener.family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)

    def start(self, relay: Relay) -> None:
        if self._joins:
            self.sock = connected(relay.bound[0], 16384)
            joined = threading.Event()
            relay.post(lambda: relay.post(lambda: relay.post(joined.set)))
            joined.wait(PATIENCE)

    def connection(self) -> socket.socket:
        """The socket, accepted now if it was not before."""
        if self.sock is None:
            assert self._listener is not None
            self.sock = accept(self._listener)
        return self.sock

    def pieces(self) -> Iterator[bytes]:
        yield from received(self.connection())
        with contextlib.suppress(OSError):
            self.connection().shutdown(socket.SHUT_WR)  # relay waits a while for its peer to close first

    def talk(self, data: bytes) -> None:
        """Sends something to the one-way sink."""
        self.connection().sendall(data)

    def half_close(self) -> None:
        """Shuts its own write side."""
        self.connection().shutdown(socket.SHUT_WR)

    def end_given(self) -> None:
        if self._given is not None and self._given.fileno() >= 0:
            assert self._given.getblocking(), "the given descriptor was made nonblocking"
            self._given.close()

    def reset(self) -> None:
        reset(self.connection())

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()


class FdTaker(Taker):
    """Reads a pipe, a fifo or a terminal's other side; `given` is the test's copy of what relay writes to."""

    def __init__(self, sink: object, read: int = -1, given: int = -1, path: Path | None = None) -> None:
        super().__init__(sink)
        self._read = read
        self._given = given
        self._path = path

    def pieces(self) -> Iterator[bytes]:
        if self._path is not None:
            self._read = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        while True:
            wait_for(self._read)
            try:
                piece = os.read(self._read, 1 << 20)
            except OSError:
                return  # EIO: the terminal has no other side any more
            if not piece:
                return
            yield piece

    def end_given(self) -> None:
        if self._given >= 0:
            os.close(self._given)
            self._given = -1

    def close(self) -> None:
        self.end_given()
        if self._read >= 0:
            os.close(self._read)
            self._read = -1


class FileTaker(Taker):
    """Reads the file when all is over."""

    def __init__(self, sink: object, path: Path, given: int = -1) -> None:
        super().__init__(sink)
        self.can_clog = False
        self._path = path
        self._given = given

    def take(self) -> None:
        """There is nothing to do meanwhile."""

    def taken(self) -> bytes:
        return self._path.read_bytes()

    def close(self) -> None:
        if self._given >= 0:
            os.close(self._given)
            self._given = -1


@contextlib.contextmanager
def closing_taker(taker: Taker) -> Iterator[Taker]:
    """Closes it at the end."""
    try:
        yield taker
    finally:
        taker.close()


@contextlib.contextmanager
def _to_listener(make: Any, host: str = "") -> Iterator[Taker]:
    with make as (listener, address):
        if host:
            address = f"tcp://{host}:{listener.getsockname()[1]}"
        with closing_taker(SocketTaker({"connect": address}, listener=listener)) as taker:
            yield taker


@contextlib.contextmanager
def _to_file(path: Path) -> Iterator[Taker]:
    yield FileTaker(str(path), path)


@contextlib.contextmanager
def _to_fd_file(path: Path, flags: int = 0) -> Iterator[Taker]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    with closing_taker(FileTaker({"fd": fd}, path, fd)) as taker:
        yield taker


@contextlib.contextmanager
def _to_fifo(path: Path) -> Iterator[Taker]:
    os.mkfifo(path)
    with closing_taker(FdTaker({"fifo": str(path)}, path=path)) as taker:
        yield taker


@contextlib.contextmanager
def _to_fd_pipe(_path: Path) -> Iterator[Taker]:
    read, write = os.pipe()
    with closing_taker(FdTaker({"fd": write}, read, write)) as taker:
        yield taker


@contextlib.contextmanager
def _to_fd_socket(_path: Path) -> Iterator[Taker]:
    near, far = socket.socketpair()
    with near, closing_taker(SocketTaker({"fd": near.fileno()}, sock=far, given=near)) as taker:
        yield taker


@contextlib.contextmanager
def _to_fd_terminal(_path: Path) -> Iterator[Taker]:
    master, slave = pty.openpty()
    tty.setraw(slave)
    with closing_taker(FdTaker({"fd": slave}, master, slave)) as taker:
        yield taker


@contextlib.contextmanager
def _to_subscribers(address: str) -> Iterator[Taker]:
    with closing_taker(SocketTaker({"listen": address}, joins=True)) as taker:
        yield taker


SINKS: dict[str, Callable[[Path], Any]] = {
    "tcp4": lambda _path: _to_listener(tcp_listener()),
    "tcp6": lambda _path: _to_listener(tcp_listener("::1")),
    "tcp-name": lambda _path: _to_listener(tcp_listener(), "localhost"),
    "unix": lambda path: _to_listener(unix_listener(path / "out.sock")),
    "file": lambda path: _to_file(path / "out"),
    "fifo": lambda path: _to_fifo(path / "out.fifo"),
    "fd-pipe": _to_fd_pipe,
    "fd-file": lambda path: _to_fd_file(path / "out-given"),
    "fd-append": lambda path: _to_fd_file(path / "out-append", os.O_APPEND),
    "fd-socket": _to_fd_socket,
    "fd-terminal": _to_fd_terminal,
    "broadcast": lambda _path: _to_subscribers("tcp://127.0.0.1:0"),
    "broadcast-unix": lambda path: _to_subscribers(f"unix://{path}/live.sock"),
}
