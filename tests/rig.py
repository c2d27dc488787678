"""The C pump and its model side by side, over real pipes: what is done to one is done to the other.

After every sweep everything both of them know is compared: events, system calls made, the bytes of every
pipe and stash, every counter, and whether the budget stopped it. Readiness is asked of poll(2) before each
sweep, so the schedule alone decides what happens; the time is the C core's own, which the model is told.
"""

from __future__ import annotations

import os
import random
import select
from mmap import PAGESIZE

from comparison import compare
from descriptors import Descriptors
from model import Event, Model, Node, Sink, Source
from model import Reader as ModelReader
from model import Ring as ModelRing
from slots import Pipe
from syscalls import Memory
from twins import Outlet, Scatter, Spec, Step

from relay.kernel import core
from relay.kernel.ring import Reader, Ring
from relay.pipeline.place import Place

NAMES = {
    getattr(core, name): name
    for name in (
        *("SOURCE_ENDED", "SOURCE_FAILED", "SINK_DRAINED", "SINK_FAILED", "PEER_ENDED", "WANTS_COPY"),
        *("SOURCE_COPIES", "SOURCE_DRY", "SLOW", "CAUGHT_UP", "IDLE", "DONE", "BROKEN", "SINK_BUSY", "STILL"),
        "GAUGED",
    )
}
EVENTS = 512


