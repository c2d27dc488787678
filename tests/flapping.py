"""A receiver that comes and goes at one address, and what may be said of the bytes it got."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios
from pathlib import Path

from peers import accept, receive_all, receive_exactly

MATCH = 24  # bytes that stand at one place of a random payload only


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
