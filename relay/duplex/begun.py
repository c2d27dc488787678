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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from relay.duplex.upstream import Attempt
from relay.duplex.upstreams import Upstreams
from relay.endpoints.dial import sockaddr_from
from relay.endpoints.settings import SinkSettings
from relay.kernel import core

AT_ONCE = 64  # connects in one call: as many as are accepted at once
SHORT = (-errno.EMFILE, -errno.ENFILE, -errno.ENOBUFS, -errno.ENOMEM)

# an accepted connection, nonblocking: its descriptor, its peer, where that had connected to if it was not here, and the
# proxy that it came through; the last two may be empty
Client = tuple[int, str, str, str]

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
        self._room = core.ffi.new("struct relay_dialing[]", AT_ONCE)

    def begin(self, peers: Sequence[str], came: float, now: float) -> list[Begun | None]:
        """The connects for clients that came at once, in their order. None where the session has to see to it: there is
        no upstream, or no descriptor was left."""
        begun: list[Begun | None] = []
        for at in range(0, len(peers), AT_ONCE):
            begun += self._begin(peers[at : at + AT_ONCE], came, now)
        return begun

    def _begin(self, peers: Sequence[str], came: float, now: float) -> Iterator[Begun | None]:
        """All in one call, so that threads of other engines have Python meanwhile, and it changes hands but once."""
        room, attempts = self._room, []
        for dialing, peer in zip(room, peers, strict=False):
            attempt = self._upstreams.pick(peer)
            if attempt is None:
                break
            attempts.append(attempt)
            dialing.dial = attempt.upstream.dial
            if self._transparent:
                origin = sockaddr_from(peer)
                core.ffi.memmove(dialing.origin, origin, len(origin))
                dialing.origin_size = len(origin)
        lib.relay_dial(room, len(attempts))
        for attempt, dialing in zip(attempts, room, strict=False):
            if dialing.fd in SHORT:
                self._upstreams.refused(attempt, -dialing.fd)
                yield None
            else:
                yield Begun(attempt, dialing.fd, came, now)
        yield from [None] * (len(peers) - len(attempts))
