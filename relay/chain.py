"""The chain: nodes and outlets, built from a route's stages. The shape is here, what happens to it in pipeline.py.

    node            one kernel pipe and what is done to the stream there (struct relay_node)
    outlet          a place where bytes leave: a leaf node, the sink that stands there, and its policy

A tee's node is teed into the next and moves what it owes into its branch. A branch with nothing but a sink that
blocks needs no pipe of its own: the tee's node moves straight into the sink. Any other policy stands at the
branch's head, in front of a pipe that is the sink's backlog.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay.backoff import Backoff
from relay.endpoints.base import Sink
from relay.endpoints.settings import OnSlow, SinkSettings
from relay.engine import Engine
from relay.kernel import core
from relay.kernel.pipe import DEFAULT_CAPACITY, Pipe
from relay.stages.base import StageSettings
from relay.stages.checksum import Checksum
from relay.stages.stage import Stage
from relay.ways import Ways

STASH = 256 * 1024  # bytes that a copying node takes out of its pipe at a time


class Node:
    """One stage's pipe and its struct; owns both, and the stash if the kernel refuses zero-copy there."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._engine = engine
        self.pipe = Pipe(capacity)
        self.c = core.new(
            "node",
            pipe_r=self.pipe.read_fd,
            pipe_w=self.pipe.write_fd,
            capacity=self.pipe.capacity,
            left=-1,
            align=1,
        )
        self._stash: core.Struct = None
        self.why = ""

    def hear(self, target: Callable[[int, int], None]) -> None:
        """`target(what, error)` gets this node's events."""
        self.c.token = self._engine.register(lambda what, error, _mask: target(what, error))

    def give_stash(self) -> None:
        """Memory to copy through, and behind it room for the piece that is under way when a gap begins.

        After `align` was raised it is called again, before the node has moved anything.
        """
        size = STASH + int(self.c.align)
        if self._stash is None or len(self._stash) < size:
            self._stash = core.buffer(size)
            self.c.stash, self.c.stash_size = self._stash, STASH

    def copies(self, why: str) -> None:
        """From here on bytes leave this node by hand."""
        self.why = why
        self.give_stash()
        self.c.out_copies = 1

    def close(self) -> None:
        """Closes the pipe. The node must be in no chain. Safe to call again."""
        self._engine.forget_token(self.c.token)
        self.pipe.close()
        self.c.pipe_r = self.c.pipe_w = -1


@dataclass(eq=False)
class Outlet:
    """Where a sink stands: `node` moves bytes into it, the policy `slow` stands at `gate`.

    `branch` holds stages behind a spill's log. `hidden` outlets are a stage's own (a checksum). `per_turn`: every
    stream gets a sink of its own. `backoff` is there for one that is connected again whenever it is away.
    """

    name: str
    node: Node
    gate: Node
    settings: SinkSettings | None
    slow: OnSlow
    stage: Stage | None = None
    branch: tuple[StageSettings, ...] = ()
    digest: Checksum | None = None
    per_turn: bool = True
    sink: Sink | None = None
    moved_before: int = 0
    dropped_before: int = 0
    blocked_before: int = 0
    moved_away: int = 0
    lost_before: int = 0
    away: int = 0
    backoff: Backoff | None = None
    settled: bool = False

    @property
    def hidden(self) -> bool:
        """Whether it is a stage's own and no sink of the route."""
        return self.settings is None

    @property
    def dropped(self) -> int:
        """Bytes that this sink did not get, by policy or because it was gone, in this turn."""
        nodes = {id(self.gate): self.gate, id(self.node): self.node}.values()
        return sum(int(node.c.dropped) for node in nodes) - self.dropped_before

    @property
    def blocked(self) -> int:
        """Nanoseconds for which this sink's way was full, in this turn."""
        nodes = {id(self.gate): self.gate, id(self.node): self.node}.values()
        return sum(int(node.c.blocked_ns) for node in nodes) - self.blocked_before


