"""Listening sockets: bound once, accepting for one route after another.

Facts (man 2 listen, 2 accept, 2 epoll_ctl; net/ipv4/inet_connection_sock.c):
- A connection is made by the kernel and waits in the listener's backlog until somebody accepts it; its peer may be
  sending already. Closing the listener resets all that wait there.
- A listening socket is in no way tied to an epoll set: it may leave one and go into another, and nobody notices.

What this means here: the socket (`Bound`) and who accepts on it (`Listener`) are two things. A reload hands the
socket over; a listener that closes for good first accepts what waits.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relay.endpoints.base import hint
from relay.endpoints.socket import close_with_reset
from relay.endpoints.turnstile import Turnstile
from relay.engine import WATCH_HINTS, Engine, Watch
from relay.errors import KernelError
from relay.journal.seldom import Seldom
from relay.kernel import core

log = logging.getLogger("relay.endpoints")

BACKLOG = 4096
AGAIN = 0.2  # seconds between two attempts to accept when no descriptor is left
COMPLAIN = 10.0  # seconds between two log lines about that
AT_ONCE = 64  # connections accepted before others have their turn

Key = tuple[Any, ...]  # where a socket listens: equal keys mean that one can take the other's place
Accepted = Callable[[socket.socket, str], None]
Crowd = Callable[[list[tuple[int, str]]], None]


class Bound:
    """A listening socket, and the file of a unix one; owns both. `address` is what it is bound to, for people.

    `path` is the file, "" if there is none; it is removed at the end if it is still this socket's. `passed`: it is
    somebody else's, too (endpoints/passed.py), who has it and its backlog after relay.
    """

    def __init__(
        self, sock: socket.socket, address: str, key: Key, path: str = "", *, passed: bool = False
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.passed = passed
        self.address = address
        self.key = key
        self._path = path
        self._made = _identity(path)

    @property
    def reachable(self) -> bool:
        """Whether somebody who connects comes here: nobody removed or replaced a unix socket's file."""
        return not self._path or (self._made is not None and _identity(self._path) == self._made)

    def close(self) -> None:
        """Closes the socket and removes its file. Safe to call again."""
        if self._path and self.reachable:
            try:
                Path(self._path).unlink(missing_ok=True)
            except (
                OSError
            ) as error:  # relay may have become somebody else since; whoever binds next replaces it
                log.warning("%s: its file is left behind: %s", self.address, error.strerror)
        self._path = ""
        self.sock.close()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino)


