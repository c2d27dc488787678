"""The pump in plain Python: the executable specification of relay/kernel (pump.h names the same things).

Its pipes are those of slots.py, which is enough to say exactly how far each byte gets. What the C core keeps
as numbers is kept here as the bytes themselves, and the numbers are derived: nothing can be miscounted.

`Model.sweep(now)` does what relay_sweep does, and says the same events and the same number of system calls.
"""

from __future__ import annotations

import dataclasses
from mmap import PAGESIZE

from slots import Pipe

PIECE = 1 << 20  # most bytes asked for in one call
PATIENT = 256 << 20  # most bytes that a rush must have lasted for
GIVEN = 16 << 20  # bytes to the readers of rings in one sweep
SMALL = 64 << 10  # bytes: what fills no pipe
STUCK = 20_000_000  # nanoseconds that what a sink refuses waits in front of its backlog
FEWEST = 64 << 10  # bytes into a ring at a time, however many read it

Event = tuple[str, str, int]  # what, the name of the node, sink or pipeline, errno

EPIPE = 32


@dataclasses.dataclass(eq=False)
class Source:
    """Where bytes enter: a pipe that somebody else writes to."""

    pipe: Pipe
    copies: bool = False
    readable: bool = False
    moved: int = 0


@dataclasses.dataclass(eq=False)
class Sink:
    """Where bytes leave: a pipe that somebody else reads from, or /dev/null (`pipe` is None)."""

    name: str
    pipe: Pipe | None
    writable: bool = False
    failed: bool = False
    moved: int = 0
    last: int = 0  # when it took its last byte


@dataclasses.dataclass(eq=False)
class Reader:
    """One subscriber, or the place of a pipeline's sink (`stays`). What it is still to get is the ring's stream from
    `at` on, after `rest`."""

    sink: Sink | None
    after: int
    align: int = 1
    name: str = ""
    stays: bool = False
    hold: bool = False
    apart: int = 0
    at: int = 0
    dropped: int = 0
    since: int = 0
    blocked: int = 0
    slow: bool = False
    dropping: bool = False
    done: bool = False
    rest: bytes = b""
    runs: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # what it was given, [from, to)

    @property
    def holding(self) -> bool:
        """Whether room is kept for it."""
        return bool(self.sink and (not self.sink.failed or self.hold) and not self.done and not self.dropping)


@dataclasses.dataclass(eq=False)
class Ring:
    """Memory that many read: here the whole stream is kept, and what the C core's memory holds of it is derived."""

    size: int
    full: int
    keep: int
    there: bool = False  # its memory
    stream: bytearray = dataclasses.field(default_factory=bytearray)
    start: int = 0
    origins: list[int] = dataclasses.field(default_factory=lambda: [0])
    ended: bool = False
    readers: list[Reader] = dataclasses.field(default_factory=list)
    offered: int = 0  # a pipeline's own: what is behind is held back
    base: int = 0
    batch: int = 0
    hold: int = 0  # nanoseconds
    held: int = 0
    quick: int = 0
    least: int = 0
    need: int = 0
    rush: int = 0
    window_at: int = 0
    window: int = 0

    @property
    def empty(self) -> bool:
        """Whether nobody has anything to get."""
        return not any(r.dropping or (r.holding and r.at < self.position) for r in self.readers)

    def behind(self, at: int) -> int:
        """Bytes from there to the end of its memory."""
        return self.size - (at - self.base) % self.size

    @property
    def position(self) -> int:
        """Bytes that ever came."""
        return len(self.stream)

    @property
    def room(self) -> int:
        """Bytes that fit before the reader furthest behind, of those that hold."""
        oldest = min((r.at for r in self.readers if r.holding), default=self.position)
        return self.size - (self.position - min(oldest, self.position))

    def border(self, at: int, align: int, *, down: bool = False) -> int:
        """The first border at or behind `at`, or the last one at or before it."""
        known = self.origins[-8:]
        begun = [origin for origin in known if origin <= at]
        if not begun:
            return known[0]
        over = (at - begun[-1]) % align
        if down or not over:
            return at - over
        return min([at + align - over, *(origin for origin in known if origin > at)])

    def join(self, reader: Reader) -> None:
        """A newcomer, `keep` bytes back, from a border on."""
        if not self.there:
            self.there, self.start = True, self.position
        first = max(self.position - self.keep, self.start, self.position - self.size)
        reader.at = self.position if reader.stays else self.border(first, reader.align)
        self.readers.insert(0, reader)

    def leave(self, reader: Reader) -> None:
        """It reads no more; with the last one the memory goes, unless something is to be kept."""
        self.readers.remove(reader)
        self.there = bool(self.readers or self.keep)

    def drop(self, reader: Reader) -> None:
        """A gap begins, once the piece that is under way is whole."""
        to = self.border(reader.at, reader.align)
        reader.rest = bytes(self.stream[reader.at : to])
        if reader.rest:
            reader.runs.append((reader.at, to))
        reader.at, reader.dropping = to, True

    def new_stream(self) -> None:
        """`align` is counted anew."""
        if self.position != self.origins[-1]:
            self.origins.append(self.position)
        for reader in self.readers:
            reader.at = min(reader.at, self.position)


