"""Plans: methods and reasons, who can hold whom, and figures that are held against real pipelines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from descriptors import Descriptors

from relay import needs
from relay.config.load import load_default, loads
from relay.config.models import Route
from relay.endpoints.broadcast import Broadcast
from relay.endpoints.digest import ALGORITHMS, new_digest
from relay.endpoints.make import make_source
from relay.endpoints.socket import SocketSource
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.kernel.pipe import F_GETPIPE_SZ
from relay.kernel.probe import Machine, machine
from relay.pipeline.pipeline import Pipeline
from relay.planning import drawing
from relay.planning.hops import RoutePlan, hops
from relay.planning.plan import Plan, make_plan
from relay.spill.spills import Spills
from relay.stages.stage import Turn
from relay.ways import Ways

PLAIN = Machine(cpus=2)


def planned(text: str, here: Machine = PLAIN) -> Plan:
    """The plan of the configuration `text` on a machine that is described, not looked at."""
    return make_plan(loads(text), here)


def planned_route(body: str, here: Machine = PLAIN) -> RoutePlan:
    """The plan of one route in flow style."""
    return planned(f"routes: {{r: {{{body}}}}}", here).routes[0]


def words(route: RoutePlan) -> dict[str, str]:
    """Who holds the source, and how."""
    return {hold.who: hold.words for hold in route.holds}


# -- methods and reasons


def test_every_hop_has_a_method_and_a_reason() -> None:
    """A route's tree names, hop by hop, how bytes leave it and why."""
    route = planned_route("source: 'tcp://:1', stages: [meter, tee: {to: f}, checksum], sink: 'tcp://h:2'")
    assert [(hop.role, hop.kind, hop.choice.method) for hop in hops(route)] == [
        ("source", "tcp", "splice"),
        ("stage", "meter", "splice"),
        ("stage", "tee", "tee"),
        ("sink", "file", "splice"),
        ("stage", "checksum", "tee"),
        ("sink", "digest", "copy"),
        ("sink", "tcp", "splice"),
    ]
    assert all(hop.choice.reason for hop in hops(route))


@pytest.mark.parametrize(
    ("body", "method"),
    [
        ("source: f, sink: 'tcp://h:1'", "sendfile"),
        ("source: f, sink: {connect: 'tcp://h:1', on_slow: drop}", "splice"),
        ("source: f, stages: [meter], sink: 'tcp://h:1'", "splice"),
        ("source: f, sink: {listen: 'tcp://:1'}", "splice"),
        ("source: f, sink: g", "splice"),
        ("source: f, sink: 'tcp://h:1', method: copy", "copy"),
    ],
)
def test_a_file_goes_straight_to_one_socket(body: str, method: str) -> None:
    """sendfile is for a file and one socket with nothing between, and no subscribers to come."""
    assert planned_route(body).source.choice.method == method


def test_what_copies_says_why() -> None:
    """A forced method, a refused call and a file that is appended to are copied, with the reason."""
    forced = planned_route("source: 'tcp://:1', stages: [tee: {to: f}], sink: 'tcp://h:2', method: copy")
    assert {hop.choice.method for hop in hops(forced)} == {"copy"}
    assert {hop.choice.reason for hop in hops(forced)} == {"asked for by method: copy"}
    refused = planned_route("source: 'tcp://:1', sink: 'tcp://h:2'", replace(PLAIN, splice=errno.ENOSYS))
    assert [hop.choice.reason for hop in hops(refused)] == ["splice is refused here (ENOSYS)"] * 2
    appended = planned_route("source: 'tcp://:1', sink: {file: f, append: true}").chain[0].choice
    assert appended.method == "copy"
    assert "append" in appended.reason


def test_what_only_opening_tells_is_not_sure() -> None:
    """stdin, stdout and inherited descriptors may turn out to be terminals: the plan says so."""
    route = planned_route("source: '-', stages: [tee: {to: 'fd://5'}], sink: 'null:'")
    assert [hop.sure for hop in hops(route)] == [False, True, False, True]
    assert "known when it is opened" in drawing.as_text(planned("routes: {a: {source: '-', sink: x}}"))


# -- who can hold whom


def test_a_sink_that_blocks_holds_everybody() -> None:
    """block says that the source and everybody else wait, and after which time relay warns."""
    said = words(
        planned_route("source: 'tcp://:1', sink: {connect: 'tcp://h:2', on_slow: {policy: block, after: 3s}}")
    )
    assert said["tcp://h:2"] == (
        "holds the source, and with it everybody on the route, for as long as it is slow; "
        "after 3 s relay warns"
    )


