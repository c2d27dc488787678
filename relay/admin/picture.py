"""A route's live pipeline as a picture: its plan, with what flows there now. SVG by hand, to stand in an HTML page.

source -> stage -> tee -> ... -> sink        a chain lies in one row
                    +-> stage -> sink        a branch below it, that of the last tee nearest, so no lines cross
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from relay.admin.status import RouteStatus, SinkStatus, StageStatus
from relay.planning.hops import Hop, RoutePlan
from relay.units import show_size

WIDE, HIGH = 164, 58  # pixels of a box
STEP_X, STEP_Y = 224, 82  # from one to the next: what is between has room for a method
EDGE = 6
LETTERS = 23  # that fit into a box


@dataclass(frozen=True)
class Box:
    """One hop at its place. `lines` stand in it, `state` is its colour; `told` is said when it is pointed at."""

    column: int
    row: int
    state: str
    lines: tuple[str, ...]
    told: str

    @property
    def x(self) -> int:
        """Its left side."""
        return EDGE + self.column * STEP_X

    @property
    def y(self) -> int:
        """Its upper side."""
        return EDGE + self.row * STEP_Y


def picture(plan: RoutePlan, status: RouteStatus) -> str:
    """The SVG of one route."""
    return _Drawing(plan, status).svg()


class _Drawing:
    def __init__(self, plan: RoutePlan, status: RouteStatus) -> None:
        self._plan = plan
        self._status = status
        self._sinks = {sink.address: sink for sink in status.sinks}
        self._methods: dict[str, str] = {}
        for hop in sorted(status.hops, key=lambda hop: hop.streams):
            self._methods[hop.hop] = hop.method  # that of most streams comes last
        self._flows = bool(status.rate)
        self._now = _settings(plan, status)
        self._boxes: list[Box] = []
        self._edges: list[str] = []

    def svg(self) -> str:
        """All of it."""
        plan, status = self._plan, self._status
        noun = ("session" if status.duplex else "stream") + "s" * (status.streams != 1)
        flow = [f"{status.streams} {noun}", _rate(status.rate)]
        state = "flowing" if status.streams else "waiting"
        self._boxes.append(
            Box(0, 0, state, ("source", plan.source.name, ", ".join(filter(None, flow))), plan.source.name)
        )
        rows = self._chain(
            plan.chain, 1, 0, self._boxes[0], self._methods.get("source", plan.source.choice.method)
        )
        if plan.back is not None:  # a chain of its own, from the sink's connections to the source's
            back = plan.back.source
            self._boxes.append(Box(0, rows, state, ("back", back.name, _rate(status.rate_back)), back.name))
            rows = self._chain(plan.back.chain, 1, rows, self._boxes[-1], back.choice.method)
        columns = max(box.column for box in self._boxes) + 1
        width, height = EDGE * 2 + (columns - 1) * STEP_X + WIDE, EDGE * 2 + (rows - 1) * STEP_Y + HIGH
        said = escape(f"The pipeline of route {status.name}, {status.state}")
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="pipeline" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img"><title>{said}</title>',
            *self._edges,
            *(_box(box) for box in self._boxes),
            "</svg>",
        ]
        return "\n".join(parts)

    def _chain(self, chain: Sequence[Hop], column: int, row: int, above: Box, method: str) -> int:
        """Draws hops from that place on; the first row that is free below them."""
        placed: list[tuple[Hop, Box]] = []
        for hop in chain:
            box = self._hop(hop, column, row)
            self._boxes.append(box)
            sink = self._sink(hop)
            into = self._into(hop, method)
            self._edge(above, box, into, flows=self._flows if sink is None else bool(sink.rate))
            placed.append((hop, box))
            above, method, column = box, hop.choice.method, column + 1
        free = row + 1
        for hop, box in reversed(placed):
            if not hop.branch or hop.branch[0].role == "subscriber":
                continue  # the box of a broadcast says how many read it
            first = hop.entry.method if hop.entry is not None else hop.choice.method
            if hop is chain[-1]:  # behind a log the row goes on
                free = max(free, self._chain(hop.branch, box.column + 1, row, box, first))
            else:
                free = self._chain(hop.branch, box.column + 1, free, box, first)
        return free

    def _into(self, hop: Hop, method: str) -> str:
        """How bytes get into a hop: a sink's is what its streams say, others have what the plan expects."""
        sink = self._sink(hop)
        if sink is None:
            return method
        known = self._methods.get(sink.sink, "")
        if self._plan.duplex and self._plan.back is None:
            back = self._methods.get("source", hop.choice.method)
            return f"{known or method}/{back}" if back != (known or method) else back
        return known or hop.choice.method

    def _sink(self, hop: Hop) -> SinkStatus | None:
        return self._sinks.get(hop.address) if hop.role == "sink" else None

    def _hop(self, hop: Hop, column: int, row: int) -> Box:
        sink = self._sink(hop)
        if hop.role == "log":
            end = self._sinks.get(hop.branch[-1].address) if hop.branch else None
            spill = end.spill if end is not None else None
            waits = (
                "empty"
                if spill is None or not spill.bytes
                else f"{show_size(spill.bytes)}, {spill.age:.0f} s"
            )
            state = "open" if waits == "empty" else "slow"
            return Box(column, row, state, ("log", hop.address or "in memory", waits), hop.detail)
        if hop.role == "sink" and sink is None:  # the source's connections, at the end of the way back
            return Box(column, row, "waiting", ("sink", hop.address or hop.name, ""), hop.name)
        if sink is None:
            detail = self._now.get(id(hop)) or hop.detail or (hop.name if hop.name != hop.kind else "")
            return Box(column, row, "stage", (hop.kind, detail, ""), f"{hop.kind} {hop.name} {hop.detail}")
        flow = [sink.state if sink.state != "none" else "no stream", _rate(sink.rate)]
        if sink.subscribers is not None:
            flow = [f"{sink.subscribers} subscribers", _rate(sink.rate)]
        if sink.backlog:
            flow.append(f"{show_size(sink.backlog)} waits")
        told = [sink.address, f"policy {sink.policy}", f"{show_size(sink.bytes)} sent"]
        told += [
            f"{show_size(count)} {word}"
            for count, word in ((sink.dropped, "dropped"), (sink.lost, "lost"))
            if count
        ]
        told += [sink.reason] if sink.reason else []
        words = ", ".join(part for part in flow if part)
        return Box(column, row, sink.state, ("sink", sink.sink, words), "; ".join(told))

    def _edge(self, start: Box, end: Box, method: str, *, flows: bool) -> None:
        kind = "flow" if flows else "still"
        y = end.y + HIGH // 2
        if start.row == end.row:
            x = start.x + WIDE
            path = f"M{x} {y}H{end.x - 5}"
        else:
            x = start.x + WIDE // 2
            path = f"M{x} {start.y + HIGH}V{y}H{end.x - 5}"
        middle = (max(x, start.x + WIDE) + end.x) / 2 - 2
        self._edges.append(f'<path class="edge {kind}" d="{path}"/>')
        self._edges.append(f'<path class="tip" d="M{end.x - 6} {y - 4}l6 4l-6 4z"/>')
        self._edges.append(
            f'<text class="method" x="{middle:g}" y="{y - 5}">{escape(_short(method, 12))}</text>'
        )


