"""A receiver that comes and goes at one address, and what may be said of the bytes it got."""

from __future__ import annotations

import array
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Collection
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from peers import accept, assert_same, receive_all, receive_exactly

MATCH = 24  # bytes that stand at one place of a random payload only
BUFFER = 64 << 10  # asked for by every side's receiver; its kernel may hold four times that
SEND_QUEUE = 8 << 20  # bytes that may come twice


class Receiver:
    """Listens at one tcp or unix address whenever it is `up`; owns its sockets. `buffer`: of its connections."""

    def __init__(self, unix: Path | None = None, buffer: int = 0) -> None:
        self._unix = unix
        self._holder = socket.socket()  # bound and not listening: the port stays its own, and refuses
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind(("127.0.0.1", 0))
        self._place = self._holder.getsockname()
        self.address = f"unix://{unix}" if unix else f"tcp://127.0.0.1:{self._place[1]}"
        self._buffer = buffer
        self._listener: socket.socket | None = None
        self.connection: socket.socket | None = None

    def up(self) -> None:
        """Listens."""
        self._listener = socket.socket(socket.AF_UNIX if self._unix else socket.AF_INET)
        if self._buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        if self._unix:
            self._unix.unlink(missing_ok=True)
            self._listener.bind(str(self._unix))
        else:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._listener.bind(self._place)
        self._listener.listen(8)

    @property
    def listens(self) -> bool:
        """Whether it is up."""
        return self._listener is not None

    def accept(self) -> socket.socket:
        """Takes relay's connection."""
        assert self._listener is not None
        self.connection = accept(self._listener)
        return self.connection

    def read(self, count: int) -> bytes:
        """So many bytes, from a new connection if there is none."""
        return receive_exactly(self.connection or self.accept(), count)

    def rest(self) -> bytes:
        """All that still comes, to the end of the stream; then it closes as a good receiver does."""
        connection = self.connection or self.accept()
        got = receive_all(connection)
        connection.close()
        self.connection = None
        return got

    def waiting(self) -> int:
        """Bytes that its kernel has acknowledged and it has not read."""
        assert self.connection is not None
        found = array.array("i", [0])
        fcntl.ioctl(self.connection.fileno(), termios.FIONREAD, found)
        return found[0]

    def reset(self) -> None:
        """Its connection goes without a word of farewell."""
        if self.connection is not None and self.connection.fileno() >= 0:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        self.connection = None

    def down(self) -> None:
        """Nobody listens any more, and its connection is reset."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.reset()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_error: object) -> None:
        self.down()
        self._holder.close()
        if self._unix:
            self._unix.unlink(missing_ok=True)


class Side:
    """One receiver, and what it got: a piece for each connection."""

    def __init__(self, buffer: int = BUFFER) -> None:
        self.receiver = Receiver(buffer=buffer)
        self.pieces: list[bytearray] = []
        self.unread: list[int] = []  # bytes that each connection had when it was reset
        self.ended = False
        self.receiver.up()
        self.listens = True

    def here(self) -> bool:
        """Whether it has a connection, taking one that waits."""
        receiver = self.receiver
        waits = receiver.connection is None and self.listens
        if waits and select.select([receiver._listener], [], [], 0)[0]:
            receiver.accept().setblocking(False)
            self.pieces.append(bytearray())
        return receiver.connection is not None

    def read(self, most: int) -> int:
        """What is there, up to `most` bytes."""
        if not self.here():
            return 0
        connection = self.receiver.connection
        assert connection is not None
        try:
            got = connection.recv(most)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            got = b""
        if not got:
            self.ended = True
            connection.close()
            self.receiver.connection = None
        elif self.pieces:
            self.pieces[-1] += got
        return len(got)

    def reset(self) -> None:
        """Its connection goes, with whatever it had not read."""
        if self.receiver.connection is not None:
            self.unread.append(len(self.pieces[-1]) + self.receiver.waiting())
            self.receiver.reset()

    def go(self) -> None:
        """Its connection is reset, and new ones are refused."""
        self.reset()
        self.receiver.down()
        self.listens = False

    def come(self) -> None:
        """It is back, if it was away."""
        if not self.listens:
            self.receiver.up()
            self.listens = True

    def take(self, size: int) -> None:
        """Reads what is there, up to so many bytes."""
        while size > 0 and (count := self.read(size)):
            size -= count


def give(source: socket.socket, data: bytes, sent: int, end: int, piece: int) -> int:
    """Sends what relay takes of `data` from `sent` to `end`, so many bytes a call; returns how many are sent now."""
    end = min(end, len(data))
    while sent < end:
        try:
            sent += source.send(memoryview(data)[sent : min(end, sent + piece)])
        except BlockingIOError:
            if not select.select([], [source], [], 0.01)[1]:
                break
    return sent


def all_ended(sides: Collection[Side]) -> bool:
    """Reads what is there for each; whether all have come to the end of their streams."""
    for side in sides:
        while not side.ended and side.read(1 << 20):
            pass
    return all(side.ended for side in sides)


def schedules(count: int) -> settings:
    """How hypothesis runs so many: the same ones each time."""
    return settings(
        max_examples=count,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # a schedule takes seconds: a failure is told as it is
        suppress_health_check=list(HealthCheck),
    )


def common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def gaps(got: bytes, data: bytes) -> list[tuple[int, int]]:
    """Where `got` leaves out parts of `data`, as positions from and to; fails if it is not what is left then."""
    found, at, position = [], 0, 0
    view_got, view = memoryview(got), memoryview(data)
    while True:
        same = 0
        while (
            same < len(got) - at
            and view_got[at + same : at + same + 65536] == view[position + same :][:65536]
        ):
            same += min(65536, len(got) - at - same)
        same = min(same, len(got) - at)
        same += common(got[at + same : at + same + 65536], data[position + same : position + same + 65536])
        at, position = at + same, position + same
        if at == len(got):
            if position < len(data):
                found.append((position, len(data)))
            return found
        following = data.find(got[at : at + MATCH], position)
        assert following > position, f"byte {at} of what came is nowhere behind {position}"
        found.append((position, following))
        position = following


def assert_counted_gaps(got: bytes, stream: bytes, dropped: int, align: int) -> None:
    """What is left out of `stream` are whole pieces, and all of it was counted."""
    left_out = gaps(got, stream)
    assert all(a % align == 0 and (b % align == 0 or b == len(stream)) for a, b in left_out)
    assert sum(b - a for a, b in left_out) == dropped


def assert_resumed(side: Side, stream: bytes) -> None:
    """Each connection goes on where its predecessor's kernel had everything, at most one send queue before."""
    reached, allowed = 0, 0  # what came, and what may have come to a kernel whose receiver went
    for number, piece in enumerate(side.pieces):
        if number == len(side.pieces) - 1 and len(piece) < MATCH:
            begun = len(stream) - len(piece)
        elif len(piece) < MATCH:  # it could stand anywhere
            allowed = max(allowed, reached) + 4 * BUFFER
            continue
        else:
            begun = stream.find(bytes(piece[:MATCH]), max(0, reached - SEND_QUEUE))
        assert 0 <= begun <= max(allowed, reached), f"connection {number} began at {begun}, not {reached}"
        assert_same(bytes(piece), stream[begun : begun + len(piece)])
        reached = begun + len(piece)
        allowed = reached + 4 * BUFFER
    assert reached == len(stream)
