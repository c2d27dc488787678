"""Both ways across at work: real ends, each method, changes in mid-stream, and what they do to latencies."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from descriptors import Descriptors
from peers import (
    accept,
    assert_same,
    connected,
    payload,
    receive_all,
    receive_exactly,
    send_all,
    tcp_listener,
    unix_listener,
)
from relays import Relay, serving
from rig import Rig
from twins import Scatter, Spec

from relay.journal.record import SessionRecord
from relay.kernel import ring
from relay.pipeline import balance, crossing, experience

MIB = 1 << 20


@contextlib.contextmanager
def receivers(kinds: list[str], folder: Path) -> Iterator[tuple[list[str], list[Any]]]:
    """Addresses for sinks of these kinds, and for each who accepts or opens its far end."""
    with contextlib.ExitStack() as stack:
        addresses, opens = [], []
        for number, kind in enumerate(kinds):
            if kind == "fifo":
                path = folder / f"fifo{number}"
                os.mkfifo(path)
                addresses.append(f"fifo://{path}")
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                file = stack.enter_context(os.fdopen(fd, "rb", buffering=0))
                opens.append(lambda file=file: file)
                continue
            if kind == "tcp":
                listener, address = stack.enter_context(tcp_listener())
            else:
                listener, address = stack.enter_context(unix_listener(folder / f"unix{number}"))
            addresses.append(address)
            opens.append(lambda listener=listener: stack.enter_context(accept(listener)))
        yield addresses, opens


def route(addresses: list[str], **more: Any) -> dict[str, Any]:
    """From a listening source to all of them."""
    *tees, last = addresses
    stages = [{"tee": {"to": address}} for address in tees]
    return {"source": "tcp://127.0.0.1:0", "stages": stages, "sink": last, **more}


def take(end: Any, into: bytearray) -> None:
    """Everything until the end."""
    if isinstance(end, socket.socket):
        into += receive_all(end)
        return
    poll = select.poll()
    poll.register(end, select.POLLIN)
    while poll.poll(30_000):
        piece = end.read(MIB)
        if not piece:
            return
        into += piece


def carried(kinds: list[str], data: bytes, folder: Path, **more: Any) -> tuple[SessionRecord, list[bytes]]:
    """`data` through a relay to sinks of these kinds: the record, and what each got."""
    with receivers(kinds, folder) as (addresses, opens), Relay(route(addresses, **more)) as relay:
        with connected(relay.bound[-1]) as source:
            got = [bytearray() for _ in kinds]
            threads = [
                threading.Thread(target=take, args=(open_end(), each))
                for open_end, each in zip(opens, got, strict=True)
            ]
            for thread in threads:
                thread.start()
            send_all(source, data)
            source.shutdown(socket.SHUT_WR)
            record = relay.wait()
            for thread in threads:
                thread.join(30)
    assert record is not None
    return record, [bytes(each) for each in got]


@pytest.mark.parametrize("method", ["auto", "zero-copy", "copy"])
@pytest.mark.parametrize(
    "kinds", [["tcp"], ["unix"], ["fifo"], ["tcp", "tcp", "tcp", "tcp"], ["fifo", "unix", "tcp"]]
)
def test_every_method_delivers_and_says_so(tmp_path: Path, method: str, kinds: list[str]) -> None:
    """Whatever the method, every sink gets the stream whole, and the record tells how it crossed and why."""
    data = payload(1, 6 * MIB + 77)
    record, got = carried(kinds, data, tmp_path, method=method)
    for each in got:
        assert_same(each, data)
    assert record.result == "delivered"
    assert {sink.method for sink in record.sinks} == {"copy" if method == "copy" else "splice"}
    assert record.method == ("copy" if method == "copy" else "splice")
    assert record.why_method
    assert [sink.bytes for sink in record.sinks] == [len(data)] * len(kinds)


def test_without_a_ring_to_be_had_copying_goes_down_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all rings of an engine are out, `method: copy` copies through the chain, and nothing fails."""
    monkeypatch.setattr(ring, "MOST", 0)
    data = payload(2, 3 * MIB)
    record, got = carried(["tcp", "unix"], data, tmp_path, method="copy")
    assert record.method == "copy"
    for each in got:
        assert_same(each, data)


