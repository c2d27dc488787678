"""A plan as people and programs read it: a tree in text, JSON with stable keys, a Mermaid flowchart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from relay import needs
from relay.needs import Need
from relay.pipeline.ring_shape import Across
from relay.planning.hops import Back, Hop, RoutePlan, hops
from relay.planning.plan import Plan
from relay.units import show_size
from relay.ways import Choice

TURNS = {
    "each": "each connection has sinks of its own",
    "one": "connections take turns on one pipeline",
    "once": "one stream, then it is done",
}
BOTH = "both ways between each connection and one of its own to the sink"


def as_text(plan: Plan) -> str:
    """The tree of every route with the method and the reason of each hop, who holds whom, what is needed."""
    blocks = ["\n".join(_route_lines(route)) for route in plan.routes]
    return "\n\n".join([*blocks, "\n".join(summary(plan))]) + "\n"


def summary(plan: Plan) -> Iterator[str]:
    """What the whole of it needs, beside what the machine allows."""
    limits = f"{plan.machine.files} descriptors"
    limits += (
        f", {_pages(plan.machine.pipe_pages)}" if plan.machine.pipe_pages else ", no limit of pipe pages"
    )
    yield f"in all: {_need(plan.total)} with {_count(plan.engines, 'engine')}; allowed are {limits}"
    for line in room(plan):
        yield f"  {line}"
    if plan.confined:
        yield f"confined: relay {plan.confined}"


def room(plan: Plan) -> Iterator[str]:
    """How many more fit within the machine's limits, for what the configuration does not bound."""
    for route in plan.routes:
        for what, need in (
            ("streams", route.stream if route.streams is None else None),
            ("subscribers", route.subscriber),
        ):
            if need is not None:
                more, limit = fitting(plan, need)
                yield f"{route.name}: {what} have no limit; {more} more fit ({limit})"


def fitting(plan: Plan, need: Need) -> tuple[int, str]:
    """How many more of `need` fit beside the plan, and which limit ends it."""
    by_files = max(0, plan.machine.files - plan.total.descriptors) // need.descriptors
    if plan.machine.pipe_pages and need.pages:
        by_pages = max(0, plan.machine.pipe_pages - plan.total.pages) // need.pages
        if by_pages < by_files:
            return by_pages, "pipe pages; the pipes of others are smaller"
    return by_files, "descriptors"


def _route_lines(route: RoutePlan) -> Iterator[str]:
    method = "" if route.method == "auto" else f", method: {route.method}"
    turns = BOTH if route.duplex else TURNS[route.turns]
    yield f"{route.name}: {turns}{method}"
    yield from _rows(route.source, route.chain)
    if route.crossing is not None:
        yield f"  as a whole: {_crossing(route.crossing)}"
    if route.back is not None:
        yield "  and back:"
        yield from _rows(route.back.source, route.back.chain)
        yield f"  as a whole: {_crossing(route.back.crossing)}"
    yield "  slow ends:"
    for hold in route.holds:
        yield f"    {hold.who} {hold.words}"
    yield "  needs:"
    if route.standing.descriptors:
        yield f"    to stand by: {_need(route.standing)}"
    yield f"    a stream: {_need(route.stream)}"
    if route.subscriber is not None:
        yield f"    a subscriber: {_need(route.subscriber)}"
    if (route.streams or 1) > 1 or route.waiting:
        wait = f", {route.waiting} waiting" if route.waiting else ""
        yield f"    at its limit ({_count(route.streams or 1, 'stream')}{wait}): {_need(route.at_limit)}"


def _rows(source: Hop, chain: Sequence[Hop]) -> Iterator[str]:
    rows = [(_label(source), source.choice), *_tree(chain, "")]
    width = min(60, max(len(label) for label, _ in rows))
    for label, choice in rows:
        yield f"{label:<{width}}  {choice.method:<8}  {choice.reason}"


def _crossing(crossing: Across) -> str:
    if crossing.only:
        return f"down a chain only ({crossing.only})"
    if crossing.measured:
        if crossing.choice.method == "copy":
            return "through a ring of memory; a chain is tried on the way, and the cheaper of the two taken"
        return "down a chain; a ring of memory is tried on the way, and the cheaper of the two taken"
    way = "through a ring of memory" if crossing.choice.method == "copy" else "down a chain"
    return f"{way} ({crossing.choice.reason})"


