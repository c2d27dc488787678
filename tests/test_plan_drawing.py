"""Plans as text, JSON and Mermaid, of one-way and duplex routes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from planned import PLAIN, planned

from relay.config.load import load_default
from relay.planning import drawing
from relay.planning.hops import hops
from relay.planning.plan import make_plan


def test_the_text_draws_a_tree() -> None:
    """Branches hang under their tee; a method and its reason stand beside every hop."""
    text = drawing.as_text(
        planned(
            "routes: {r: {source: 'tcp://:1', stages: [tee: {name: t, to: 'tcp://h:2', on_slow: drop}], "
            "sink: 'null:'}}"
        )
    )
    tree = [re.sub(r"(?<=[^│ ]) {2,}", "  ", line) for line in text.splitlines()[:6]]
    assert tree == [
        "r: each connection has sinks of its own",
        "tcp://:1 (listens)  splice  pages move into the pipe by reference",
        "├─ tee 't'  tee  both pipes refer to the same pages",
        "│  └─ a backlog of its own  splice  pages move between pipes by reference",
        "│     └─ tcp://h:2 (connects), drop when slow  splice  pages move to the end by reference",
        "└─ null:  splice  pages are let go unseen",
    ]


def test_json_has_stable_keys() -> None:
    """The keys of the JSON form are a promise to scripts."""
    data = json.loads(json.dumps(drawing.as_data(make_plan(load_default(), PLAIN))))
    assert list(data) == ["engines", "needs", "limits", "calls", "routes", "confined"]
    (route,) = data["routes"]
    assert list(route) == [
        "name", "method", "crossing", "turns", "duplex", "streams", "waiting", "source", "chain", "holds", "needs",
        "back",
    ]  # fmt: skip
    assert list(route["source"]) == [
        "role", "kind", "name", "address", "verb", "method", "reason", "sure", "entry", "policy", "branch",
    ]  # fmt: skip
    assert list(route["crossing"]) == ["method", "reason", "chain_only", "measured"]
    assert list(route["holds"][0]) == ["who", "role", "policy", "seconds", "by", "then", "words"]
    assert list(route["needs"]) == ["standing", "stream", "subscriber", "at_limit"]
    assert list(data["needs"]) == ["descriptors", "pipes", "pipe_pages", "exact"]


@pytest.mark.parametrize(
    ("route", "says"),
    [
        (
            "source: 'tcp://:1', sink: 'tcp://a:2', stages: [tee: {to: 'tcp://b:2'}]",
            "a ring of memory is tried",
        ),
        ("source: 'tcp://:1', sink: 'tcp://a:2', method: copy", "through a ring of memory (asked for"),
        (
            "source: 'tcp://:1', sink: 'tcp://a:2', method: zero-copy",
            "down a chain (asked for by method: zero-copy)",
        ),
        ("source: 'tcp://:1', sink: 'tcp://a:2', stages: [meter]", "down a chain only (the stage 'meter'"),
        ("source: 'tcp://:1', sink: 'x.bin'", "down a chain only (a file is written by a thread"),
        (
            "source: 'tcp://:1', sink: {listen: 'tcp://:2'}",
            "down a chain only (a broadcast has a ring of its own)",
        ),
        ("source: 'x.bin', sink: 'tcp://a:2'", "down a chain only (a file straight to one socket"),
    ],
)
def test_the_plan_says_how_the_whole_stream_begins(route: str, says: str) -> None:
    """Each route's plan names the way its stream begins, whether another is tried, and why not."""
    text = drawing.as_text(planned(f"routes: {{r: {{{route}}}}}"))
    (line,) = [line for line in text.splitlines() if "as a whole" in line]
    assert says in line


def test_mermaid_labels_cannot_break_out() -> None:
    """Whatever a name holds, a label ends where its quote ends, and every edge joins two nodes that exist."""
    name = 'q"]; click x "javascript'
    text = drawing.as_mermaid(
        planned(
            f"routes: {{r: {{source: 'tcp://:1', sink: {{listen: 'tcp://:2'}}, stages: "
            f"[tee: {{name: '{name}', to: 'a#b<c>|{{id}}`', stages: [meter, tee: {{to: 'null:'}}]}}]}}}}"
        )
    )
    first, *lines = text.splitlines()
    assert first == "flowchart LR"
    nodes = set()
    edges = []
    for line in lines:
        if node := re.fullmatch(r'    (r\d+n\d+)(\(\[|\[)"[^"`<>|{}\[\]]*"(\]\)|\])', line):
            nodes.add(node[1])
        elif edge := re.fullmatch(r'    (r\d+n\d+) (?:-->|-\.->)\|"[a-z, ]+"\| (r\d+n\d+)', line):
            edges.append(edge.groups())
        else:
            assert re.fullmatch(r'  subgraph route\d+\["[^"]*"\]|  end', line), line
    assert {end for edge in edges for end in edge} == nodes
    assert len(edges) == len(nodes) - 1  # a tree


def test_every_hop_is_drawn_once() -> None:
    """Text and Mermaid show every hop that the plan has."""
    plan = make_plan(load_default(), PLAIN)
    every = [hop for route in plan.routes for hop in hops(route)]
    text, chart = drawing.as_text(plan), drawing.as_mermaid(plan)
    for hop in every:
        assert hop.choice.reason in text
        assert drawing.escaped(hop.address or hop.name) in chart
    assert len(re.findall(r"^ +r0n\d+[\[(]", chart, re.MULTILINE)) == len(every)


