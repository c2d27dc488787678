"""The part of a sweep that fills a ring, from a node or straight from the source, and gives to its readers."""

from __future__ import annotations

from model.ends import Sink
from model.node import Node
from model.ring import Reader, Ring
from model.sweep import EPIPE, GIVEN, PIECE, Sweep

PATIENT = 256 << 20  # most bytes that a rush must have lasted for
FEWEST = 64 << 10  # bytes into a ring at a time, however many read it


class Readers(Sweep):
    """A ring and its readers, in a sweep."""

    # -- into a ring

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
            return self._nothing_came(source)
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

    # -- out of a ring

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