class Chain:
    """All nodes of a pipeline in sweep order, its stages and outlets; owns the nodes.

    `persistent` says that streams take turns on it: sinks that have no place for each stream stay open.
    Raises KernelError when no descriptor is left; nothing stays open then.
    """

    def __init__(
        self,
        engine: Engine,
        stages: Sequence[StageSettings],
        sink: SinkSettings,
        ways: Ways,
        *,
        persistent: bool,
        capacity: int = DEFAULT_CAPACITY,
    ) -> None:
        self._engine = engine
        self._ways = ways
        self._persistent = persistent
        self._capacity = capacity
        self.nodes: list[Node] = []
        self.stages: list[Stage] = []
        self.outlets: list[Outlet] = []
        try:
            self._build(stages, sink, sink.slow, None)
        except BaseException:
            self.close()
            raise
        for node, after in zip(self.nodes, self.nodes[1:], strict=False):
            node.c.after = after.c
        self.head = self.nodes[0]

    def new_node(self) -> Node:
        """A node of this chain's capacity that is not in it yet."""
        return Node(self._engine, self._capacity)

    def _add(self) -> Node:
        node = self.new_node()
        self.nodes.append(node)
        return node

    def _build(
        self, stages: Sequence[StageSettings], sink: SinkSettings, slow: OnSlow, gate: Node | None
    ) -> Node:
        """A chain from its first stage to its sink; `gate` is where its policy stands, None for its own tail."""
        made = [settings.make() for settings in stages]
        digest = None
        if sink.sidecar and slow.policy != "spill":
            digest = Checksum(sink.sidecar, f"sidecar of {sink.address}")
            made.append(digest)
        first: Node | None = None
        link: Callable[[Node], None] | None = None
        for stage in made:
            node = self._add()
            first = first or node
            if link is not None:
                link(node)
            stage.wire(self._engine, node.c)
            self.stages.append(stage)
            link = self._through(stage, node)
        tail = self._add()
        if link is not None:
            link(tail)
        leaf = tail
        if gate is None and slow.policy != "block" and sink.verb != "listen":
            leaf = self._add()
            self._into(tail, leaf)
        self._outlet(leaf, gate or tail, sink, slow, digest)
        return first or tail

    def _through(self, stage: Stage, node: Node) -> Callable[[Node], None]:
        """Wires what a stage does besides passing on; returns how its node is linked to the following one."""
        branch = stage.branch
        hidden = isinstance(stage, Checksum)
        if branch is None and not hidden:
            return lambda following: self._into(node, following)
        tee = self._ways.tee()
        if tee.method == "copy":
            node.c.tee_copies = 1
            node.copies(tee.reason)
        if branch is None:
            nobody = OnSlow().effective(listening=False)
            self.outlets.append(Outlet(stage.name, node, node, None, nobody, stage=stage))
        elif branch.on_slow.policy == "spill" and branch.to.verb != "listen":
            leaf = self._add()
            self._into(node, leaf)
            self._outlet(leaf, node, branch.to, branch.on_slow, None, name=stage.name, branch=branch.stages)
        elif branch.stages or branch.to.sidecar or branch.to.verb == "listen":
            self._into(node, self._build(branch.stages, branch.to, branch.on_slow, node))
        elif branch.on_slow.policy != "block":
            leaf = self._add()
            self._into(node, leaf)
            self._outlet(leaf, node, branch.to, branch.on_slow, None, name=stage.name)
        else:
            self._outlet(node, node, branch.to, branch.on_slow, None, name=stage.name)

        def teed(following: Node) -> None:
            node.c.next = following.c

        return teed

    def _into(self, node: Node, following: Node) -> None:
        node.c.into = following.c
        between = self._ways.between()
        if between.method == "copy":
            node.copies(between.reason)

    def _outlet(
        self,
        node: Node,
        gate: Node,
        sink: SinkSettings,
        slow: OnSlow,
        digest: Checksum | None,
        name: str = "",
        branch: tuple[StageSettings, ...] = (),
    ) -> None:
        per_turn = not self._persistent or bool(sink.placeholders & {"id", "time", "peer"}) or bool(digest)
        outlet = Outlet(
            name or str(sink.address), node, gate, sink, slow, digest=digest, per_turn=per_turn, branch=branch
        )
        if sink.verb != "listen":
            guard(gate, slow)
        self.outlets.append(outlet)

    def close(self) -> None:
        """Closes every node and stage. No engine may have the pipeline any more. Safe to call again."""
        for stage in self.stages:
            stage.close()
        for node in self.nodes:
            node.close()


def guard(gate: Node, slow: OnSlow) -> None:
    """Puts a policy at a gate: after how long it is slow, and where gaps may begin."""
    gate.c.after_ns = max(1, int((slow.after or 0) * 1e9))
    policy = slow.then if slow.policy == "spill" else slow.policy
    if policy == "drop":
        gate.c.align = slow.align
        gate.give_stash()


def start_gap(gate: core.Struct) -> None:
    """How much of the piece that is under way must still be kept before anything may be dropped."""
    under_way = (gate.passed + gate.dropped) % gate.align
    gate.rest_have = 0
    gate.rest_need = gate.align - under_way if under_way else 0