def test_other_policies_let_go_in_time() -> None:
    """drop and disconnect hold until their time has passed, by their defaults 200 ms and 5 s."""
    route = planned_route(
        "source: 'tcp://:1', stages: [tee: {name: d, to: 'tcp://h:2', on_slow: drop}], sink: {listen: 'tcp://:3'}"
    )
    assert [(hold.who, hold.seconds, hold.then) for hold in route.holds] == [
        ("d", 0.2, "drop"),
        ("each subscriber of tcp://:3", 5.0, "disconnect"),
    ]
    assert "until its backlog of" in words(route)["d"]


def test_a_branchs_policy_covers_all_that_is_in_it() -> None:
    """What blocks inside a branch holds the source only until the branch's own policy lets go."""
    inner = "tee: {name: in, to: f}"
    route = planned_route(
        "source: 'tcp://:1', sink: 'null:', stages: [tee: {name: out, to: 'tcp://h:2', "
        f"stages: [throttle: 1MB/s, {inner}], on_slow: {{policy: drop, after: 2s}}}}]"
    )
    held = {hold.who: (hold.seconds, hold.by, hold.then) for hold in route.holds}
    assert held["throttle"] == held["in"] == (2.0, "out", "drop")
    assert held["null:"][0] is None
    blocking = planned_route(
        "source: 'tcp://:1', sink: 'null:', stages: [tee: {to: f, stages: [throttle: 1MB/s]}]"
    )
    assert (
        words(blocking)["throttle"] == "holds the source to 976.6 KiB/s, and with it everybody on the route"
    )


# -- figures, held against reality


def open_now() -> set[int]:
    """The descriptors of this process."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that listed the directory
            os.fstat(int(entry.name))
            found.add(int(entry.name))
    return found


def opened_since(before: set[int]) -> needs.Need:
    """What this process has open now and had not: descriptors, pipes and their pages."""
    new = open_now() - before
    pages = {}
    for fd in new:
        status = os.fstat(fd)
        if stat.S_ISFIFO(status.st_mode):
            pages[status.st_dev, status.st_ino] = fcntl.fcntl(fd, F_GETPIPE_SZ) // needs.PAGE
    return needs.Need(len(new), len(pages), sum(pages.values()))


class Bench:
    """One route at work on an engine that the test turns itself; owns all of it."""

    def __init__(self, route: Route, ways: Ways, client: socket.socket | None) -> None:
        self.before = open_now()
        self.engine = Engine("bench")
        self.records: list[SessionRecord] = []
        self.spills = Spills()
        self.broadcasts: dict[int, Broadcast] = {
            id(sink): Broadcast(self.engine, str(sink.address)) for _, sink in route.sinks() if sink.listen
        }
        self.engine_need = opened_since(self.before)
        self.before |= open_now()
        self.pipeline = Pipeline(
            self.engine, "r", route.stages, route.sink, ways,
            persistent=route.turns() == "one" and route.source.verb == "listen",
            on_over=self.records.append, spill=partial(self.spills.sink, ways),
        )  # fmt: skip
        self.pipeline.open(self.broadcasts)
        if client is not None:
            source: Any = SocketSource(
                self.engine, "tcp://x", socket.fromfd(client.fileno(), client.family, client.type), "p"
            )
        else:
            source = make_source(self.engine, route.source.address)
        source.on_open = lambda: None
        source.open()
        self.pipeline.begin(source, Turn("r", "1", "t", "p", "n"))

    def turn_until(self, condition: Any) -> None:
        """Turns the engine until `condition()`; a test's timeout ends what never comes."""
        while not condition():
            self.engine.turn(0.02)

    def all_open(self) -> bool:
        """Whether every sink stands and is open."""
        return all(o.sink is not None and o.sink.state == "open" for o in self.pipeline.chain.outlets)

    def close(self) -> None:
        """Ends the stream, waits for the threads of ferries and logs, closes the engines."""
        self.pipeline.abort("the test is over")
        self.pipeline.close()
        self.turn_until(lambda: not any("-ferry" in thread.name for thread in threading.enumerate()))
        self.spills.close()
        for _ in range(3):  # what the threads posted, and what that posts
            self.engine.turn(0)
        self.engine.close()


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_loaded() -> None:
    """A digest loads its library on a thread: while it does, its files are open, and no part of the figures."""
    for algorithm in ALGORITHMS:
        new_digest(algorithm)


@pytest.fixture
def places(tmp_path: Path, fds: Descriptors) -> Iterator[dict[str, str]]:
    """Peers for every kind of end: a tcp and a unix listener, fifos, a sparse file, a directory."""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        for sock, place in ((tcp, ("127.0.0.1", 0)), (unix, str(tmp_path / "s"))):
            sock.bind(place)
            sock.listen(64)
        os.mkfifo(tmp_path / "read")
        fds.open(tmp_path / "read", os.O_RDONLY | os.O_NONBLOCK)
        with open(tmp_path / "large", "wb") as file:
            file.truncate(64 << 20)
        yield {
            "tcp": f"'tcp://127.0.0.1:{tcp.getsockname()[1]}'",
            "unix": f"'unix://{tmp_path}/s'",
            "fifo": f"'fifo://{tmp_path}/read'",
            "waits": f"'fifo://{tmp_path}/waits'",
            "large": f"'{tmp_path}/large'",
            "dir": str(tmp_path),
        }