@pytest.mark.parametrize("kinds", [["tcp"], ["tcp", "tcp", "unix"], ["fifo", "tcp"]])
def test_the_way_changes_in_mid_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[str]
) -> None:
    """A stream that goes the other way every 200 KiB arrives as it was sent, and the record tells of both ways."""
    monkeypatch.setattr(crossing, "SETTLES", 100_000)
    monkeypatch.setattr(crossing, "OWN", 100_000)
    monkeypatch.setattr(balance, "TRIAL", 100_000)
    monkeypatch.setattr(crossing, "PATIENCE", 10.0)
    monkeypatch.setattr(crossing.Crossing._measure, "__defaults__", (100_000,))
    monkeypatch.setattr(balance.Balance, "next", lambda self, _fed: (self_other(self), 100_000))
    ways: dict[Any, str] = {}

    def self_other(which: balance.Balance) -> str:
        ways[id(which)] = "chain" if ways.get(id(which), which.way) == "ring" else "ring"
        return ways[id(which)]

    data = payload(3, 40 * MIB)
    record, got = carried(kinds, data, tmp_path)
    for each in got:
        assert_same(each, data)
    assert [sink.bytes for sink in record.sinks] == [len(data)] * len(kinds)
    assert sum(record.measured["bytes"].values()) == len(data)
    assert min(record.measured["bytes"].values()) > 0
    assert min(record.measured["samples"].values()) > 0
    assert set(record.measured["cpu_seconds_per_gib"]) == {"zero-copy", "copy"}


def test_auto_tries_the_other_way_and_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long stream has both ways measured: the record and its reason name both costs and the choice."""
    monkeypatch.setattr(balance, "SHARE", 0.5)
    monkeypatch.setattr(crossing, "PATIENCE", 10.0)
    data = payload(4, 8 * MIB) * 16
    record, got = carried(["tcp", "tcp"], data, tmp_path)
    for each in got:
        assert_same(each, data)
    assert "CPU-seconds per GiB" in record.why_method
    told = record.as_dict()["measured"]
    assert told["began"] == "zero-copy"
    assert told["way"] in ("zero-copy", "copy")
    assert all(cost > 0 for cost in told["cpu_seconds_per_gib"].values())


def test_a_trial_of_a_dear_way_ends_where_its_sample_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file, which always has more, no more than a sample and what settles before it go the way that costs."""
    monkeypatch.setattr(balance, "RARE", 0.05)
    monkeypatch.setattr(
        experience, "COPY", 1e9
    )  # however slow the machine is, references are not in question
    monkeypatch.setattr(crossing, "PATIENCE", 10.0)
    data = payload(7, 8 * MIB) * 32
    path = tmp_path / "source"
    path.write_bytes(data)
    with (
        receivers(["unix"], tmp_path) as (addresses, opens),
        Relay(route(addresses) | {"source": str(path)}) as relay,
    ):
        got = bytearray()
        take(opens[0](), got)
        record = relay.wait()
    assert record is not None
    assert_same(bytes(got), data)
    assert record.measured["began"] == "zero-copy"
    assert record.measured["samples"]["copy"] > 0
    most = balance.SETTLES + balance.TRIAL_DEAR + MIB // 2  # the last: a read that was under way
    assert record.measured["bytes"]["copy"] <= most * record.measured["samples"]["copy"]


