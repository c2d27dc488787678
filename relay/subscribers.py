"""The subscribers of a broadcast: nodes that join and leave the chain in front of its last one.

Each has two nodes: one that tees onwards, where its policy stands, and one whose pipe is its backlog. A newcomer
is inserted between sweeps and sees what is teed from then on. One that leaves is cut off first, then taken out
by the pump when its pipe is empty.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

from relay.endpoints.broadcast import Broadcast, Subscriber
from relay.endpoints.socket import peer_name
from relay.engine import Engine
from relay.errors import KernelError
from relay.kernel import core
from relay.node import Node, guard, start_gap
from relay.outlet import Outlet
from relay.units import show_size

if TYPE_CHECKING:
    from relay.pipeline import Pipeline

log = logging.getLogger("relay.pipeline")

MOST = 1900  # subscribers of one pipeline: two nodes each must fit the engine's room for events


class Member:
    """One subscriber and its two nodes."""

    def __init__(self, sink: Subscriber, gate: Node, leaf: Node) -> None:
        self.sink = sink
        self.gate = gate
        self.leaf = leaf


class Subscribers:
    """All subscribers of one broadcast of one pipeline; owns their sinks and nodes."""

    def __init__(self, engine: Engine, pipeline: Pipeline, broadcast: Broadcast, outlet: Outlet) -> None:
        self._engine = engine
        self._pipeline = pipeline
        self._broadcast = broadcast
        self._outlet = outlet
        self.members: dict[int, Member] = {}
        self._leaving: dict[int, Member] = {}
        broadcast.accept(lambda sock, peer: engine.post(lambda: self.join(sock, peer)))

    def join(self, sock: socket.socket, peer: str) -> None:
        """A newcomer; without descriptors or room for it it is refused and told so by a reset."""
        settings = self._outlet.settings
        assert settings is not None
        if len(self.members) >= MOST or self._pipeline.closed:
            log.warning("%s: subscriber %s refused: %d are there", self._pipeline.route, peer, MOST)
            sock.close()
            return
        gate = None
        try:
            gate = self._pipeline.chain.new_node()
            leaf = self._pipeline.chain.new_node()
        except KernelError as error:
            if gate is not None:
                gate.close()
            sock.close()
            log.warning("%s: subscriber %s refused: %s", self._pipeline.route, peer, error)
            return
        sink = Subscriber(
            self._engine,
            sock,
            peer or peer_name(sock, ""),
            unix=sock.family == socket.AF_UNIX,
            close_with_peer=settings.peer_eof == "close",
            dead_after=settings.dead_after,
        )
        member = Member(sink, gate, leaf)
        key = id(member)
        self.members[key] = member
        sink.c.token = self._engine.register(lambda what, error, _mask: self._heard(member, what, error))
        gate.hear(lambda what, error: self._gate_heard(member, what, error))
        leaf.hear(lambda what, error: self._copy(leaf, what, error))
        sink.wire(self._pipeline.c)
        sink.on_open = lambda _sink: self._engine.ready(self._pipeline.c)
        sink.on_finish = sink.on_fail = lambda _sink: self._left(member)
        leaf.c.sink = sink.c
        guard(gate, self._outlet.slow)
        ways = self._pipeline.ways
        if ways.tee().method == "copy":
            gate.c.tee_copies = 1
            gate.copies(ways.tee().reason)
            leaf.copies(ways.tee().reason)
        core.lib.relay_insert(self._pipeline.c, self._outlet.node.c, gate.c, leaf.c)
        log.info("%s: subscriber %s joined %s", self._pipeline.route, peer, self._outlet.name)
        sink.open()

    def _copy(self, node: Node, what: int, error: int) -> None:
        if what == core.WANTS_COPY:
            node.copies(f"errno {error}")
            self._engine.ready(self._pipeline.c)
        elif what == core.BROKEN:
            self._pipeline.abort(f"moving bytes between pipes: errno {error}")

    def _gate_heard(self, member: Member, what: int, error: int) -> None:
        if what == core.REMOVED:
            self._leaving.pop(id(member), None)
            member.gate.close()
            member.leaf.close()
            self._pipeline.look_whether_over()
        elif what == core.SLOW:
            self._judge(member)
        elif what == core.CAUGHT_UP:
            log.info("%s: subscriber %s has caught up", self._pipeline.route, member.sink.address)
        else:
            self._copy(member.gate, what, error)

    def _judge(self, member: Member) -> None:
        slow = self._outlet.slow
        policy = slow.then if slow.policy == "spill" else slow.policy
        route, peer = self._pipeline.route, member.sink.address
        if policy == "drop":
            start_gap(member.gate.c)
            member.gate.c.dropping = 1
            log.warning("%s: subscriber %s is slow: dropping for it alone", route, peer)
            self._engine.ready(self._pipeline.c)
        elif policy == "disconnect":
            backlog = show_size(member.leaf.pipe.capacity)
            member.sink.abort(f"backlog of {backlog} full for {slow.after or 0.0:.1f} s")
        else:
            log.warning("%s: subscriber %s is slow: it holds the source", route, peer)

    def _heard(self, member: Member, what: int, error: int) -> None:
        if what == core.SINK_DRAINED:
            member.sink.finish()
        elif what == core.SINK_FAILED:
            member.sink.broke(error)
        elif what == core.PEER_ENDED:
            member.sink.peer_ended()
        elif what == core.SINK_BUSY:
            member.sink.busy()

    def _left(self, member: Member) -> None:
        """It finished, failed or was cut off: its nodes run dry, then the pump takes them out."""
        sink = member.sink
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
                "dropped": int(member.gate.c.dropped),
                "reason": sink.reason,
            },
        )
        self._engine.forget_token(sink.c.token)
        sink.unwire()
        member.leaf.c.sink = core.ffi.NULL
        member.gate.c.dropping = 0
        member.gate.c.after_ns = 0
        member.gate.c.leaving = 1
        self.members.pop(id(member), None)
        self._leaving[id(member)] = member
        if not self._pipeline.closed:
            self._engine.ready(self._pipeline.c)
        self._pipeline.look_whether_over()

    def finish(self) -> None:
        """Ends every subscriber's stream cleanly once it has all."""
        for member in list(self.members.values()):
            member.sink.finish()

    def hurry(self) -> None:
        """relay is ending and nothing is under way: nobody is waited for once the last byte is acknowledged."""
        for member in self.members.values():
            member.sink.grace = 0.0

    def abort(self, reason: str) -> None:
        """Cuts every subscriber off."""
        for member in list(self.members.values()):
            member.sink.abort(reason)

    def close(self) -> None:
        """The chain is gone: closes every node and sink left."""
        for member in [*self.members.values(), *self._leaving.values()]:
            self._engine.forget_token(member.sink.c.token)
            member.sink.close()
            member.gate.close()
            member.leaf.close()
        self.members.clear()
        self._leaving.clear()
