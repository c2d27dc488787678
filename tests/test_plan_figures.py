"""The figures of a plan, held against real pipelines: descriptors, pipes, pages, methods."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
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
from relay.config.load import loads
from relay.config.models import Route
from relay.endpoints.broadcast import Broadcast
from relay.endpoints.digest import ALGORITHMS, new_digest
from relay.endpoints.make import make_source
from relay.endpoints.socket import SocketSource
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.kernel.pipe import F_GETPIPE_SZ
from relay.kernel.probe import machine
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.sinks import Making
from relay.planning.hops import hops
from relay.planning.plan import make_plan
from relay.spill.spills import Spills
from relay.stages.stage import Turn
from relay.ways import Ways


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
            on_over=self.records.append, making=Making(spill=partial(self.spills.sink, ways)),
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