def test_a_trial_that_cannot_end_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink that stalls and drops in mid-trial keeps the way from changing back: that is tried ever more rarely."""
    stops = threading.Event()
    tries: list[int] = []
    still, too_long = crossing.Crossing._still, crossing.Crossing._too_long

    def once(self: balance.Balance, fed: int) -> tuple[balance.Way, int]:
        return ("ring", 16 * MIB) if fed > 64 * MIB and not self.samples["ring"] else ("chain", balance.OWN)

    def changes(self: crossing.Crossing) -> None:
        still(self)
        if self.way == "ring":
            stops.set()

    def fails(self: crossing.Crossing) -> None:
        if self.way == "ring":
            tries.append(int(self._pipeline.fed))
        too_long(self)

    monkeypatch.setattr(crossing.Crossing, "_still", changes)
    monkeypatch.setattr(crossing.Crossing, "_too_long", fails)
    monkeypatch.setattr(balance.Balance, "next", once)
    monkeypatch.setattr(balance.Balance, "trial", 16 * MIB)
    piece = payload(8, 8 * MIB)
    slow = {"policy": "drop", "after": "100ms"}
    with receivers(["unix", "unix"], tmp_path) as (addresses, opens):
        stages = [{"tee": {"to": addresses[0], "on_slow": slow}}]
        with Relay({**route(addresses), "stages": stages}) as relay, connected(relay.bound[-1]) as source:
            stalls, reads = opens[0](), opens[1]()

            def read_until_told() -> None:
                while not stops.is_set() and stalls.recv(MIB):
                    pass

            reader = threading.Thread(target=read_until_told)
            reader.start()
            feeder = threading.Thread(target=lambda: [send_all(source, piece) for _ in range(64)])
            feeder.start()
            for _ in range(64):
                assert_same(receive_exactly(reads, len(piece)), piece)
            feeder.join(30)
            reader.join(30)
            source.shutdown(socket.SHUT_WR)
            receive_all(stalls)
            record = relay.wait()
    assert record is not None
    assert record.sinks[0].dropped > 0
    assert tries, "the change back was never in the way of anybody"
    assert len(tries) < 16
    assert record.measured["samples"]["copy"] == 1


def test_a_way_that_was_tried_and_taken_is_no_trial_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the way that is tried is in force its reads are whole, however dear the one before is known to be."""
    measures: list[tuple[bool, int]] = []
    measure, told = crossing.Crossing._measure, balance.Balance.measured

    def noted(
        self: crossing.Crossing, size: int, skip: int = balance.SETTLES, *, counts: bool = True
    ) -> None:
        measure(self, size, skip, counts=counts)
        if self._experience is not None:
            measures.append((self.way == self._experience.balance.way, int(self._pipeline.brief)))

    def taken(self: balance.Balance, way: balance.Way, cost: float) -> None:
        if not self.changes:
            told(self, way, cost)
        if way == "ring" and not self.changes:
            self.take("ring", 8.0)

    monkeypatch.setattr(crossing.Crossing, "_measure", noted)
    monkeypatch.setattr(balance.Balance, "measured", taken)
    monkeypatch.setattr(balance, "RARE", 0.05)
    monkeypatch.setattr(
        experience, "COPY", 1e9
    )  # however slow the machine is, references are not in question
    monkeypatch.setattr(balance, "REST", 0)
    monkeypatch.setattr(crossing, "PATIENCE", 10.0)
    data = payload(9, 8 * MIB) * 32
    record, got = carried(["unix"], data, tmp_path)
    assert_same(got[0], data)
    assert record.measured["way"] == "copy"
    assert (False, 1) in measures
    assert {brief for own, brief in measures if own} == {0}
    assert measures[-1] == (True, 0)


def test_a_sink_that_drops_out_of_a_ring_counts_every_byte(tmp_path: Path) -> None:
    """Delivered and dropped are received, the gaps whole pieces; the sink beside it gets everything."""
    data = payload(5, 48 * MIB)
    slow = {"policy": "drop", "after": "20ms", "align": 188}
    with receivers(["tcp", "tcp"], tmp_path) as (addresses, opens):
        stages = [{"tee": {"to": addresses[0], "on_slow": slow}}]
        made = {**route(addresses), "stages": stages, "method": "copy"}
        with Relay(made) as relay, connected(relay.bound[-1]) as source:
            stalled, quick = opens[0](), opens[1]()
            feeder = threading.Thread(target=send_all, args=(source, data))
            feeder.start()
            assert_same(receive_exactly(quick, len(data)), data)
            feeder.join(30)
            source.shutdown(socket.SHUT_WR)
            got = receive_all(stalled)
            record = relay.wait()
    assert record is not None
    (behind, _) = record.sinks
    assert behind.dropped > 0
    assert behind.bytes == len(got)
    assert behind.bytes + behind.dropped == len(data)