SHAPES = {
    "nothing between": "source: 'tcp://:0', sink: %(tcp)s",
    "unix, dropping": "source: 'tcp://:0', sink: {connect: %(unix)s, on_slow: drop}",
    "a file": "source: 'tcp://:0', sink: '%(dir)s/{id}'",
    "a file with a sidecar": "source: 'tcp://:0', sink: {file: '%(dir)s/{id}', sidecar: true}",
    "a file in place, appended": "source: 'tcp://:0', sink: {file: '%(dir)s/one', append: true}",
    "a fifo": "source: 'tcp://:0', sink: %(fifo)s",
    "from a fifo": "source: %(waits)s, sink: %(tcp)s",
    "a large file": "source: %(large)s, sink: %(tcp)s",
    "stages": "source: 'tcp://:0', stages: "
    "[meter, throttle: 1MB/s, limit: {skip: 1}, header: {text: x}], sink: 'null:'",
    "checksums": "source: 'tcp://:0', stages: [checksum, checksum: xxh3], sink: %(tcp)s",
    "branches": "source: 'tcp://:0', sink: 'null:', stages: "
    "[tee: {to: %(tcp)s}, tee: {to: %(unix)s, on_slow: drop}, "
    "tee: {to: '%(dir)s/{id}', on_slow: disconnect}]",
    "branches in branches": "source: 'tcp://:0', sink: '%(dir)s/{id}', stages: "
    "[tee: {to: 'null:', on_slow: drop, stages: [meter, tee: {to: {file: '%(dir)s/b{id}', sidecar: xxh3}}]}]",
    "a broadcast": "source: 'tcp://:0', stages: [tee: {to: '%(dir)s/{id}'}], sink: {listen: 'tcp://:0'}",
    "a broadcast in a branch": "source: 'tcp://:0', stages: "
    "[tee: {to: {listen: 'tcp://:0'}, stages: [meter]}], sink: %(tcp)s",
    "32 branches": "source: 'tcp://:0', sink: 'null:', stages: [" + "tee: {to: 'null:'}, " * 32 + "]",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_figures_are_those_of_a_real_pipeline(
    shape: str, places: dict[str, str], fds: Descriptors
) -> None:
    """Descriptors, pipes and pipe pages of a stream and of its engine are exactly what the plan says."""
    config = loads(f"routes: {{r: {{{SHAPES[shape] % places}}}}}")
    route, here = config.routes["r"], machine()
    plan = make_plan(config, here).routes[0]
    client = fds.unix_pair()[0] if route.source.listen else None
    bench = Bench(route, Ways(here), client)
    try:
        bench.turn_until(bench.all_open)
        assert opened_since(bench.before) == plan.stream
        assert bench.engine_need == needs.ENGINE
    finally:
        bench.close()


def test_the_figures_of_a_subscriber_are_real(places: dict[str, str], fds: Descriptors) -> None:
    """Each subscriber takes its socket and nothing else, exactly as planned."""
    config = loads(f"routes: {{r: {{{SHAPES['a broadcast'] % places}}}}}")
    plan = make_plan(config, machine()).routes[0]
    bench = Bench(config.routes["r"], Ways(machine()), fds.unix_pair()[0])
    try:
        bench.turn_until(bench.all_open)
        before = open_now()
        (broadcast,) = bench.broadcasts.values()
        for _ in range(3):
            near, far = socket.socketpair()
            fds.keep(far.detach())
            broadcast.joined(near, "p")
        peers = needs.Need(3)
        assert plan.subscriber is not None
        bench.turn_until(lambda: len(bench.pipeline.subscribers[0].members) == 3)
        assert opened_since(before) == plan.subscriber.times(3) + peers
    finally:
        bench.close()


@pytest.mark.parametrize("where", ["", "directory: '%(dir)s/spill', "])
def test_a_spills_figures_are_real(where: str, places: dict[str, str], fds: Descriptors) -> None:
    """Pipes and pages of a log with its reader are those planned; descriptors grow with its segments."""
    slow = "on_slow: {policy: spill, " + where + "max: 16MiB}"
    body = (
        "source: 'tcp://:0', sink: {connect: %(tcp)s, " + slow + "}, "
        "stages: [tee: {to: %(unix)s, stages: [meter, throttle: 1GB/s], " + slow + "}]"
    )
    config = loads(f"routes: {{r: {{{body % places}}}}}")
    plan = make_plan(config, machine()).routes[0]
    assert [hop.kind for hop in hops(plan) if hop.role == "log"] == ["disk" if where else "memory"] * 2
    bench = Bench(config.routes["r"], Ways(machine()), fds.unix_pair()[0])
    try:
        most = plan.stream + (plan.standing if where else needs.NOTHING)

        def delivering() -> bool:
            real = opened_since(bench.before)
            return (real.pipes, real.pages) == (most.pipes, most.pages)

        bench.turn_until(delivering)
        segments = 6 if where else 22  # of both logs, that are not there yet
        assert most.descriptors - segments <= opened_since(bench.before).descriptors <= most.descriptors
        assert most.at_most
    finally:
        bench.close()


@pytest.mark.parametrize("kind", ["pipe", "file", "socket", "null"])
def test_inherited_descriptors_stay_within_the_figures(kind: str, tmp_path: Path, fds: Descriptors) -> None:
    """What an inherited descriptor is decides what it takes; the plan's figure is the most, and says so."""
    fd = {
        "pipe": lambda: fds.pipe().w,
        "file": lambda: fds.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT),
        "socket": lambda: fds.unix_pair()[0].fileno(),
        "null": lambda: fds.open("/dev/null", os.O_WRONLY),
    }[kind]()
    config = loads(f"routes: {{r: {{source: 'tcp://:0', sink: {{fd: {fd}}}}}}}")
    plan = make_plan(config, machine()).routes[0]
    assert plan.stream.at_most
    bench = Bench(config.routes["r"], Ways(machine()), fds.unix_pair()[0])
    try:
        bench.turn_until(bench.all_open)
        real = opened_since(bench.before)
        assert real.descriptors <= plan.stream.descriptors
        assert real.pages <= plan.stream.pages
        if kind == "file":
            assert (real.descriptors, real.pages) == (plan.stream.descriptors, plan.stream.pages)
    finally:
        bench.close()


