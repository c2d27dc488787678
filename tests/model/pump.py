"""The pump: a sweep over the whole pipeline, and when nothing is under way in it."""

from __future__ import annotations

from model.chain import Chain
from model.node import Node
from model.ring import Reader, Ring
from model.sweep import GIVEN, Event


class Model(Chain):
    """A pipeline: its nodes in sweep order (a node before all that it fills), its source, its events."""

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