def test_a_sink_that_dies_leaves_the_others_alone(tmp_path: Path) -> None:
    """A receiver that resets fails by itself: what it did not get counts as dropped, the other gets the stream."""
    data = payload(6, 32 * MIB)
    with receivers(["tcp", "tcp"], tmp_path) as (addresses, opens):
        with Relay(route(addresses, method="copy")) as relay, connected(relay.bound[-1]) as source:
            dies, lives = opens[0](), opens[1]()
            send_all(source, data[:MIB])
            receive_exactly(dies, 1000)
            dies.close()
            feeder = threading.Thread(target=send_all, args=(source, data[MIB:]))
            feeder.start()
            assert_same(receive_exactly(lives, len(data)), data)
            feeder.join(30)
            source.shutdown(socket.SHUT_WR)
            receive_all(lives)
            record = relay.wait()
    assert record is not None
    (dead, alive) = record.sinks
    assert (dead.result, alive.result, alive.bytes) == ("failed", "delivered", len(data))
    assert dead.bytes + dead.dropped == len(data)


def test_streams_that_take_turns_go_through_a_ring_each(tmp_path: Path) -> None:
    """On a standing pipeline sinks that stay get every turn's stream, and each record counts its own."""
    turns = [payload(10 + number, 3 * MIB + number) for number in range(4)]
    with tcp_listener() as (one, first), tcp_listener() as (two, second):
        config = (
            'routes: {r: {source: {listen: "tcp://127.0.0.1:0", connections: one}, method: copy, '
            f'stages: [{{tee: {{to: "{first}"}}}}], sink: "{second}"}}}}'
        )
        with serving(config, tmp_path) as served, accept(one) as near, accept(two) as far:
            (address,) = served.addresses(1)
            for number, data in enumerate(turns, 1):
                with connected(address) as source:
                    send_all(source, data)
                    source.shutdown(socket.SHUT_WR)
                    for end in (near, far):
                        assert_same(receive_exactly(end, len(data)), data)
                record = served.sessions(number)[-1]
                assert (record["bytes"], record["method"]) == (len(data), "copy")
                assert [sink["bytes"] for sink in record["sinks"]] == [len(data)] * 2


# -- nothing is held back for long