@dataclasses.dataclass(eq=False)
class Node:
    """One pipe and what is done to the stream there. Fields as in struct relay_node."""

    name: str
    pipe: Pipe
    next: Node | None = None
    into: Node | None = None
    past: bool = False  # `into` is but its sink's backlog
    stuck: int = 0
    sink: Sink | None = None
    ring: Ring | None = None
    full: bool = False
    ended: bool = False
    done: bool = False
    apart: int = 0  # a gate whose branch holds a turn's end no longer than this, taking nothing
    gate: Node | None = None  # the outermost such gate before it
    hold: bool = False  # a failed sink will be replaced: what is meant for it is kept
    owed: int = 0
    passed: int = 0
    dropped: int = 0
    rate: int = 0
    burst: int = 0
    tokens: float = 0.0
    stamp: int = 0
    skip: int = 0
    left: int = -1
    prefix: bytes = b""
    after: int = 0
    since: int = 0
    blocked: int = 0
    slow: bool = False
    dropping: bool = False
    align: int = 1
    rest: bytes = b""  # the piece that was under way when the gap began, as far as it has come
    rest_need: int = 0
    tee_copies: bool = False
    out_copies: bool = False
    stash_size: int = 0
    untold: bytes = b""  # of the stash: not yet written to next
    stash: bytes = b""  # of the stash: still to go out
    history: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # what became of its bytes

    @property
    def held(self) -> int:
        """Bytes in the pipe and the stash."""
        return self.pipe.held + len(self.stash)

    @property
    def refuses(self) -> bool:
        """Whether filling it is pointless for now."""
        return self.full or bool(self.prefix)

    @property
    def keeps(self) -> bool:
        """Whether anything is still in its keeping."""
        return bool(self.held or self.prefix or self.rest or self.untold)

    def start_gap(self) -> None:
        """From now on bytes are dropped, once the piece that is under way is whole."""
        under_way = (self.passed + self.dropped) % self.align
        self.rest, self.rest_need = b"", self.align - under_way if under_way else 0
        self.dropping = True