class Listener:
    """Accepts on a listening socket; owns it until `release`. `accepted(socket, peer)` owns each connection.

    It begins paused: `resume` it. Who comes faster than a `turnstile` lets him in waits in the backlog. When no
    descriptor is left it stops accepting for a moment, says so, and goes on: what runs is not touched.
    """

    def __init__(
        self, engine: Engine, bound: Bound, accepted: Accepted, turnstile: Turnstile | None = None
    ) -> None:
        self.bound: Bound | None = bound
        self._turnstile = turnstile
        self._held_up = Seldom(COMPLAIN)
        self.address = bound.address
        self._engine = engine
        self._accepted = accepted
        self._crowd: Crowd | None = None
        self._room: Any = None
        self._short_of = ""
        self._complained = Seldom(COMPLAIN)
        self._watch: Watch | None = None

    def by_the_crowd(self, accepted: Crowd) -> None:
        """From now on connections come as lists of (descriptor, peer), each the receiver's to close, nonblocking.

        They have the options of the listening socket.
        """
        self._crowd = accepted
        self._room = core.ffi.new("struct relay_accepted[]", AT_ONCE)

    def _accept_many(self, listening: socket.socket, accepted: Crowd, most: int) -> bool:
        count = core.lib.relay_accept(listening.fileno(), self._room, most)
        if count < 0:
            self.cannot_accept(-count)
        elif count:
            self._can_accept(int(count))
            name = core.ffi.string
            accepted([(got.fd, name(got.peer).decode()) for got in self._room[0:count]])
        return bool(count > 0)

    def _readable(self, _mask: int) -> None:
        room = AT_ONCE if self._turnstile is None else min(AT_ONCE, self._let_through(self._turnstile))
        for _ in range(min(room, 1 if self._crowd is not None else AT_ONCE)):
            if self.bound is None or not self._accept(self.bound.sock, room):
                return

    def _let_through(self, turnstile: Turnstile) -> int:
        """How many may come in now; with none the backlog is left alone for a moment."""
        room = turnstile.room(self._engine.now)
        if room < 1:
            if count := self._held_up():
                log.info(
                    "accepting on %s: more than %g a second come (limits.rate); they wait",
                    self.address,
                    turnstile.rate,
                    extra={"event": "held_up", "address": self.address, "count": count},
                )
            self.pause()
            self._engine.later(turnstile.wait(), self.resume)
        return room

    def _can_accept(self, count: int = 1) -> None:
        if self._turnstile is not None:
            self._turnstile.took(count)
        if self._short_of:
            log.info("accepting on %s again", self.address, extra={"event": "accepting"})
            self._short_of = ""

    def _accept(self, listening: socket.socket, most: int = AT_ONCE) -> bool:
        """One connection, or a crowd of `most`; False when none waits or none can be had."""
        if self._crowd is not None:
            return self._accept_many(listening, self._crowd, most)
        try:
            sock, peer = listening.accept()
        except ConnectionAbortedError:
            return True
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.cannot_accept(error.errno or 0)
            return False
        self._can_accept()
        self._accepted(sock, peer_name(sock, peer))
        return True

    def cannot_accept(self, code: int, advice: str = "") -> None:
        """No descriptor or no memory is left: newcomers wait in the kernel's backlog for a moment."""
        self._short_of = errno.errorcode.get(code, str(code))
        if count := self._complained():
            log.warning(
                "accepting on %s: %s (%s); newcomers wait, it tries again five times a second: %s",
                self.address,
                os.strerror(code),
                self._short_of,
                advice or hint(code) or "free some memory",
                extra={"event": "cannot_accept", "address": self.address, "count": count},
            )
        self.pause()
        self._engine.later(AGAIN, self.resume)

    def pause(self) -> None:
        """Leaves new connections in the kernel's backlog until `resume`."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def resume(self) -> None:
        """Accepts; again, if it was paused."""
        if self._watch is not None or self.bound is None:
            return
        try:
            self._watch = self._engine.watch(self.bound.sock.fileno(), select.EPOLLIN, self._readable)
        except KernelError as error:
            self.cannot_accept(error.errno, WATCH_HINTS.get(error.errno, ""))

    def release(self) -> Bound | None:
        """Gives the socket away with all that waits in its backlog; None when it was closed."""
        self.pause()
        bound, self.bound = self.bound, None
        return bound

    def restore(self, bound: Bound) -> None:
        """Takes back what was released, and accepts."""
        self.bound = bound
        self.resume()

    def finish(self) -> None:
        """Accepts whoever waits, then closes: who had connected before is served."""
        bound = self.bound
        if bound is not None:
            self.pause()
            for _ in range(BACKLOG):
                if self.bound is None or not self._accept(bound.sock):
                    break
        self.close()

    def refuse(self) -> int:
        """Resets whoever waits, and closes; how many these were. At a socket that was passed they wait for the next."""
        count, bound = 0, self.release()
        if bound is None:
            return 0
        try:
            while count < BACKLOG and not bound.passed:
                close_with_reset(bound.sock.accept()[0].detach())
                count += 1
        except OSError:  # none waits, or no descriptor is left: the kernel resets the rest
            pass
        bound.close()
        return count

    def close(self) -> None:
        """Stops listening. Safe to call again."""
        bound = self.release()
        if bound is not None:
            bound.close()


def peer_name(sock: socket.socket, peer: Any) -> str:
    """How a peer is named in records: host:port, [v6]:port, or pid:N for a unix peer."""
    if sock.family == socket.AF_INET6:
        host = str(peer[0])
        if host.startswith("::ffff:") and "." in host:
            return f"{host[7:]}:{peer[1]}"
        return f"[{host}]:{peer[1]}"
    if sock.family == socket.AF_INET:
        return f"{peer[0]}:{peer[1]}"
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return f"pid:{struct.unpack('3i', credentials)[0]}"
