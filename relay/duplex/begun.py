"""Connects that a route's home engine begins, one after another as its clients came.

Facts (man 2 connect, 2 accept): a client may make several connections and tell them apart by the order in which the
other end accepts them, as `iperf3 --bidir` does. A connect has its place in that order when the call returns, long
before it is connected; which epoll set the socket goes into later does not matter.

What this means here: an engine takes what is posted when it comes to it, so connects of sessions that are spread over
several engines would overtake one another if each engine made its own. So they are made where clients are accepted,
in that order, and the engine that a session is for gets both its sockets. The session costs the same system calls, no
engine waits for another one, and a crowd from one address, which may be a proxy's, is spread like any other. (To keep
a client with one engine until its connects have begun would give all of such a crowd to one engine; a queue for each
client would cost messages between engines.) Order is kept for the first connect of each: another try, after one that
failed or for which no descriptor was left, is the session's own.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from relay.duplex.upstream import Attempt
from relay.duplex.upstreams import Upstreams
from relay.endpoints.dial import sockaddr_from
from relay.endpoints.settings import SinkSettings
from relay.kernel import core

SHORT = (-errno.EMFILE, -errno.ENFILE, -errno.ENOBUFS, -errno.ENOMEM)

lib = core.lib


class Begun(NamedTuple):
    """A connect that was begun at `at` for a client that `came` then, both monotonic seconds. `fd` is the socket, the
    session's to close, or the negative errno of a connect that failed at once."""

    attempt: Attempt
    fd: int
    came: float
    at: float


class Beginnings:
    """Begins the connects of a route to `sink`, on its home engine."""

    def __init__(self, upstreams: Upstreams, sink: SinkSettings) -> None:
        self._upstreams = upstreams
        self._transparent = sink.transparent

    def begin(self, peer: str, came: float, now: float) -> Begun | None:
        """The connect for a client; None where its session has to see to it: there is no upstream, or no descriptor
        was left."""
        attempt = self._upstreams.pick(peer)
        if attempt is None:
            return None
        origin = sockaddr_from(peer) if self._transparent else b""
        fd = lib.relay_dial(attempt.upstream.dial, origin, len(origin))
        if fd in SHORT:
            self._upstreams.refused(attempt, -fd)
            return None
        return Begun(attempt, fd, came, now)