def test_what_has_no_limit_is_told_how_much_fits() -> None:
    """Without a limit on streams or subscribers the summary says how many more this machine has room for."""
    plan = make_plan(load_default(), replace(PLAIN, files=100))
    used = plan.total.descriptors
    (line,) = drawing.room(plan)
    assert line == f"inbox: subscribers have no limit; {100 - used} more fit (descriptors)"


def test_a_duplex_route_takes_two_descriptors_a_connection() -> None:
    """A duplex route is drawn as an edge both ways; what a connection needs is two descriptors and no pipe."""
    route = "{source: {listen: 'tcp://127.0.0.1:1', limits: {connections: 9}}, sink: 'tcp://127.0.0.1:2', duplex: true"
    made = planned(f"routes: {{r: {route}}}}}")
    (found,) = made.routes
    assert (found.stream.descriptors, found.stream.pipes) == (2, 0)
    assert found.source.choice.method == found.chain[0].choice.method == "splice"
    assert found.standing.at_most
    assert "<-->" in drawing.as_mermaid(made)
    assert "both ways" in drawing.as_text(made)
    copied = planned(f"routes: {{r: {route}, method: copy}}}}").routes[0]
    assert copied.source.choice.method == copied.chain[0].choice.method == "copy"
    assert copied.at_limit.descriptors == 1 + 9 * 2
    mixed = planned(
        f"routes: {{r: {route.replace('sink: ' + chr(39) + 'tcp://127.0.0.1:2', 'sink: ' + chr(39) + 'unix:///x')}}}}}"
    )
    assert (mixed.routes[0].source.choice.method, mixed.routes[0].chain[0].choice.method) == (
        "copy",
        "splice",
    )
    assert "copy, back splice" in drawing.as_mermaid(mixed)


STAGED = """
routes:
  r:
    source: {listen: "tcp://127.0.0.1:1", limits: {connections: 9}}
    duplex: true
    stages: [{tee: {to: "tcp://127.0.0.1:3", on_slow: drop}}]
    replies: [{throttle: 1MB/s}, {tee: {to: "tcp://127.0.0.1:4"}}]
    sink: {connect: ["tcp://127.0.0.1:2", "unix:///x"]}
"""


def test_a_duplex_route_with_stages_is_two_chains() -> None:
    """Each way has its hops, who holds it and whether it may go through a ring; drawn between the same two sockets."""
    made = planned(STAGED)
    (route,) = made.routes
    assert [hop.kind for hop in route.chain] == ["tee", "tcp"]
    assert route.back is not None
    assert [hop.kind for hop in route.back.chain] == ["throttle", "tee", "tcp"]
    held = {hold.who: hold.words for hold in route.holds}
    assert "holds the source until" in held["tcp://127.0.0.1:3"]
    assert "holds what the sink sends back, and with it everybody on that way" in held["tcp://127.0.0.1:4"]
    assert "holds what the sink sends back" in held["throttle"]
    text = drawing.as_text(made)
    assert "  and back:\none of 2 upstreams" in text
    assert "as a whole: down a chain only (the stage 'throttle' works on a chain)" in text
    (data,) = drawing.as_data(made)["routes"]
    assert data["back"]["chain"][0]["name"] == "throttle"
    assert list(data["back"]) == ["crossing", "source", "chain"]
    drawn = drawing.as_mermaid(made)
    assert drawn.count("tcp://127.0.0.1:1 (listens)") == 1
    assert drawn.count("<-.->") == 2
    assert (route.stream.descriptors, route.stream.pipes) == (2 + 2 + 2 * 7, 7)
    assert route.at_limit.descriptors == 1 + 9 * 18


def test_upstreams_are_drawn_below_their_sink() -> None:
    """Of a list of upstreams each is a hop, with how one is chosen in words; checks need a descriptor each."""
    sink = "{connect: ['tcp://127.0.0.1:2', 'unix:///x'], balance: first, tries: 2, health: {every: 5s, expect: x}}"
    made = planned(f"routes: {{r: {{source: 'tcp://127.0.0.1:1', duplex: true, sink: {sink}}}}}")
    text = drawing.as_text(made)
    assert "one of 2 upstreams (first, 2 tries, asked every 5 s)" in text
    assert "├─ tcp://127.0.0.1:2 (connects)" in text
    assert "└─ unix:///x (connects)" in text
    (route,) = drawing.as_data(made)["routes"]
    assert [hop["address"] for hop in route["chain"][0]["branch"]] == ["tcp://127.0.0.1:2", "unix:///x"]
    assert [hop["role"] for hop in route["chain"][0]["branch"]] == ["upstream", "upstream"]
    assert drawing.as_mermaid(made).count("<-.->") == 2
    plain = planned(
        "routes: {r: {source: 'tcp://127.0.0.1:1', duplex: true, sink: 'tcp://127.0.0.1:2'}}"
    ).routes[0]
    assert made.routes[0].standing.descriptors == plain.standing.descriptors + 2
    assert made.routes[0].stream.descriptors == 2
