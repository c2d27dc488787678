"""The chain: nodes and outlets, built from a route's stages. The shape is here, what happens to it in pipeline.py.

    node            one kernel pipe and what is done to the stream there (struct relay_node)
    outlet          a place where bytes leave: a leaf node, the sink that stands there, and its policy

A tee's node is teed into the next and moves what it owes into its branch. tee(2) cannot resume further in, so a node
tees nothing while it owes: what its sink refuses has to go somewhere, or the sink would hold all behind it from the
first such byte on. So a sink has a pipe in front of it that is its backlog, and is given its bytes past that pipe
while it is empty. A sink with a thread has backlog enough. The policy stands at the branch's head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine
from relay.kernel.pipe import DEFAULT_CAPACITY
from relay.needs import has_backlog, passes_backlog
from relay.pipeline.introduction import Introduction
from relay.pipeline.node import Node, guard
from relay.pipeline.outlet import Outlet
from relay.stages.base import StageSettings
from relay.stages.checksum import Checksum
from relay.stages.stage import Stage
from relay.ways import Ways


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
        self._settings: dict[int, StageSettings] = {}  # what each stage was made from, by its id
        self.outlets: list[Outlet] = []
        self._gates: list[Node] = []  # heads of the branches that are being built
        self._way: list[Node] = []  # from the outermost gate to where the chain is being built
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
        self._settings.update(zip(map(id, made), stages, strict=True))
        digest = None
        if sink.sidecar and slow.policy != "spill":
            digest = Checksum(sink.sidecar, f"sidecar of {sink.address}")
            made.append(digest)
        first: Node | None = None
        link: Callable[[Node], None] | None = None
        for stage in made:
            node = self._add()
            self._way.append(node)
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
            leaf = self._backlog(tail, sink, slow)
            self._outlet(leaf, tail, sink, slow, digest)
            self._set_apart(tail, self.outlets[-1:], [leaf], [])
        else:
            self._outlet(leaf, gate or tail, sink, slow, digest)
        del self._way[len(self._way) - len(made) :]
        return first or tail

    def _through(self, stage: Stage, node: Node) -> Callable[[Node], None]:
        """Wires what a stage does besides passing on; returns how its node is linked to the following one."""
        branch = stage.branch
        begun = len(self.outlets), len(self.nodes), len(self.stages)
        hidden = isinstance(stage, Checksum)
        if branch is None and not hidden:
            return lambda following: self._into(node, following)
        tee = self._ways.tee()
        if tee.method == "copy":
            node.c.tee_copies = 1
            node.copies(tee.reason)
        if branch is None:
            nobody = OnSlow().effective(listening=False)
            self.outlets.append(
                Outlet(stage.name, node, node, None, nobody, stage=stage, gates=tuple(self._gates))
            )
        elif branch.on_slow.policy == "spill" and branch.to.verb != "listen":
            leaf = self._add()
            self._into(node, leaf)
            self._outlet(leaf, node, branch.to, branch.on_slow, None, name=stage.name, branch=branch.stages)
        elif branch.stages or branch.to.sidecar or branch.to.verb == "listen":
            self._gates.append(node)
            self._into(node, self._build(branch.stages, branch.to, branch.on_slow, node))
            self._gates.pop()
        elif has_backlog(branch.to, branch.on_slow):
            leaf = self._backlog(node, branch.to, branch.on_slow)
            self._outlet(leaf, node, branch.to, branch.on_slow, None, name=stage.name)
        else:
            self._outlet(node, node, branch.to, branch.on_slow, None, name=stage.name)
        if branch is not None:
            outlets, nodes, stages = begun
            self._set_apart(node, self.outlets[outlets:], self.nodes[nodes:], self.stages[stages:])

        def teed(following: Node) -> None:
            node.c.next = following.c

        return teed

    def _backlog(self, gate: Node, sink: SinkSettings, slow: OnSlow) -> Node:
        """The pipe in front of a sink, which `gate` fills."""
        leaf = self._add()
        self._into(gate, leaf)
        gate.c.past = int(passes_backlog(sink, slow))
        return leaf

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
            name or str(sink.address),
            node,
            gate,
            sink,
            slow,
            gates=tuple(self._gates),
            branch=branch,
            way=tuple(self._way),
            digest=digest,
            per_turn=per_turn,
        )
        if sink.verb != "listen":
            guard(gate, slow)
        if sink.proxy_protocol:
            self.stages.append(Introduction(sink.proxy_protocol))
            self.stages[-1].wire(self._engine, node.c)
        self.outlets.append(outlet)

    def _set_apart(
        self, gate: Node, outlets: Sequence[Outlet], nodes: Sequence[Node], stages: Sequence[Stage]
    ) -> None:
        """A branch that may hold nobody does not hold a turn's end either: what it has may be on its way still when
        the next stream begins. Where something in it belongs to one stream alone, that stream is waited for.
        """
        if not nodes or outlets[-1].gate is not gate or outlets[-1].policy not in ("drop", "disconnect"):
            return
        if any(outlet.per_turn for outlet in outlets) or any(stage.of_a_stream for stage in stages):
            return
        gate.c.apart_ns = gate.c.after_ns
        for node in nodes:
            node.c.apart = gate.c

    def change(self, old: StageSettings, new: StageSettings) -> None:
        """The stage that was made from `old` goes on by `new`, whether it is here or behind a log."""
        for stage in self.stages:
            if self._settings.get(id(stage)) is old:
                self._settings[id(stage)] = new
                stage.change(new)
        for outlet in self.outlets:
            if any(each is old for each in outlet.branch):
                outlet.branch = tuple(new if each is old else each for each in outlet.branch)
                if outlet.sink is not None:
                    outlet.sink.change(old, new)

    def reopen(self) -> None:
        """Files that were moved away are opened anew."""
        for outlet in self.outlets:
            if outlet.sink is not None:
                outlet.sink.reopen()

    def close(self) -> None:
        """Closes every node and stage. No engine may have the pipeline any more. Safe to call again."""
        for stage in self.stages:
            stage.close()
        for node in self.nodes:
            node.close()