class Model:
    """A pipeline: its nodes in sweep order (a node before all that it fills), its source, its events."""

    def __init__(self, nodes: list[Node], source: Source | None, *, budget: int, scratch: int) -> None:
        self.nodes = nodes
        self.source = source
        self.budget, self.scratch = budget, scratch
        self.source_ended = self.keep = self.tell_idle = self.done = False
        self.ring: Ring | None = None  # scatter
        self.still = 0
        self.pipes = False  # the ends are told to be pipes of others
        self.idle = 0  # since when all but what is apart is empty
        self.wake = 0
        self.now = 0
        self.calls = 0
        self._read = self._given = 0
        self._events: list[Event] = []

    def sweep(self, now: int) -> tuple[list[Event], bool]:
        """Moves all that can move; the events, and whether the budget stopped it."""
        self.now, self.wake, self._read, self._given, self._events = now, 0, 0, 0, []
        while True:
            moved = self._scatter(self.ring) if self.ring else self._fill()
            for node in [] if self.ring else self.nodes:
                moved |= self._turn(node)
                if node.ring:
                    moved |= self._give_readers(node.ring)
                moved |= self._end_next(node)
            if not moved or self._read >= self.budget or self._given >= GIVEN:
                break
        if self.ring:
            places = self.ring.readers
            if self.ring.held:
                self._wake_at(self.ring.held + self.ring.hold)
            waited_for = [place for place in places if self._place_in_turn(self.ring, place)]
            still_open = any(p.sink and not p.sink.failed and not p.done for p in places)
            calm = not any(p.rest or p.dropping or p.at < self.ring.position for p in places)
        else:
            waited_for = [node for node in self.nodes if self._in_turn(node)]  # type: ignore[misc]
            still_open = any(n.sink and not n.sink.failed and not n.done for n in self.nodes)
            calm = not any(n.keeps or n.dropping or n.ring for n in self.nodes)
        if calm and self.still == 1 and not self.nodes[0].ended:
            self.still = 2
            self._tell("STILL", "pipeline")
        if not waited_for and self.tell_idle and (self.source_ended or not self.source):
            self.tell_idle, self.idle = False, 0
            self._tell("IDLE", "pipeline")
        if not still_open and not self.done and not self.keep:
            self.done = True
            self._tell("DONE", "pipeline")
        return self._events, moved

    def _in_turn(self, node: Node) -> bool:
        """Whether a turn's end waits for what the node keeps."""
        gate = node.gate or node
        if not node.keeps:
            return False
        if not gate.apart or not self.tell_idle:
            return True
        if gate is node and (node.held or node.prefix or node.untold):
            return True
        alive = [n.sink for n in self.nodes if n.gate is gate and n.sink and not n.sink.failed]
        if not alive:
            return False
        return self._waits_for(max(sink.last for sink in alive), gate.apart)

    def _place_in_turn(self, ring: Ring, place: Reader) -> bool:
        if not place.sink or (not place.rest and (place.dropping or place.at >= ring.position)):
            return False
        if not place.apart or not self.tell_idle:
            return True
        return not place.sink.failed and self._waits_for(place.sink.last, place.apart)

    def _waits_for(self, last: int, apart: int) -> bool:
        self.idle = self.idle or self.now
        until = (last or self.idle) + apart
        if self.now >= until:
            return False
        self._wake_at(until)
        return True

    def _tell(self, what: str, name: str, error: int = 0) -> None:
        self._events.append((what, name, error))

    def _wake_at(self, when: int) -> None:
        self.wake = min(self.wake or when, when)

    # -- into a node

    def _over(self) -> bool:
        self.source_ended = True
        if not self.keep:
            self.nodes[0].ended = True
        self._tell("SOURCE_ENDED", "pipeline")
        return True

    def _source_gives(self) -> bool:
        head, source = self.nodes[0], self.source
        if not source or self.source_ended or self.still or head.ended or head.refuses:
            return False
        return source.readable

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

    def _source_took(self, source: Source, moved: int) -> None:
        source.moved += moved
        if moved and self.pipes and not source.pipe.segments and not source.pipe.ended:
            source.readable = False  # poll says so, and an edge will tell

    def _sink_took(self, sink: Sink, moved: int) -> None:
        sink.moved += moved
        sink.last = self.now if moved else sink.last
        if self.pipes and moved >= SMALL and sink.pipe and sink.pipe.full:
            sink.writable = False

    def _fill_by_hand(self, head: Node, source: Source) -> bool:
        if head.held:
            return False
        direct = head.out_copies and not head.next
        size = head.stash_size if direct else min(self.scratch, head.pipe.slots * PAGESIZE)
        data = source.pipe.read(size)
        self.calls += 1
        if not data:
            if source.pipe.ended:
                return self._over()
            source.readable = False
            return False
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

    def _take(self, node: Node, size: int) -> bytes:
        """Bytes out of the node, to be let go or kept aside."""
        if node.stash:
            data, node.stash = node.stash[:size], node.stash[size:]
        else:
            data = node.pipe.read(size)
            self.calls += 1
        return data

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
            over = (node.passed + node.dropped) % node.align
            if not over:
                node.dropping = False
                self._no_longer_blocked(node)
                return True
            size = min(size, node.align - over)
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

    # -- a turn, and the whole chain

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

    # -- a ring and its readers

    def _give_to_ring(self, node: Node, ring: Ring, size: int) -> int:
        if not ring.there:
            data = self._take(node, size)
            ring.stream += data
            ring.start = ring.offered = ring.position
            return len(data)
        size = min(size, max(GIVEN // max(1, len(ring.readers)), FEWEST))
        room = ring.room
        if room < size and room < ring.size // 8:
            self._judge(ring)
            return 0
        data = self._take(node, min(size, room, ring.behind(ring.position)))
        ring.stream += data
        self._judge(ring)
        ring.offered = ring.position
        return len(data)

    # -- scatter: the source straight into a ring

    def _scatter(self, ring: Ring) -> bool:
        if ring.base < ring.position and not ring.keep and ring.empty:
            ring.base = ring.position
        moved = self._fill_ring(ring)
        self._offer_or_hold(ring)
        if self.nodes[0].ended and not ring.ended:
            self._offer(ring)
            ring.ended = moved = True
        return moved | self._give_readers(ring)

    def _fill_ring(self, ring: Ring) -> bool:
        source = self.source
        if not self._source_gives():
            return False
        assert source
        if ring.room < PIECE and ring.room < ring.size // 8:
            self._judge(ring)
            self._offer(ring)
            return False
        data = source.pipe.read(min(PIECE, ring.room, ring.behind(ring.position)))
        self.calls += 1
        if not data:
            if source.pipe.ended:
                return self._over()
            source.readable = False
            return False
        passed = self.now - ring.window_at
        if passed >= ring.hold:
            if ring.window * ring.hold < ring.quick * passed:
                ring.rush = 0
            ring.window_at, ring.window = self.now, 0
        ring.window += len(data)
        ring.rush += len(data)
        ring.stream += data
        self._judge(ring)
        self._read += len(data)
        self._source_took(source, len(data))
        return True

    @staticmethod
    def _offer(ring: Ring) -> None:
        ring.offered, ring.held = ring.position, 0

    def _offer_or_hold(self, ring: Ring) -> None:
        """In a rush nothing less than a batch is given out, but for what was held back for long enough."""
        waiting = ring.position - ring.offered
        if not waiting:
            return
        stops = not self.source or self.source_ended or self.still or self.nodes[0].ended
        if not ring.batch or waiting >= ring.batch or ring.rush < ring.need or stops:
            self._offer(ring)
            if ring.rush >= 4 * ring.need and ring.need > ring.least:
                ring.need //= 2
                ring.rush = ring.need
            return
        ring.held = ring.held or self.now
        if self.now - ring.held >= ring.hold:
            self._offer(ring)
            ring.rush = 0
            if ring.need < PATIENT:
                ring.need *= 2

    def _judge(self, ring: Ring) -> None:
        for reader in ring.readers:
            if not reader.holding or not reader.after or ring.position - reader.at <= ring.full:
                continue
            reader.since = reader.since or self.now
            if reader.slow:
                continue
            if self.now - reader.since < reader.after:
                self._wake_at(reader.since + reader.after)
            else:
                reader.slow = True
                self._tell("SLOW", reader.name)

    def _give_readers(self, ring: Ring) -> bool:
        moved = False
        for reader in ring.readers:  # every reader has its turn, whatever moved before
            if not reader.sink:
                reader.dropped += ring.position - reader.at + len(reader.rest)
                reader.at, reader.rest, reader.since = ring.position, b"", 0
                reader.dropping = reader.slow = False
            elif not (reader.sink.failed or reader.done):
                moved |= self._reader_turn(ring, reader, reader.sink)
        return moved

    def _reader_turn(self, ring: Ring, reader: Reader, sink: Sink) -> bool:
        moved = False
        while sink.writable:
            if not reader.rest and reader.dropping:
                if not self._end_gap(ring, reader, ring.border(ring.offered, reader.align, down=True)):
                    break
                moved = True
                continue
            if reader.rest:
                data = reader.rest
            elif reader.at < ring.offered:
                upto = min(ring.offered, reader.at + ring.behind(reader.at))
                data = bytes(ring.stream[reader.at : upto])
            else:
                break
            self.calls += 1
            if sink.pipe and sink.pipe.orphaned:
                sink.failed, sink.writable = True, False
                self._tell("SINK_FAILED", sink.name, EPIPE)
                if reader.stays and not reader.hold:
                    reader.sink, reader.since = None, 0
                return True
            given = sink.pipe.write(data) if sink.pipe else len(data)
            if not given:
                sink.writable = False
                break
            if reader.rest:
                reader.rest = reader.rest[given:]
            else:
                reader.runs.append((reader.at, reader.at + given))
                reader.at += given
            self._sink_took(sink, given)
            self._given += given
            moved = True
        if reader.dropping and not reader.rest and ring.ended:
            moved |= self._end_gap(ring, reader, ring.position)
        if reader.at >= ring.offered and not reader.rest and not reader.dropping:
            self._reader_kept_up(reader)
            if ring.ended:
                reader.done = moved = True
                self._tell("SINK_DRAINED", sink.name)
        return moved

    def _end_gap(self, ring: Ring, reader: Reader, to: int) -> bool:
        """It goes on at the last border that has come, if that is still in memory."""
        if to < max(reader.at, ring.position - ring.size):
            return False
        reader.dropped += to - reader.at
        reader.at, reader.dropping = to, False
        self._reader_kept_up(reader)
        return True

    def _reader_kept_up(self, reader: Reader) -> None:
        if not reader.since:
            return
        reader.blocked += self.now - reader.since
        reader.since = 0
        if reader.slow:
            reader.slow = False
            self._tell("CAUGHT_UP", reader.name)
