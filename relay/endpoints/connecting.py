"""A connect under way: the places that a name stands for, one after another.

Facts (man 2 connect, 7 tcp; RFC 9293, 3.5, figure 8; RFC 6724):
- A nonblocking connect is over when the socket is writable; SO_ERROR says how.
- A host that is not there says nothing: the kernel alone would wait for two minutes.
- A socket that connects to a port of this machine on which nobody listens may be given that very port as its own:
  both ends open at once and it is connected to itself. Whoever tries again for long enough comes to that.
- connect() on a nonblocking unix socket says EAGAIN when the listener's backlog is full, and tells nothing later.

What this means here: the time there is for all places is shared among those left, so that one which is silent
does not use up what the next one needs. A socket that is connected to itself has met nobody: ECONNREFUSED.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

from relay.endpoints.awaited import Awaited
from relay.endpoints.pacing import unpace
from relay.engine import Engine
from relay.errors import KernelError

CONNECT_TIMEOUT = 10.0  # seconds for all places together

Place = tuple[int, Any]  # an address family and what connect() takes there


class Connecting:
    """A connect under way, trying each place in turn; owns its socket until `done` gets it.

    `done(socket, 0)` on success, `done(None, errno)` when no place answered. `cancel` ends it silently.
    """

    def __init__(
        self,
        engine: Engine,
        places: Sequence[Place],
        done: Callable[[socket.socket | None, int], None],
        *,
        timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        self._engine = engine
        self._places = list(places)
        self._done = done
        self._awaited = Awaited()
        self._last = errno.EADDRNOTAVAIL
        self._until = engine.now + timeout
        self._try_next()

    def cancel(self) -> None:
        """Gives up without calling `done`."""
        self._places.clear()
        self._awaited.close()

    def _try_next(self) -> None:
        while self._places:
            family, place = self._places[0]
            left = self._until - self._engine.now
            try:
                sock = self._awaited.sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                if family != socket.AF_UNIX:
                    unpace(sock, place[0])
                sock.connect(place)
            except BlockingIOError as error:
                if error.errno == errno.EINPROGRESS:
                    if self._wait_for(sock):
                        self._awaited.timer = self._engine.later(
                            max(0.0, left) / len(self._places), self._timed_out
                        )
                        return
                elif left > 0:  # the backlog of a unix listener is full
                    self._awaited.close()
                    self._awaited.timer = self._engine.later(0.02, self._try_next)
                    return
                else:
                    self._last = errno.ETIMEDOUT
                self._awaited.close()
            except OSError as error:
                self._last = error.errno or errno.EIO
                self._awaited.close()
            else:
                self._succeed()
                return
            self._places.pop(0)
        self._done(None, self._last)

    def _wait_for(self, sock: socket.socket) -> bool:
        """Whether the loop will tell when the connect is over."""
        try:
            self._awaited.watch = self._engine.watch(sock.fileno(), select.EPOLLOUT, self._settled)
        except KernelError as error:
            self._last = error.errno or errno.EIO
            return False
        return True

    def _settled(self, _mask: int) -> None:
        sock = self._awaited.sock
        assert sock is not None
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code and connected_to_itself(sock):
            code = errno.ECONNREFUSED
        if code:
            self._failed(code)
        else:
            self._succeed()

    def _failed(self, code: int) -> None:
        self._last = code
        self._awaited.close()
        self._places.pop(0)
        self._try_next()

    def _succeed(self) -> None:
        self._done(self._awaited.let_go(), 0)

    def _timed_out(self) -> None:
        self._failed(errno.ETIMEDOUT)


def connected_to_itself(sock: socket.socket) -> bool:
    """Whether both ends of the connection are this socket."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # reset meanwhile: whoever reads it will hear
        return False