@pytest.mark.parametrize("method", ["zero-copy", "copy"])
@pytest.mark.parametrize("size", [1, 512, 65536, 700_000])
def test_no_message_waits_for_a_timer(tmp_path: Path, method: str, size: int) -> None:
    """Of messages that are sent one by one, each when the last has arrived everywhere, none is 40 or 200 ms late."""
    data = payload(7, size)
    times = []
    with receivers(["tcp", "tcp"], tmp_path) as (addresses, opens):
        with Relay(route(addresses, method=method)) as relay, connected(relay.bound[-1]) as source:
            ends = [open_end() for open_end in opens]
            for _ in range(300 if size < MIB // 2 else 60):
                began = time.monotonic()
                send_all(source, data)
                for end in ends:
                    assert len(receive_exactly(end, size)) == size
                times.append(time.monotonic() - began)
            source.shutdown(socket.SHUT_WR)
            relay.wait()
    times.sort()
    assert times[len(times) // 2] < 0.02, f"the median is {times[len(times) // 2]:.4f} s"
    assert times[len(times) * 9 // 10] < 0.035, (
        f"a tenth takes longer than {times[len(times) * 9 // 10]:.4f} s"
    )


def test_the_tail_of_a_rush_leaves_by_itself(tmp_path: Path) -> None:
    """When a fast stream stops in the middle, with neither end nor another byte, everybody has all of it at once."""
    data = payload(8, 24 * MIB + 12345)
    with receivers(["tcp", "tcp"], tmp_path) as (addresses, opens):
        with Relay(route(addresses, method="copy")) as relay, connected(relay.bound[-1]) as source:
            ends = [open_end() for open_end in opens]
            feeder = threading.Thread(target=send_all, args=(source, data))
            feeder.start()
            both = [bytearray(), bytearray()]
            threads = [
                threading.Thread(target=lambda i=i: both[i].extend(receive_exactly(ends[i], len(data))))
                for i in (0, 1)
            ]
            for thread in threads:
                thread.start()
            for thread in [feeder, *threads]:
                thread.join(30)
            for each in both:
                assert_same(bytes(each), data)
            source.shutdown(socket.SHUT_WR)
            relay.wait()


REAL = Scatter(
    full=7 << 19, reserve=1 << 19, batch=ring.BATCH, hold=ring.HOLD, quick=ring.QUICK, least=ring.LEAST
)


def pair(fds: Descriptors, scatter: Scatter) -> Rig:
    """Two sinks that read a ring."""
    spec = Spec("tee", sink_slots=256)
    rig = Rig(fds, [spec, spec], source_slots=256, scatter=scatter)
    rig.change()
    rig.sweep()
    assert rig.changes == 1
    return rig


@pytest.mark.parametrize("size", [1, 64, 4096, 65536, 500_000])
def test_requests_and_answers_pay_no_tax(fds: Descriptors, size: int) -> None:
    """Each message is given out in the sweep that reads it, but for a few that looked like the middle of a rush."""
    rig = pair(fds, REAL)
    held = 0
    count = 200 if size > 4096 else 400
    for _ in range(count):
        rig.feed(size, size)
        rig.sweep()
        if rig.model.ring and rig.model.ring.held:
            held += 1
            assert rig.model.wake
            rig.later(ring.HOLD)
            rig.sweep()
        for outlet in rig.outlets:
            assert rig.read(outlet, MIB) == size
        rig.later(50_000)  # the answer is on its way
    assert held <= 6


def test_a_rush_goes_out_in_batches_and_its_tail_in_time(fds: Descriptors) -> None:
    """While more is coming no send is smaller than a batch; what is left when none comes waits its time at most."""
    rig = pair(fds, dataclass_replace(REAL, batch=200_000, quick=1, least=100_000, hold=10**9))
    chance = random.Random(1)
    sizes = []
    for _ in range(300):
        rig.feed(chance.randrange(20_000, 60_000), 65536)
        before = rig.outlets[0].c.moved
        rig.sweep()
        if rig.outlets[0].c.moved > before:
            sizes.append(rig.outlets[0].c.moved - before)
        for outlet in rig.outlets:
            rig.read(outlet, MIB)
        rig.later(1000)
    rushing = sizes[5:]
    assert len(rushing) > 20
    assert sum(size < 200_000 for size in rushing) <= len(rushing) // 10
    rig.feed(1000, 1000)
    rig.sweep()
    assert rig.model.wake
    rig.later(10**9)
    rig.sweep()
    assert rig.outlets[0].c.moved == rig.source.moved


def dataclass_replace(scatter: Scatter, **more: int) -> Scatter:
    """`scatter` with other figures."""
    return Scatter(**{**scatter.__dict__, **more})


def test_a_clogged_sink_does_not_spin(fds: Descriptors) -> None:
    """With a ring that is full a sweep asks the kernel for nothing and sets no timer, however often it comes."""
    rig = Rig(
        fds,
        [Spec("tee", sink_slots=1), Spec("tee", sink_slots=256)],
        source_slots=256,
        scatter=Scatter(60_000),
    )
    rig.change()
    rig.sweep()
    for _ in range(6):
        rig.feed(MIB)
        rig.sweep()
        rig.read(rig.outlets[1], MIB)
    calls, wakes = rig.engine.calls, []
    for _ in range(100):
        rig.sweep()
        wakes.append(int(rig.model.wake))
    assert rig.engine.calls == calls
    assert not any(wakes)
