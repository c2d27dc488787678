"""The subscribers of a broadcast: readers of the ring at the end of its chain.

The chain's last node moves the stream into a ring of memory (kernel/ring.c), and each subscriber is sent its bytes
out of it, at its own position. So the ring is the backlog of all. A subscriber that is a backlog (needs.py) behind
is full, and slow if it has not caught up in time; meanwhile the stream goes on into RESERVE, and only when that is
full, too, is the source held. One that joins begins a `burst` back; one that leaves is taken off between sweeps.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

from relay.endpoints.broadcast import Broadcast, Subscriber
from relay.endpoints.listening import peer_name
from relay.endpoints.socket import close_with_reset, unacknowledged
from relay.engine import Engine, Timer
from relay.errors import KernelError
from relay.kernel import core
from relay.kernel.ring import Reader, Ring
from relay.needs import RESERVE, backlog
from relay.pipeline.outlet import Outlet
from relay.units import show_size

if TYPE_CHECKING:
    from relay.pipeline.pipeline import Pipeline

log = logging.getLogger("relay.pipeline")


class Member:
    """One subscriber: its socket and its place in the ring."""

    def __init__(self, sink: Subscriber, reader: Reader) -> None:
        self.sink = sink
        self.reader = reader
        self.seen: tuple[int, int, int] = (
            -1,
            -1,
            -1,
        )  # how far it was at its last progress after the stream's end
        self.seen_at = 0.0
        self.told = False

    def left(self) -> int:
        """Bytes that its peer has not acknowledged (or, on a unix socket, not read) or that it was not sent yet."""
        return unacknowledged(self.sink.c.fd) if self.sink.c.fd >= 0 else 0

    @property
    def dropped(self) -> int:
        """Bytes it was not given by policy."""
        return int(self.reader.c.dropped)


class Subscribers:
    """All subscribers of one broadcast of one pipeline; owns the ring and their sinks."""

    def __init__(self, engine: Engine, pipeline: Pipeline, broadcast: Broadcast, outlet: Outlet) -> None:
        assert outlet.settings is not None
        self._engine = engine
        self._pipeline = pipeline
        self._settings = outlet.settings
        self._slow = outlet.slow
        self._name = outlet.name
        self.outlet = outlet
        self._node = outlet.node.c
        self.members: dict[int, Member] = {}
        self._given = 0  # bytes that those got who have left
        self._looker: Timer | None = None
        burst = self._settings.burst
        self.ring = Ring(backlog(outlet.slow, burst), burst, outlet.slow.align, RESERVE)
        if burst:
            self.ring.open()
        self._node.ring = self.ring.c
        broadcast.accept(engine, self.join)

    @property
    def policy(self) -> str:
        """What happens to a slow one; a spill is slow when its log, which is the ring, is full."""
        return str(self._slow.then if self._slow.policy == "spill" else self._slow.policy)

    def begin_turn(self) -> None:
        """What comes next is another stream."""
        self.ring.new_stream()

    def join(self, sock: socket.socket, peer: str) -> None:
        """A newcomer; where there is no place for it, it is told so by a reset."""
        route = self._pipeline.route
        if self._pipeline.closed:
            log.info("%s: subscriber %s refused: the stream is over", route, peer)
            close_with_reset(sock.detach())
            return
        sink = Subscriber(
            self._engine,
            sock,
            peer or peer_name(sock, ""),
            unix=sock.family == socket.AF_UNIX,
            close_with_peer=self._settings.peer_eof == "close",
            dead_after=self._settings.dead_after,
        )
        reader = Reader(sink.c, self._slow.after or 0.0, self._slow.align)
        try:
            self.ring.join(reader)
        except KernelError as error:
            log.warning("%s: subscriber %s refused: %s", route, peer, error)
            close_with_reset(sock.detach())
            return
        member = Member(sink, reader)
        self.members[id(member)] = member
        token = self._engine.register(lambda what, error, _mask: self._heard(member, what, error))
        sink.c.token = reader.c.token = token
        sink.wire(self._pipeline.c)
        sink.on_open = lambda _sink: self._engine.ready(self._pipeline.c)
        sink.on_finish = sink.on_fail = lambda _sink: self._left(member)
        log.info("%s: subscriber %s joined %s", route, peer, self._name)
        sink.open()

    def _heard(self, member: Member, what: int, error: int) -> None:
        sink = member.sink
        if what == core.SINK_DRAINED:
            sink.finish()
        elif what == core.SLOW:
            self._judge(member)
        elif what == core.CAUGHT_UP:
            log.info(
                "%s: subscriber %s has caught up; %s dropped so far",
                self._pipeline.route,
                sink.address,
                show_size(member.dropped),
            )
        else:
            sink.hear(what, error)

    def _judge(self, member: Member) -> None:
        route, peer = self._pipeline.route, member.sink.address
        if self.policy == "drop":
            self.ring.drop(member.reader)
            log.warning("%s: subscriber %s is slow: dropping for it alone", route, peer)
        elif self.policy == "disconnect":
            size = show_size(self.ring.full)
            member.sink.abort(f"backlog of {size} full for {self._slow.after or 0.0:.1f} s")
        else:
            log.warning("%s: subscriber %s is slow: it holds the source", route, peer)
        self._engine.ready(self._pipeline.c)

    @property
    def given(self) -> int:
        """Bytes that all got together, those who have left too."""
        return self._given + sum(member.sink.moved for member in self.members.values())

    def behind(self, member: Member) -> int:
        """Bytes of the ring that it has not been sent; none while it is in a gap."""
        return 0 if member.reader.c.dropping else int(self.ring.c.position) - int(member.reader.c.at)

    def ended(self) -> None:
        """The stream is over: whoever still has something coming takes it, or falls under the policy.

        A subscriber is rarely full by then, so what counts is that it took nothing for `after`.
        """
        self._looker = None
        now, after = self._engine.now, self._slow.after or 0.0
        position = int(self.ring.c.position)
        for member in list(self.members.values()):
            behind, waiting = position - int(member.reader.c.at), member.left()
            seen = (behind, waiting, int(member.sink.moved))
            if seen != member.seen or not (behind or waiting):
                member.seen, member.seen_at = seen, now
            elif now - member.seen_at >= after:
                self._holds_the_end(member, behind, after)
        if self.members and not self._pipeline.closed:
            self._looker = self._engine.later(min(max(after / 4, 0.01), 1.0), self.ended)

    def _holds_the_end(self, member: Member, behind: int, after: float) -> None:
        route, peer = self._pipeline.route, member.sink.address
        if self.policy == "block":
            if not member.told:
                member.told = True
                log.warning("%s: subscriber %s is slow: it holds the end of the stream", route, peer)
            return
        if self.policy == "drop":
            member.reader.c.dropped += behind
        member.sink.abort(f"the stream has ended, and it took nothing for {after:.1f} s")

    def _left(self, member: Member) -> None:
        """It finished, failed or was cut off."""
        sink = member.sink
        self._engine.forget_token(sink.c.token)
        sink.unwire()
        self.ring.leave(member.reader)
        if self.members.pop(id(member), None) is not None:
            self._given += sink.moved
        log.info(
            "%s: subscriber %s left after %s%s",
            self._pipeline.route,
            sink.address,
            show_size(sink.moved),
            f": {sink.reason}" if sink.reason else "",
            extra={
                "route": self._pipeline.route,
                "peer": sink.address,
                "bytes": sink.moved,
                "dropped": member.dropped,
                "lost": sink.lost,
                "reason": sink.reason,
            },
        )
        if not self._pipeline.closed:
            self._engine.ready(self._pipeline.c)
        self._pipeline.look_whether_over()

    def hurry(self) -> None:
        """relay is ending and nothing is under way: nobody is waited for once the last byte is acknowledged."""
        for member in self.members.values():
            member.sink.grace = 0.0

    def abort(self, reason: str) -> None:
        """Cuts every subscriber off."""
        for member in list(self.members.values()):
            member.sink.abort(reason)

    def close(self) -> None:
        """The chain is gone: closes every sink left, and the ring. Safe to call again."""
        self._node.ring = core.ffi.NULL
        if self._looker is not None:
            self._looker.cancel()
        for member in self.members.values():
            self._engine.forget_token(member.sink.c.token)
            member.sink.close()
            member.sink.unwire()
        self.members.clear()
        self.ring.close()
