"""What every source and every sink must do, whatever its kind: checks as plain functions, and the kinds.

A `Giver` is the far side of a source: what it is given comes out of relay. A `Taker` is the far side of a sink:
a thread reads what relay writes, and only once it was told to. A kind is a context manager that makes one.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import socket
import struct
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    received,
    tcp_listener,
    unix_listener,
    wait_for,
)
from relays import Relay

from relay.endpoints.address import Address
from relay.journal.record import SessionRecord, SinkRecord


def connected(address: str, receive_buffer: int = 0) -> socket.socket:
    """A blocking socket connected to an address as relay writes it."""
    where = Address.parse(address)
    if where.scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        path = where.path
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        return sock
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    sock = socket.socket(family)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect((where.host, where.port))
    return sock


def reset(sock: socket.socket) -> None:
    """Closes a socket so that its peer sees a reset: an RST on tcp, unread bytes thrown away on unix."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# --- the far side of a source -----------------------------------------------------------------------------


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

# --- the far side of a sink -------------------------------------------------------------------------------


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

# --- the checks -------------------------------------------------------------------------------------------


METHOD = "auto"  # of every route that does not ask for one; tests/test_conformance.py changes it


def route_of(giver: Giver, takers: list[Taker], on_slow: object = None, **more: Any) -> dict[str, Any]:
    """A route from the giver's source; every taker but the last stands at a tee, with the policy if given."""
    policy = {} if on_slow is None else {"on_slow": on_slow}
    tees = [{"tee": {"to": taker.sink, **policy}} for taker in takers[:-1]]
    return {"source": giver.source, "stages": tees, "sink": takers[-1].sink, "method": METHOD, **more}


def check_delivery(giver: Giver, takers: list[Taker], pieces: list[bytes], **more: Any) -> SessionRecord:
    """What is given arrives at every taker, unchanged and ended; the record says so."""
    data = b"".join(pieces)
    if giver.whole:
        giver.prepare(data)
    with Relay(route_of(giver, takers, **more)) as relay:
        for taker in takers:
            taker.start(relay)
            taker.take()
        giver.start(relay)
        if not giver.whole:
            for piece in pieces:
                giver.give(piece)
        giver.end()
        record = relay.wait()
        assert record is not None
        assert record.result == "delivered", record
        assert record.bytes == len(data)
        assert record.ended_by == "source"
        for taker, sink in zip(takers, record.sinks, strict=True):
            assert_same(taker.taken(), data)
            if "listen" not in taker.sink:
                assert sink.bytes == len(data)
                assert sink.result == "delivered"
    return record


def check_clogged(giver: Giver, clogged: Taker, sibling: Taker, size: int) -> SinkRecord:
    """A sink that reads nothing holds the source under policy block, and loses nothing once it reads again."""
    data = payload(11, size)
    writer = threading.Thread(target=lambda: (giver.give(data), giver.end()), name="giver", daemon=True)
    with Relay(route_of(giver, [clogged, sibling])) as relay:
        clogged.start(relay)
        sibling.start(relay)
        sibling.take()
        giver.start(relay)
        writer.start()
        # what the sibling gets is what fits into the pipes and buffers of the clogged one; then all is still
        quiet = -1
        while quiet != len(sibling.got) or not sibling.got:
            quiet = len(sibling.got)
            writer.join(0.15)
        assert len(sibling.got) < size, "the source was not held"
        clogged.take()
        record = relay.wait()
        writer.join(PATIENCE)
        assert record is not None
        assert record.result == "delivered", record
        assert_same(clogged.taken(), data)
        assert_same(sibling.taken(), data)
        return record.sinks[0]