def _settings(plan: RoutePlan, status: RouteStatus) -> dict[int, str]:
    """What stages are set to now, by the ids of their hops: those of a kind are in the same order here and there."""
    waiting: dict[str, list[StageStatus]] = {}
    for stage in status.stages:
        waiting.setdefault(stage.kind, []).append(stage)
    found = {}

    def walk(chain: Sequence[Hop]) -> None:
        for hop in chain:
            if hop.role == "stage" and waiting.get(hop.kind):
                found[id(hop)] = words_of(waiting[hop.kind].pop(0).now)
            walk(hop.branch)

    walk(plan.chain)
    walk(plan.back.chain if plan.back is not None else ())
    return found


def words_of(now: Mapping[str, Any]) -> str:
    """Settings in a few words: a rate, a burst, an interval."""
    parts = []
    for key, value in now.items():
        said = (
            f"{show_size(value)}/s"
            if key == "rate"
            else show_size(value)
            if key == "burst"
            else f"{value:g} s"
        )
        parts.append(said if key == "rate" else f"{key} {said}")
    return ", ".join(parts)


def _box(box: Box) -> str:
    first, second, third = (*box.lines, "", "")[:3]
    return (
        f'<g class="box {box.state}"><title>{escape(box.told)}</title>'
        f'<rect x="{box.x}" y="{box.y}" width="{WIDE}" height="{HIGH}" rx="6"/>'
        f'<text class="kind" x="{box.x + 8}" y="{box.y + 15}">{escape(_short(first))}</text>'
        f'<text x="{box.x + 8}" y="{box.y + 31}">{escape(_short(second))}</text>'
        f'<text class="flow" x="{box.x + 8}" y="{box.y + 47}">{escape(_short(third))}</text></g>'
    )


def _short(text: str, letters: int = LETTERS) -> str:
    """What fits; of what does not, beginning and end."""
    if len(text) <= letters:
        return text
    return f"{text[: letters // 2]}…{text[-(letters - letters // 2 - 1) :]}"


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{show_size(rate)}/s"