@pytest.mark.parametrize("refused", ["", "tee", "splice"])
@pytest.mark.parametrize("method", ["auto", "copy"])
def test_the_methods_are_those_of_a_real_pipeline(
    method: str, refused: str, places: dict[str, str], fds: Descriptors
) -> None:
    """The record of a finished stream names the methods that the plan chose, for the source and each sink."""
    body = (
        f"method: {method}, source: {{listen: 'tcp://:0', connections: each}}, "
        + "sink: {file: '%(dir)s/{id}', sidecar: true}, stages: ["
        "tee: {name: a, to: 'null:'}, tee: {name: b, to: 'null:', on_slow: drop}, checksum,"
        " tee: {name: c, to: {file: '%(dir)s/c', append: true}},"
        " tee: {name: d, to: 'fifo://%(dir)s/read', stages: [meter]}]"
    )
    config = loads(f"routes: {{r: {{{body % places}}}}}")
    here = replace(machine(), **{refused: errno.EPERM}) if refused else machine()
    plan = make_plan(config, here).routes[0]
    near, far = fds.unix_pair()
    bench = Bench(config.routes["r"], Ways(here, config.routes["r"].method), near)
    try:
        near.close()
        far.send(b"relay" * 1000)
        far.shutdown(socket.SHUT_WR)
        bench.turn_until(lambda: bench.records)
    finally:
        bench.close()
    (record,) = bench.records
    assert record.result == "delivered"
    assert record.method == plan.source.choice.method
    chosen = {
        hop.name: hop.choice.method for hop in hops(plan) if hop.role == "sink" and hop.kind != "digest"
    }
    assert {sink.sink: sink.method for sink in record.sinks} == chosen


def test_limits_of_connections_multiply() -> None:
    """A route with a limit is planned at it: so many streams, or one stream and the rest waiting."""
    each = planned_route("source: {listen: 'tcp://127.0.0.1:1', limits: {connections: 7}}, sink: 'tcp://h:1'")
    assert (each.turns, each.streams, each.waiting) == ("each", 7, 0)
    assert each.at_limit == each.standing + each.stream.times(7)
    one = planned_route("source: {listen: 'tcp://127.0.0.1:1', limits: {connections: 7}}, sink: f")
    assert (one.turns, one.streams, one.waiting) == ("one", 1, 6)
    assert one.at_limit == one.standing + one.stream + needs.Need(6)
    unlimited = planned_route("source: {listen: 'tcp://127.0.0.1:1'}, sink: 'tcp://h:1'")
    assert unlimited.streams is None
    assert unlimited.at_limit == unlimited.standing + unlimited.stream


def test_pages_follow_what_the_machine_grants() -> None:
    """An unprivileged user's pipes are no larger than pipe-max-size, in halving steps down to 64 KiB."""
    assert needs.granted(1 << 20, PLAIN) == 1 << 20
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=1 << 18)) == 1 << 18
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=4096 * 20)) == 65536
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=8192)) == 8192
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=4096, privileged=True)) == 1 << 20


# -- drawings


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
