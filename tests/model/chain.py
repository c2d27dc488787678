"""The part of a sweep that moves bytes down a chain: into each node, by tee to the next, out to a sink or a ring."""

from __future__ import annotations

from mmap import PAGESIZE

from slots import Pipe

from model.ends import Sink, Source
from model.node import Node
from model.readers import Readers
from model.sweep import EPIPE, PIECE

STUCK = 20_000_000  # nanoseconds that what a sink refuses waits in front of its backlog


class Chain(Readers):
    """The nodes of a chain, in a sweep."""

    # -- into a node

    def _fill(self) -> bool:
        head, source = self.nodes[0], self.source
        if not self._source_gives():
            return False
        assert source
        if source.copies:
            return self._fill_by_hand(head, source)
        moved = source.pipe.splice_to(head.pipe, PIECE)
        self.calls += 1
        if not moved:
            if source.pipe.ended and not source.pipe.segments and not head.pipe.full:
                return self._over()
            if head.held:  # nothing there, or no room here? Asked again when it is drained.
                head.full = True
            else:
                source.readable = False
        self._read += moved
        self._source_took(source, moved)
        return bool(moved)

    def _fill_by_hand(self, head: Node, source: Source) -> bool:
        if head.held:
            return False
        direct = head.out_copies and not head.next
        size = head.stash_size if direct else min(self.scratch, head.pipe.slots * PAGESIZE)
        data = source.pipe.read(size)
        self.calls += 1
        if not data:
            return self._nothing_came(source)
        if direct:
            head.stash = data
        else:
            assert head.pipe.write(data) == len(data), "an empty pipe takes its capacity"
            self.calls += 1
        self._read += len(data)
        self._source_took(source, len(data))
        return True

    def _fill_prefix(self, node: Node) -> bool:
        moved = node.pipe.lend(node.prefix)
        self.calls += 1
        node.prefix = node.prefix[moved:]
        return bool(moved)

    # -- out of a node

    def _out(self, node: Node, size: int, became: str) -> None:
        """`size` bytes have left the node."""
        node.history.append((became, size))
        if node.next:
            node.owed -= size
        node.full = False
        if node.since and not node.into and not (node.owed if node.next else node.held):
            self._no_longer_blocked(node)

    def _no_longer_blocked(self, node: Node) -> None:
        if not node.since:
            return
        node.blocked += self.now - node.since
        node.since = 0
        if node.slow and not node.dropping:
            node.slow = False
            self._tell("CAUGHT_UP", node.name)

    def _blocked(self, node: Node) -> None:
        if not node.after:
            return
        node.since = node.since or self.now
        if node.slow:
            return
        if self.now - node.since >= node.after:
            node.slow = True
            self._tell("SLOW", node.name)
        else:
            self._wake_at(node.since + node.after)

    def _move(self, node: Node, to: Pipe, size: int) -> int:
        self.calls += 1
        if not node.stash:
            return node.pipe.splice_to(to, size)
        moved = to.write(node.stash[:size])
        node.stash = node.stash[moved:]
        return moved

    def _gate(self, node: Node, size: int) -> int:
        """How much may pass now: whole quanta of the rate, so that a slow rate is not a dribble."""
        if node.left >= 0:
            size = min(size, node.left)
        if not node.rate or not size:
            return size
        if not node.stamp:
            node.stamp, node.tokens = self.now, float(node.burst)
        node.tokens += (self.now - node.stamp) * float(node.rate) / 1e9
        node.tokens = min(node.tokens, float(node.burst))
        node.stamp = self.now
        quantum = max(1, min(node.rate // 100, node.burst, size))
        if node.tokens < quantum:
            self._wake_at(self.now + int((quantum - node.tokens) * 1e9 / node.rate) + 1)
            return 0
        return min(size, int(node.tokens))

    def _tee_by_hand(self, node: Node) -> bool:
        assert node.next
        if not node.untold or node.next.refuses:
            return False
        moved = node.next.pipe.write(node.untold)
        self.calls += 1
        node.next.full |= not moved
        node.untold = node.untold[moved:]
        return bool(moved)

    def _tee(self, node: Node) -> bool:
        assert node.next
        if node.tee_copies:
            if node.stash or node.untold:
                return False
            node.stash = node.untold = node.pipe.read(node.stash_size)
            self.calls += 1
            node.owed, node.full = len(node.stash), False
            return True
        if node.next.refuses:
            return False
        node.owed = node.pipe.tee_to(node.next.pipe, node.held)
        self.calls += 1
        node.next.full |= not node.owed
        return bool(node.owed)

    def _drop(self, node: Node, size: int) -> bool:
        """Gaps begin and end between pieces of `align` bytes; the one under way is finished first."""
        if len(node.rest) < node.rest_need:
            data = self._take(node, min(size, node.rest_need - len(node.rest)))
            node.rest += data
            node.passed += len(data)
            self._out(node, len(data), "passed")
            return True
        to = node.into
        if to and not to.held and not to.refuses:
            if node.rest:
                moved = to.pipe.write(node.rest)
                self.calls += 1
                node.rest = node.rest[moved:]
                node.rest_need = len(node.rest)
                return True
            node.rest_need = 0
            if not node.to_border:
                node.dropping = False
                self._no_longer_blocked(node)
                return True
            size = min(size, node.to_border)
        if not node.held:
            return False
        return self._discard(node, size, "dropped")

    def _discard(self, node: Node, size: int, became: str) -> bool:
        data = self._take(node, size)
        if became == "dropped":
            node.dropped += len(data)
        self._out(node, len(data), became)
        return bool(data)

    def _move_out(self, node: Node, size: int) -> bool:
        if node.skip:
            before = node.held
            self._discard(node, min(size, node.skip), "skipped")
            node.skip -= before - node.held
            return True
        if node.dropping:
            return self._drop(node, size)
        if not node.left or (not node.into and not node.sink):
            return self._discard(node, size, "dropped" if node.left else "beyond")
        size = self._gate(node, size)
        if not size:
            return False
        if node.ring:
            moved = self._give_to_ring(node, node.ring, size)
        elif node.past:
            moved = self._give_past(node, size)
        else:
            moved = (
                self._give_to_sink(node, node, node.sink, size)
                if node.sink
                else self._give_to_node(node, size)
            )
        if moved < 0:
            return True
        if not moved:
            if not node.past or (node.into and node.into.refuses):
                self._blocked(node)
            return False
        node.passed += moved
        if node.ring and node.sink:
            node.sink.moved += moved
            node.sink.last = self.now
        if node.rate:
            node.tokens -= moved
        if node.left > 0:
            node.left -= moved
        self._out(node, moved, "passed")
        if not node.left and node.into:
            node.into.ended = True
        return True

    def _give_to_node(self, node: Node, size: int) -> int:
        assert node.into
        if node.into.refuses:
            return 0
        moved = self._move(node, node.into.pipe, size)
        node.into.full |= not moved
        return moved

    def _give_past(self, node: Node, size: int) -> int:
        """Straight to the sink while its backlog is empty; else into that, if somebody behind has nothing left."""
        backlog, following = node.into, node.next
        assert backlog
        if not backlog.held and backlog.sink:
            moved = self._give_to_sink(node, backlog, backlog.sink, size)
            if moved > 0:
                backlog.passed += moved
                backlog.history.append(("passed", moved))
                node.stuck = 0
                return moved
        if backlog.sink and following and following.held:
            node.stuck = node.stuck or self.now
            if self.now - node.stuck < STUCK:
                self._wake_at(node.stuck + STUCK)
                return 0
        return self._give_to_node(node, size)

    def _give_to_sink(self, node: Node, outlet: Node, sink: Sink, size: int) -> int:
        """Bytes of `node` to the sink that stands at `outlet`."""
        if sink.failed or not sink.writable:
            return 0
        if not sink.pipe:
            moved = len(self._take(node, size)) if not node.stash else self._move(node, Pipe(1 << 20), size)
        elif sink.pipe.orphaned:
            self.calls += 1
            sink.failed = True
            if not outlet.hold:
                outlet.sink, outlet.since = None, 0
            self._tell("SINK_FAILED", sink.name, EPIPE)
            return -1
        else:
            moved = self._move(node, sink.pipe, size)
            sink.writable = bool(moved)
        self._sink_took(sink, moved)
        return moved

    # -- a turn

    def _turn(self, node: Node) -> bool:
        moved = False
        if node.since and node.into and not node.into.held and not node.dropping:
            self._no_longer_blocked(node)
        if node.rest and not node.dropping:  # the gap was called off: nobody wants its first piece
            node.passed, node.dropped = node.passed - len(node.rest), node.dropped + len(node.rest)
            node.rest, node.rest_need = b"", 0
        if node.prefix:
            moved |= self._fill_prefix(node)
        if not node.held:
            if node.next and node.untold:
                moved |= self._tee_by_hand(node)
            if node.ended:
                node.rest_need = len(node.rest)  # the piece will not be finished any more
            if node.dropping and len(node.rest) == node.rest_need:
                moved |= self._drop(node, 0)
            if node.ended and not node.keeps and not node.done:
                self._pass_end_on(node)
                moved = True
            return moved
        if node.next:
            if node.untold:
                moved |= self._tee_by_hand(node)
            if not node.owed:
                moved |= self._tee(node)
                if node.untold:
                    moved |= self._tee_by_hand(node)
        size = node.owed if node.next else node.held
        if not size:
            return moved
        if node.out_copies and not node.stash:
            if node.untold:
                return moved
            node.stash = node.pipe.read(min(size, node.stash_size))
            self.calls += 1
            node.full = False
        if node.stash:
            size = min(size, len(node.stash))
        return moved | self._move_out(node, size)

    @staticmethod
    def _end_next(node: Node) -> bool:
        """What is teed onwards ends when all was teed, however long the branch takes over its own part."""
        following = node.next
        if not node.ended or not following or following.ended:
            return False
        if node.held != node.owed or node.prefix or node.untold:
            return False
        following.ended = True
        return True

    def _pass_end_on(self, node: Node) -> None:
        node.done = True
        for following in (node.next, node.into):
            if following:
                following.ended = True
        if node.ring:
            node.ring.ended = True
        if node.sink:
            self._tell("SINK_DRAINED", node.sink.name)