def _crossing_data(crossing: Across) -> dict[str, Any]:
    return {
        "method": crossing.choice.method,
        "reason": crossing.only or crossing.choice.reason,
        "chain_only": bool(crossing.only),
        "measured": crossing.measured,
    }


def _tree(below: Sequence[Hop], indent: str) -> Iterator[tuple[str, Choice]]:
    for hop in below:
        last = hop is below[-1]
        inner = indent + ("   " if last else "│  ")
        if hop.role in ("sink", "log") and hop.entry is not None:
            yield f"{indent}{'└─ ' if last else '├─ '}a backlog of its own", hop.entry
            yield f"{inner}└─ {_label(hop)}", hop.choice
            inner += "   "
        else:
            yield f"{indent}{'└─ ' if last else '├─ '}{_label(hop)}", hop.choice
        if hop.entry is not None and hop.role == "stage":
            yield f"{inner}└─ into its branch", hop.entry
            inner += "   "
        yield from _tree(hop.branch, inner)


def _label(hop: Hop) -> str:
    verb = {"listen": " (listens)", "connect": " (connects)"}.get(hop.verb, "")
    if hop.role == "stage":
        end = hop
        while end.branch and end.role in ("stage", "log"):
            end = end.branch[-1]
        name = "" if hop.name in (hop.kind, hop.detail, end.address) else f" '{hop.name}'"
        return f"{hop.kind}{name}{f' ({hop.detail})' if hop.detail else ''}"
    if hop.role == "log":
        return f"log {f'in {hop.address}' if hop.address else 'in memory'}, {hop.detail}"
    policy = "" if hop.policy in ("", "block") else f", {hop.policy} when slow"
    more = f", {hop.detail}" if hop.detail and hop.address else ""
    return f"{hop.name if hop.kind == 'stdio' else hop.address or hop.name}{verb}{policy}{more}" + (
        "" if hop.sure else " (known when it is opened)"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _pages(count: int) -> str:
    return f"{count} pipe pages ({show_size(count * needs.PAGE)})"


def _need(need: Need) -> str:
    most = "at most " * need.at_most
    pipes = f", {_count(need.pipes, 'pipe')}" if need.pipes else ""
    pages = f", {_pages(need.pages)}" if need.pages else ""
    return f"{most}{_count(need.descriptors, 'descriptor')}{pipes}{pages}"


# -- JSON


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; keys are only ever added."""
    machine = plan.machine
    return {
        "engines": plan.engines,
        "needs": need_data(plan.total),
        "limits": {"descriptors": machine.files, "pipe_pages": machine.pipe_pages or None},
        "calls": {
            call: machine.refused(call) or "works" for call in ("splice", "tee", "vmsplice", "sendfile")
        },
        "routes": [_route_data(route) for route in plan.routes],
        "confined": plan.confined or None,
    }


def need_data(need: Need) -> dict[str, Any]:
    """Descriptors, pipes and pipe pages; `exact` is false where it is the most it can come to."""
    return {
        "descriptors": need.descriptors,
        "pipes": need.pipes,
        "pipe_pages": need.pages,
        "exact": not need.at_most,
    }


def _route_data(route: RoutePlan) -> dict[str, Any]:
    return {
        "name": route.name,
        "method": route.method,
        "crossing": None if route.crossing is None else _crossing_data(route.crossing),
        "turns": route.turns,
        "duplex": route.duplex,
        "streams": route.streams,
        "waiting": route.waiting,
        "source": _hop_data(route.source),
        "chain": [_hop_data(hop) for hop in route.chain],
        "holds": [
            {
                "who": hold.who,
                "role": hold.role,
                "policy": hold.policy or None,
                "seconds": hold.seconds,
                "by": hold.by or None,
                "then": hold.then or None,
                "words": hold.words,
            }
            for hold in route.holds
        ],
        "needs": {
            "standing": need_data(route.standing),
            "stream": need_data(route.stream),
            "subscriber": None if route.subscriber is None else need_data(route.subscriber),
            "at_limit": need_data(route.at_limit),
        },
        "back": None if route.back is None else _back_data(route.back),
    }


def _back_data(back: Back) -> dict[str, Any]:
    return {
        "crossing": _crossing_data(back.crossing),
        "source": _hop_data(back.source),
        "chain": [_hop_data(hop) for hop in back.chain],
    }


def _hop_data(hop: Hop) -> dict[str, Any]:
    return {
        "role": hop.role,
        "kind": hop.kind,
        "name": hop.name,
        "address": hop.address or None,
        "verb": hop.verb or None,
        "method": hop.choice.method,
        "reason": hop.choice.reason,
        "sure": hop.sure,
        "entry": None if hop.entry is None else {"method": hop.entry.method, "reason": hop.entry.reason},
        "policy": hop.policy or None,
        "branch": [_hop_data(inner) for inner in hop.branch],
    }


# -- Mermaid


def as_mermaid(plan: Plan) -> str:
    """A flowchart: a subgraph a route, an edge a way that bytes go, with its methods in order."""
    lines = ["flowchart LR"]
    for number, route in enumerate(plan.routes):
        lines.append(f'  subgraph route{number}["{escaped(route.name)}"]')
        names = {id(hop): f"r{number}n{index}" for index, hop in enumerate(hops(route))}
        back = route.back
        same = {}  # the way back begins and ends at the sockets that the way there ends and begins at
        if back is not None:
            same = {id(back.source): id(route.chain[-1]), id(back.chain[-1]): id(route.source)}
            names.update({one: names[other] for one, other in same.items()})
        for hop in hops(route):
            if id(hop) in same:
                continue
            opening, closing = ("([", "])") if hop.role in ("source", "sink", "upstream") else ("[", "]")
            lines.append(f'    {names[id(hop)]}{opening}"{escaped(_label(hop))}"{closing}')
        if route.duplex and back is None:
            source, sink = names[id(route.source)], names[id(route.chain[0])]
            there, here = route.source.choice.method, route.chain[0].choice.method
            lines.append(f'    {source} <-->|"{there}{"" if here == there else f", back {here}"}"| {sink}')
            lines += [f"    {edge}" for edge in _branch_edges(names, route.chain[0])]
        else:
            lines += [f"    {edge}" for edge in _edges(names, route.source, route.chain)]
        if back is not None:
            lines += [f"    {edge}" for edge in _edges(names, back.source, back.chain)]
        lines.append("  end")
    return "\n".join(lines) + "\n"


def _edges(names: dict[int, str], above: Hop, chain: Sequence[Hop]) -> Iterator[str]:
    """From `above` along a chain: what leaves one hop, and what goes through a pipe into the next."""
    leaving: list[str] = [above.choice.method]
    for hop in chain:
        ways = leaving + _into(hop)
        yield f'{names[id(above)]} -->|"{_listed(ways)}"| {names[id(hop)]}'
        yield from _branch_edges(names, hop)
        above, leaving = hop, [hop.choice.method]


def _branch_edges(names: dict[int, str], hop: Hop) -> Iterator[str]:
    if not hop.branch:
        return
    first = hop.branch[0]
    if first.role == "upstream":  # each connection goes to one of them
        yield from (f"{names[id(hop)]} <-.-> {names[id(upstream)]}" for upstream in hop.branch)
        return
    into: list[str] = [hop.entry.method] if hop.entry is not None and hop.role == "stage" else []
    if first.role == "subscriber":  # they are served out of the ring
        into = [first.choice.method]
    else:
        into += ([hop.choice.method] if hop.role == "log" else []) + _into(first)
    yield f'{names[id(hop)]} -.->|"{_listed(into)}"| {names[id(first)]}'
    yield from _branch_edges(names, first)
    if len(hop.branch) > 1:
        yield from _edges(names, first, hop.branch[1:])


def _into(hop: Hop) -> list[str]:
    """The ways into an end: through its backlog if it has one."""
    if hop.role not in ("sink", "log"):
        return []
    backlog: list[str] = [hop.entry.method] if hop.entry is not None else []
    return [*backlog, "splice" if hop.role == "log" else hop.choice.method]


def _listed(ways: Sequence[str]) -> str:
    """Methods in order; sendfile goes all the way from a file to a socket."""
    return "sendfile" if set(ways) == {"sendfile"} else ", ".join(ways)


def escaped(text: str) -> str:
    """Text for a quoted label: whatever could end the quote, or mean something in one, as its number."""
    return "".join(c if c.isalnum() or c in " ._-/:,@()'" else f"#{ord(c)};" for c in text)