class Rig:
    """A chain of `specs`, the last of which is its tail, in C and in Python; `fds` owns the descriptors."""

    def __init__(
        self, fds: Descriptors, specs: list[Spec], *, seed: int = 1, source_slots: int = 16,
        copy_source: bool = False, budget: int = 1 << 22, scratch: int = 65536, keep: bool = False,
        scatter: Scatter | None = None, pipes: bool = False,
    ) -> None:  # fmt: skip
        self.fds = fds
        self.bytes = random.Random(seed)
        self.fed = bytearray()
        self.names: dict[int, str] = {}
        self.events: list[Event] = []
        self._null = fds.open(os.devnull, os.O_RDWR)
        self._scratch = core.buffer(scratch)
        self.engine = core.new(
            "engine", epoll=-1, null_fd=self._null, scratch=self._scratch, scratch_size=scratch, budget=budget
        )
        self._out = core.ffi.new("struct relay_event[]", EVENTS)
        self.pipeline = core.new("pipeline", token=self._token("pipeline"), keep=int(keep))
        self.inlet = fds.pipe(source_slots * PAGESIZE)
        self.inlet_open = True
        method = core.COPY if copy_source else core.SPLICE
        self.source = core.new_end(self.inlet.r, core.POLLED, method)
        self.steps: list[Step] = []
        self.outlets: list[Outlet] = []
        for number, spec in enumerate(specs):
            self._add(spec, f"node{number}", tail=number == len(specs) - 1)
        for step, following in zip(self.steps, self.steps[1:], strict=False):
            step.c.after = following.c
        self.model = Model(
            [step.model for step in self.steps],
            Source(Pipe(source_slots), copy_source),
            budget=budget,
            scratch=scratch,
        )
        self.model.keep, self.model.pipes = keep, pipes
        for end in [self.source, *(outlet.c for outlet in self.outlets if outlet.ends)]:
            end.is_pipe = int(pipes)
        self.pipeline.head, self.pipeline.nodes = self.steps[0].c, len(self.steps)
        self.pipeline.source = self.source
        self.trunk = [step for step in self.steps if not step.model.name.startswith("leaf")]
        self.ring: tuple[Ring, ModelRing] | None = None
        self.changes = 0
        self.scatter = scatter if all(self._may_read(spec) for spec in specs) else None
        if specs[-1].ring:
            self._broadcast(self.trunk[-1], specs[-1])

    @staticmethod
    def _may_read(spec: Spec) -> bool:
        """Whether its sink could as well read a ring."""
        plain = spec.kind != "plain" and not (spec.prefix or spec.rate or spec.skip or spec.ring)
        return plain and spec.left < 0

    def _token(self, name: str) -> int:
        token = len(self.names) + 1
        self.names[token] = name
        return token

    # -- building

    def _step(self, spec: Spec, name: str, slots: int) -> Step:
        ends = self.fds.pipe(slots * PAGESIZE)
        c = core.new(
            "node", token=self._token(name), pipe_r=ends.r, pipe_w=ends.w, capacity=slots * PAGESIZE, left=-1,
            align=1,
        )  # fmt: skip
        return Step(c, ends, Node(name, Pipe(slots)), spec)

    def _dress(self, step: Step, spec: Spec) -> None:
        """What the spec says of the node itself."""
        c, model = step.c, step.model
        for name in ("rate", "skip", "left", "align", "tee_copies", "out_copies"):
            setattr(c, name, getattr(spec, name))
            setattr(model, name, getattr(spec, name))
        c.burst = model.burst = max(1, spec.rate // 8)
        c.after_ns = model.after = spec.after
        self._give_stash(step, spec)
        if spec.prefix:
            step.prefix = self.bytes.randbytes(spec.prefix)
            step.memory = Memory(-(-spec.prefix // PAGESIZE))
            step.memory[: spec.prefix] = step.prefix
            c.prefix, c.prefix_left = core.ffi.cast("char *", step.memory.address), spec.prefix
            model.prefix = step.prefix

    @staticmethod
    def _give_stash(step: Step, spec: Spec) -> None:
        step.stash = core.buffer(spec.stash + spec.align)
        step.c.stash, step.c.stash_size, step.model.stash_size = step.stash, spec.stash, spec.stash

    def _add(self, spec: Spec, name: str, *, tail: bool) -> None:
        step = self._step(spec, name, spec.slots)
        self._dress(step, spec)
        before = [s for s in self.steps if not s.model.name.startswith("leaf")]
        if before:
            link = "into" if before[-1].spec.kind == "plain" else "next"
            setattr(before[-1].c, link, step.c)
            setattr(before[-1].model, link, step.model)
        self.steps.append(step)
        if spec.kind == "gate":
            leaf = self._leaf(step, spec)
            self.steps.append(leaf)
            self._outlet(leaf, step, spec)
        elif tail or spec.kind == "tee":
            self._outlet(step, step, spec)

    def _broadcast(self, tail: Step, spec: Spec) -> None:
        ring = Ring(spec.ring, spec.keep, spec.align, spec.reserve)
        self.ring = ring, ModelRing(ring.size, ring.full, spec.keep)
        if spec.keep:
            ring.open()
            self.ring[1].there = True
        tail.c.ring, tail.model.ring = ring.c, self.ring[1]
        tail.c.sink.fd = -1

    def _leaf(self, gate: Step, spec: Spec) -> Step:
        leaf = self._step(spec, f"leaf of {gate.model.name}", spec.leaf_slots)
        leaf.c.out_copies = leaf.model.out_copies = spec.out_copies
        if spec.apart:
            gate.c.apart_ns = gate.model.apart = spec.apart
            leaf.c.apart, leaf.model.gate = gate.c, gate.model
        self._give_stash(leaf, spec)
        gate.c.into, gate.model.into = leaf.c, leaf.model
        gate.c.past, gate.model.past = int(spec.past), spec.past
        return leaf

    def _outlet(self, step: Step, gate: Step, spec: Spec) -> None:
        name = f"sink of {step.model.name}"
        ends = None if spec.null else self.fds.pipe(spec.sink_slots * PAGESIZE)
        end = core.new_end(ends.w if ends else self._null, core.POLLED if ends else core.INSTANT)
        end.token = self._token(name)
        end.writable = int(spec.null)
        sink = Sink(name, Pipe(spec.sink_slots) if ends else None, spec.null)
        step.c.sink, step.model.sink = end, sink
        step.c.hold, step.model.hold = int(spec.hold), spec.hold
        self.outlets.append(Outlet(end, ends, sink, step, gate))

    # -- what may happen

    def feed(self, size: int, piece: int = 65536) -> None:
        """Up to `size` bytes come in, in writes of `piece`."""
        while size > 0 and self.inlet_open:
            data = self.bytes.randbytes(min(size, piece))
            try:
                count = os.write(self.inlet.w, data)
            except BlockingIOError:
                count = 0
            assert self.model.source
            assert self.model.source.pipe.write(data) == count
            self.fed += data[:count]
            size -= count
            if count < len(data):
                return

    def end(self) -> None:
        """The source comes to its end."""
        if self.inlet_open:
            self.inlet_open = False
            self.fds.close(self.inlet.w)
            assert self.model.source
            self.model.source.pipe.ended = True

    def read(self, outlet: Outlet, size: int) -> int:
        """A receiver reads up to `size` bytes; what it gets is what the model's receiver gets."""
        if not outlet.alive or outlet.ends is None or size < 1:
            return 0
        try:
            data = os.read(outlet.ends.r, size)
        except BlockingIOError:
            data = b""
        assert outlet.model.pipe
        assert data == outlet.model.pipe.read(size), f"{outlet.model.name}: other bytes than the model's"
        outlet.got += data
        return len(data)

    def kill(self, outlet: Outlet) -> None:
        """A receiver goes away with whatever it had not read."""
        if outlet.alive and outlet.ends is not None:
            outlet.alive = False
            self.fds.close(outlet.ends.r)
            assert outlet.model.pipe
            outlet.model.pipe.orphaned = True

    def again(self, outlet: Outlet) -> None:
        """Where a sink failed and its place is held, another stands from now on, with a receiver of its own."""
        if not outlet.step.model.hold or not outlet.model.failed or outlet.reader:
            return
        at = self.outlets.index(outlet)
        self._outlet(outlet.step, outlet.gate, outlet.gate.spec)
        another = self.outlets[at] = self.outlets.pop()
        another.second, another.place = True, outlet.place
        if another.place:
            another.place[0].put(another.c)
            another.place[1].sink = another.model

    def join(self, slots: int, after: int) -> Outlet:
        """A subscriber of the tail's broadcast: the reader of a pipe of `slots`, slow after `after` nanoseconds."""
        assert self.ring
        name, ends = f"subscriber {len(self.names)}", self.fds.pipe(slots * PAGESIZE)
        end = core.new_end(ends.w)
        end.token = self._token(name)
        align = self.trunk[-1].spec.align
        reader, model = Reader(end, 0, align), ModelReader(Sink(name, Pipe(slots)), after, align, name)
        reader.c.after_ns, reader.c.token = after, end.token
        self.ring[0].join(reader)
        self.ring[1].join(model)
        tail = self.trunk[-1]
        assert model.sink
        self.outlets.append(Outlet(end, ends, model.sink, tail, tail, reader=(reader, model), began=model.at))
        return self.outlets[-1]

    def change(self) -> None:
        """Once nothing is under way the bytes are to cross the other way."""
        if self.scatter and not self.model.still:
            self.pipeline.still = self.model.still = 1

    def stay(self) -> None:
        """They are not to, after all."""
        self.pipeline.still = self.model.still = 0

    def _change(self) -> None:
        self.stay()
        self.changes += 1
        if self.model.ring:
            self.leave_ring()
            return
        assert self.scatter
        wanted = self.scatter
        ring = Ring(wanted.full, 0, max(step.spec.align for step in self.steps), wanted.reserve)
        ring.open()
        c, fed = ring.c, int(self.pipeline.fed)
        c.position = c.offered = c.start = c.oldest = c.base = fed
        c.batch, c.hold_ns, c.quick, c.least, c.need = (
            wanted.batch, wanted.hold, wanted.quick, wanted.least, wanted.least,
        )  # fmt: skip
        model = ModelRing(
            ring.size, ring.full, 0, True, bytearray(fed), fed, offered=fed, base=fed, batch=wanted.batch,
            hold=wanted.hold, quick=wanted.quick, least=wanted.least, need=wanted.least,
        )  # fmt: skip
        self.ring = ring, model
        for outlet in self.outlets:
            name = f"place of {outlet.step.model.name}"
            place = Place(ring, outlet.step, outlet.gate, self._token(name))  # type: ignore[arg-type]
            node, gate = outlet.step.model, outlet.gate.model
            apart = gate.apart if node.gate is gate else 0
            gate.dropping, gate.rest_need = False, 0
            reader = ModelReader(
                node.sink, gate.after, gate.align, name, stays=True, hold=node.hold, apart=apart
            )
            model.join(reader)
            outlet.place = place, reader
        self.pipeline.ring, self.model.ring = c, model

    def leave_ring(self) -> None:
        """The bytes go down the chain from here on, if they did not."""
        if not self.model.ring or not self.ring:
            return
        for outlet in self.outlets:
            assert outlet.place
            place, reader = outlet.place
            place.leave()
            outlet.place = None
            node, gate = outlet.step.model, outlet.gate.model
            node.sink = reader.sink
            at = int(self.model.ring.start)
            lost = reader.dropped
            for start, end in [*reader.runs, (self.model.ring.position, self.model.ring.position)]:
                parts = [("dropped", start - at), ("passed", end - start)]
                gate.history += [(became, size) for became, size in parts if size]
                at = end
            gate.dropped += lost
            gate.passed += self.model.ring.position - self.model.ring.start - lost
            gate.blocked += reader.blocked
            if node is not gate:
                node.passed += self.model.ring.position - self.model.ring.start - lost
        self.pipeline.ring, self.model.ring = core.ffi.NULL, None
        self.ring[0].close()
        self.ring = None

    def leave(self, outlet: Outlet) -> None:
        """A subscriber goes."""
        if not outlet.reader or not self.ring or outlet.reader[1] not in self.ring[1].readers or outlet.place:
            return
        outlet.alive = False
        self.ring[0].leave(outlet.reader[0])
        self.ring[1].leave(outlet.reader[1])

    def new_stream(self) -> None:
        """What comes from now on counts as another stream."""
        if self.model.ring:
            return
        for step in self.steps:
            step.model.new_stream()
            core.lib.relay_gate_stream(step.c)
        if self.ring:
            self.ring[0].new_stream()
            self.ring[1].new_stream()
            for outlet in self.outlets:
                if outlet.reader and not outlet.reader[1].runs and outlet.reader[1] in self.ring[1].readers:
                    outlet.began = min(outlet.began, outlet.reader[1].at)

    def later(self, nanoseconds: int) -> None:
        """Time passes: all that anybody remembers is that much longer ago."""
        for twin in (*self.steps, *self.outlets):
            twin.later(nanoseconds)
        if self.model.ring and self.ring:
            self.ring[0].c.window_ns -= nanoseconds
            self.model.ring.window_at -= nanoseconds
            if self.model.ring.held:
                self.ring[0].c.held_ns -= nanoseconds
                self.model.ring.held -= nanoseconds
        if self.pipeline.idle_ns:
            self.pipeline.idle_ns -= nanoseconds
            self.model.idle -= nanoseconds

    def ask_poll(self) -> None:
        """Tells both what poll(2) says, as epoll's edges would have."""
        poll = select.poll()
        ends = {self.source.fd: None, **{o.ends.w: o for o in self.outlets if o.ends}}
        poll.register(self.source.fd, select.POLLIN)
        for fd in ends:
            if fd != self.source.fd:
                poll.register(fd, select.POLLOUT)
        for fd, _ in poll.poll(0):
            outlet = ends[fd]
            if outlet is None:
                self.source.readable = 1
                assert self.model.source
                self.model.source.readable = True
            else:
                outlet.c.writable, outlet.model.writable = 1, True

    def sweep(self) -> list[Event]:
        """Readiness, one sweep of each, and the comparison; a node that was told slow begins a gap."""
        self.ask_poll()
        calls = self.engine.calls
        count = core.lib.relay_sweep(self.engine, self.pipeline, self._out, EVENTS)
        more, wake = bool(self.pipeline.queued), int(self.pipeline.wake_ns)
        core.lib.relay_forget(self.engine, self.pipeline)
        self.pipeline.forgotten = 0  # this one goes on
        got = [(NAMES[e.what], self.names[e.token], e.error) for e in self._out[0:count]]
        asked = self.model.calls
        events, expected_more = self.model.sweep(int(self.engine.now_ns))
        assert got == events
        assert self.engine.calls - calls == self.model.calls - asked, "system calls"
        assert (more, wake) == (expected_more, self.model.wake)
        compare(self)
        self.events += events
        for what, name, _ in events:
            if what == "SLOW":
                self._slow(name)
            elif what == "STILL":
                self._change()
        return events

    def _slow(self, name: str) -> None:
        """Whoever is slow drops."""
        for outlet in self.outlets:
            if outlet.place and outlet.place[1].name == name and self.model.ring:
                outlet.place[0].drop()
                self.model.ring.drop(outlet.place[1])
                return
            if outlet.reader and outlet.model.name == name and self.ring:
                self.ring[0].drop(outlet.reader[0])
                self.ring[1].drop(outlet.reader[1])
                return
        self._start_gap(next(step for step in self.steps if step.model.name == name))

    @staticmethod
    def _start_gap(step: Step) -> None:
        step.model.start_gap()
        core.lib.relay_gate_drop(step.c)
