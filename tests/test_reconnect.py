"""Sinks and sources that go away and come back, on loopback: what is lost is counted, what is not is not."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance import connected, reset
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    refused_address,
    send_all,
    tcp_listener,
    unix_listener,
    wait_for,
)
from relays import Process, serving, working_threads

from relay.backoff import Backoff
from relay.config.data import from_data
from relay.endpoints import tcp
from relay.endpoints.address import Address
from relay.endpoints.connecting import Connecting, connected_to_itself
from relay.endpoints.liveness import TcpState, keepalive
from relay.endpoints.socket import unacknowledged
from relay.endpoints.tcp import TcpSink
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.serving.route import RunningRoute


def standing(sink: str, stages: str = "[]", more: str = "") -> str:
    """A route whose connections take turns on one pipeline."""
    return f"""
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: one}}
    stages: {stages}
    sink: {sink}
    {more}
"""


def source_of(served: Process, number: int = 0) -> socket.socket:
    """A connection to relay's source."""
    return socket.create_connection(("127.0.0.1", served.port(number)))


def end(sock: socket.socket) -> None:
    """Ends the stream and waits until relay has closed: the turn is over."""
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        assert receive_all(sock) == b""
    sock.close()


def listening_at(port: int) -> socket.socket:
    """A listener at a port that was free a moment ago."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(8)
    return sock


# --- sinks ------------------------------------------------------------------------------------------------


def test_a_reset_while_idle_is_noticed_at_once(tmp_path: Path) -> None:
    """Nothing flows when the sink's peer resets: it is away there and then, and what comes later loses nothing."""
    with tcp_listener() as (listener, address), serving(standing(f"'{address}'"), tmp_path) as served:
        first = accept(listener)
        with source_of(served) as source:
            send_all(source, b"before")
            assert receive_exactly(first, 6) == b"before"
            reset(first)
            away = served.said("is away")
            with accept(listener) as second:
                send_all(source, b"after")
                assert receive_exactly(second, 5) == b"after"
                end(source)
        (record,) = served.sessions()
    assert "ECONNRESET" in away["message"]
    (sink,) = record["sinks"]
    assert (sink["result"], sink["reconnects"], sink["bytes"]) == ("delivered", 1, 11)
    assert sink["lost"] == 0


def test_what_a_broken_connection_had_is_counted(tmp_path: Path) -> None:
    """Under block a standing sink rejoins where the pipe is: received before and after, and lost, are all there was."""
    data = payload(1, 8 << 20)
    with (
        tcp_listener() as (listener, address),
        serving(standing(f"'{address}'"), tmp_path) as served,
        accept(listener) as first,
        source_of(served) as source,
    ):
        feeder = threading.Thread(target=send_all, args=(source, data))
        feeder.start()
        got = receive_exactly(first, 1 << 20)
        served.said("it holds the source")
        reset(first)
        with accept(listener) as second:
            rest = receive_exactly(second, 1 << 20)
            feeder.join(PATIENCE)
            source.shutdown(socket.SHUT_WR)
            (record,) = _sessions_while_reading(served, second, rest_of := bytearray(rest))
    (sink,) = record["sinks"]
    assert_same(got, data[: len(got)])
    assert_same(bytes(rest_of), data[len(data) - len(rest_of) :])
    assert sink["reconnects"] == 1
    # what the first peer's kernel had acknowledged and nobody read is beyond a raw stream's reach
    assert 0 < sink["lost"] <= len(data) - len(got) - len(rest_of)
    assert sink["bytes"] == len(data)
    assert record["result"] == "failed"


def _sessions_while_reading(served: Process, sock: socket.socket, got: bytearray) -> list[dict[str, Any]]:
    """The first session, while a thread keeps reading `sock` into `got`."""
    stop, wake = os.pipe()

    def read() -> None:
        waiter = select.poll()
        waiter.register(sock, select.POLLIN)
        waiter.register(stop, select.POLLIN | select.POLLHUP)
        while True:
            ready = {fd for fd, _ in waiter.poll(PATIENCE * 1000)}
            if sock.fileno() in ready:
                got.extend(sock.recv(1 << 20))
            elif stop in ready or not ready:
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        return served.sessions()
    finally:
        os.close(wake)
        reader.join(PATIENCE)
        os.close(stop)


def test_a_sink_that_is_down_holds_the_source_under_block(tmp_path: Path) -> None:
    """Nobody listens at first: block holds the source, says so, and every byte arrives once somebody does."""
    data = payload(2, 4 << 20)
    address = refused_address()
    with serving(standing(f"'{address}'"), tmp_path) as served, source_of(served) as source:
        feeder = threading.Thread(target=send_all, args=(source, data))
        feeder.start()
        said = served.said("it holds the source")
        assert "is away" in said["message"]
        with listening_at(Address.parse(address).port) as listener, accept(listener) as sink:
            assert_same(receive_exactly(sink, len(data)), data)
            feeder.join(PATIENCE)
            end(source)
            (record,) = served.sessions()
    (said,) = record["sinks"]
    assert (said["result"], said["bytes"]) == ("delivered", len(data))
    assert said["blocked_seconds"] > 0.5


@pytest.mark.parametrize("policy", ["drop", "disconnect"])
def test_a_sink_that_is_down_holds_nobody_for_longer_than_after(tmp_path: Path, policy: str) -> None:
    """Under drop and disconnect the others get all, the turn ends without it, and the record counts what it missed."""
    data = payload(3, 8 << 20)
    stages = f"[tee: {{to: '{refused_address()}', on_slow: {{policy: {policy}, after: 100ms}}}}]"
    with (
        tcp_listener() as (listener, address),
        serving(standing(f"'{address}'", stages), tmp_path) as served,
        accept(listener) as sink,
    ):
        missed = 0
        for turn in (1, 2):
            with source_of(served) as source:
                feeder = threading.Thread(target=send_all, args=(source, data))
                feeder.start()
                assert_same(receive_exactly(sink, len(data)), data)
                feeder.join(PATIENCE)
                end(source)
            record = served.sessions(turn)[-1]
            down, up = record["sinks"]
            assert (up["result"], up["bytes"]) == ("delivered", len(data))
            assert (down["result"], down["bytes"]) == ("failed", 0)
            missed += down["dropped"]
            assert missed + down.get("backlog", 0) == turn * len(data)
            assert "ECONNREFUSED" in down["reason"]


@pytest.mark.parametrize("policy", ["drop", "disconnect"])
def test_a_short_stream_does_not_wait_for_a_sink_that_is_down(tmp_path: Path, policy: str) -> None:
    """All of a stream fits the pipe of a sink that is down: after its grace the turn ends nevertheless."""
    stages = f"[tee: {{to: '{refused_address()}', on_slow: {{policy: {policy}, after: 100ms}}}}]"
    with serving(standing("out.bin", stages), tmp_path) as served:
        with source_of(served) as source:
            send_all(source, b"a few bytes")
            end(source)
        (record,) = served.sessions()
    down, up = record["sinks"]
    assert up["result"] == "delivered"
    assert (down["result"], down["bytes"], down["backlog"]) == ("failed", 0, 11)


def test_gaps_are_aligned_across_an_absence(tmp_path: Path) -> None:
    """A sink that drops while it is away rejoins between two pieces of align bytes, counted from the first byte."""
    piece = 188
    data = b"".join(number.to_bytes(4, "big") * (piece // 4) for number in range(120_000))
    address = refused_address()
    stages = f"[tee: {{to: '{address}', on_slow: {{policy: drop, after: 50ms, align: {piece}}}}}]"
    with (
        tcp_listener() as (listener, main),
        serving(standing(f"'{main}'", stages), tmp_path) as served,
        accept(listener) as other,
        source_of(served) as source,
    ):
        half = len(data) // 2 + 50  # in the middle of a piece
        feeder = threading.Thread(target=send_all, args=(source, data[:half]))
        feeder.start()
        receive_exactly(other, half)
        feeder.join(PATIENCE)
        served.said("dropping for it alone")
        got = bytearray()
        with listening_at(Address.parse(address).port) as late, accept(late) as sink:
            reader = threading.Thread(target=lambda: got.extend(_until_reset(sink)))
            reader.start()
            border = half - half % piece + piece
            send_all(source, data[half:border])  # the gap can end once its last piece is whole
            receive_exactly(other, border - half)
            served.said("has caught up")
            feeder = threading.Thread(target=send_all, args=(source, data[border:]))
            feeder.start()
            receive_exactly(other, len(data) - border)
            feeder.join(PATIENCE)
            end(source)
            (record,) = served.sessions()
            served.signal(signal.SIGTERM)
            served.wait()
            reader.join(PATIENCE)
    said = record["sinks"][0]
    assert len(got) == said["bytes"]
    assert said["bytes"] + said["dropped"] == len(data)
    assert said["dropped"] % piece == 0
    assert said["dropped"] > 0
    pieces = [bytes(got[i : i + piece]) for i in range(0, len(got), piece)]
    assert all(len({p[i : i + 4] for i in range(0, piece, 4)}) == 1 for p in pieces)
    numbers = [int.from_bytes(p[:4], "big") for p in pieces]
    assert numbers == sorted(set(numbers))
    assert border // piece in numbers  # the first piece after the gap


def _until_reset(sock: socket.socket) -> bytes:
    got = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while True:
            wait_for(sock)
            piece = sock.recv(1 << 20)
            if not piece:
                break
            got += piece
    return bytes(got)


def test_a_disconnected_sink_is_in_nobodys_way(tmp_path: Path) -> None:
    """A standing sink disconnected for being slow holds the others neither then nor while it is away."""
    data = payload(4, 24 << 20)
    with tcp_listener() as (stalled, slow), tcp_listener() as (listener, address):
        stages = f"[tee: {{to: '{slow}', on_slow: {{policy: disconnect, after: 100ms}}}}]"
        with (
            serving(standing(f"'{address}'", stages), tmp_path) as served,
            accept(stalled) as never_read,
            accept(listener) as sink,
            source_of(served) as source,
        ):
            stalled.close()  # it will not come back
            feeder = threading.Thread(target=send_all, args=(source, data))
            feeder.start()
            assert_same(receive_exactly(sink, len(data)), data)
            feeder.join(PATIENCE)
            end(source)
            (record,) = served.sessions()
            never_read.close()
    left, all_of_it = record["sinks"]
    assert all_of_it["result"] == "delivered"
    assert left["result"] == "failed"
    assert left["bytes"] + left["dropped"] + left.get("backlog", 0) == len(data)
    assert "full for 0.1 s" in "".join(line["message"] for line in served.lines)


def test_a_half_close_is_noted_and_not_acted_on(tmp_path: Path) -> None:
    """A peer that ends its own stream, as `nc -N -l` does at once, goes on receiving."""
    with tcp_listener() as (listener, address), serving(standing(f"'{address}'"), tmp_path) as served:
        with accept(listener) as sink, source_of(served) as source:
            sink.shutdown(socket.SHUT_WR)
            send_all(source, b"still here")
            assert receive_exactly(sink, 10) == b"still here"
            end(source)
            (record,) = served.sessions()
    assert record["sinks"][0]["result"] == "delivered"
    assert record["sinks"][0]["reconnects"] == 0


def test_peer_eof_close_takes_a_half_close_for_the_end(tmp_path: Path) -> None:
    """With `peer_eof: close` the sink is away when its peer ends its own stream, and is connected again."""
    with tcp_listener() as (listener, address):
        sink_settings = f"{{connect: '{address}', peer_eof: close}}"
        with serving(standing(sink_settings), tmp_path) as served, accept(listener) as sink:
            sink.shutdown(socket.SHUT_WR)
            assert "peer_eof" in served.said("is away")["message"]
            with accept(listener) as second, source_of(served) as source:
                send_all(source, b"again")
                assert receive_exactly(second, 5) == b"again"
                end(source)


def test_a_unix_peer_that_closes_while_idle_is_away(tmp_path: Path) -> None:
    """A unix socket tells a close from a half-close: the sink is away before anything is sent into the void."""
    with unix_listener(tmp_path / "s") as (listener, address):
        with serving(standing(f"'{address}'"), tmp_path) as served, accept(listener) as first:
            first.shutdown(socket.SHUT_WR)
            with source_of(served) as source:
                send_all(source, b"half")
                assert receive_exactly(first, 4) == b"half"
                first.close()
                served.said("is away")
                with accept(listener) as second:
                    send_all(source, b"whole")
                    assert receive_exactly(second, 5) == b"whole"
                    end(source)
            (record,) = served.sessions()
    assert record["sinks"][0]["result"] == "delivered"


def test_a_drain_does_not_wait_for_a_sink_that_is_away(tmp_path: Path) -> None:
    """SIGTERM with a standing sink away and nothing for it under way ends relay at once, with 0."""
    with serving(standing(f"'{refused_address()}'"), tmp_path) as served:
        served.port()
        served.said("is away")
        served.signal(signal.SIGTERM)
        assert served.wait(5) == 0


# --- names ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_work(route: dict[str, Any], records: list[SessionRecord]) -> Iterator[RunningRoute]:
    """A route that serves in this process, on an engine with a thread of its own."""
    engine = Engine("reconnecting")
    over = threading.Event()
    running = RunningRoute(
        "r",
        from_data({"routes": {"r": route}}, "test").routes["r"],
        engine,
        itertools.repeat(engine),
        lambda _route: over.set(),
        on_record=records.append,
    )
    running.open()
    engine.start()
    try:
        yield running
    finally:
        engine.post(lambda: running.abort("the test is over"))
        assert over.wait(PATIENCE)
        # a log's thread may still be at work; what it leaves is closed on the engine
        eventually(lambda: not working_threads("-ferry"), "the ferries' threads end")
        running.close()
        engine.stop()


class Resolver:
    """Answers for one name, with another place every time it is asked; None is a failure."""

    def __init__(self, *ports: int | None) -> None:
        self._ports = list(ports)
        self.asked = 0

    def __call__(self, host: str, port: int, *, passive: bool = False) -> list[tuple[int, Any]]:
        if host in ("", "127.0.0.1"):
            return [(socket.AF_INET, (host, port))]
        assert host == "moves.example"
        found = self._ports[min(self.asked, len(self._ports) - 1)]
        self.asked += 1
        if found is None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, ("127.0.0.1", found))]


def test_a_sinks_name_is_looked_up_again_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name points elsewhere after the first connection broke, past a look-up that failed: relay goes there."""
    with tcp_listener() as (one, first), tcp_listener() as (two, second):
        resolver = Resolver(Address.parse(first).port, None, Address.parse(second).port)
        monkeypatch.setattr(tcp, "lookup", resolver)
        records: list[SessionRecord] = []
        route = {
            "source": {"listen": "tcp://127.0.0.1:0", "connections": "one"},
            "sink": "tcp://moves.example:9",
        }
        with at_work(route, records) as running, accept(one) as sink, connected(running.bound[-1]) as source:
            send_all(source, b"one")
            assert receive_exactly(sink, 3) == b"one"
            reset(sink)
            with accept(two) as moved:
                send_all(source, b"two")
                assert receive_exactly(moved, 3) == b"two"
                end(source)
            eventually(lambda: records, "the record")
    assert resolver.asked == 3
    assert records[0].sinks[0].reconnects == 2


def test_a_spills_delivery_looks_its_name_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a log it is the same: the next connection goes to where the name points by then, and nothing is lost."""
    data = payload(6, 6 << 20)
    with tcp_listener() as (one, first), tcp_listener() as (two, second):
        resolver = Resolver(Address.parse(first).port, None, Address.parse(second).port)
        monkeypatch.setattr(tcp, "lookup", resolver)
        records: list[SessionRecord] = []
        route = {
            "source": "tcp://127.0.0.1:0",
            "sink": {"connect": "tcp://moves.example:9", "on_slow": "spill"},
        }
        with at_work(route, records) as running, connected(running.bound[-1]) as source:
            with accept(one) as sink:
                send_all(source, data)  # the log takes all of it
                source.shutdown(socket.SHUT_WR)
                got = receive_exactly(sink, 1 << 20)
                reset(sink)
            with accept(two) as moved:
                rest = receive_all(moved)
            eventually(lambda: records, "the record")
    assert_same(got, data[: len(got)])
    assert_same(rest, data[len(data) - len(rest) :])
    # what the first peer's kernel had acknowledged is beyond a raw stream's reach; the rest came, in order
    assert records[0].sinks[0].bytes == len(data)


# --- waits ------------------------------------------------------------------------------------------------


def test_waits_grow_with_jitter_and_end_only_after_sustained_success() -> None:
    """Each wait is half to all of a step that doubles up to the longest; a short success does not shorten it."""
    backoff = Backoff(random.Random(1))
    step = Backoff.FIRST
    for _ in range(12):
        assert step / 2 <= backoff.next() <= step
        step = min(step * 2, Backoff.LONGEST)
    backoff.lasted(Backoff.SUSTAINED / 2)
    assert backoff.next() >= Backoff.LONGEST / 2
    backoff.lasted(Backoff.SUSTAINED)
    assert backoff.next() <= Backoff.FIRST
    assert len({Backoff(random.Random(seed)).next() for seed in range(20)}) == 20


def test_trying_for_long_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery whose connect took long in vain waits longer the next time, not shorter."""
    said: list[float] = []
    monkeypatch.setattr(Backoff, "lasted", lambda _self, seconds: said.append(seconds))
    with at_work(
        {"source": "tcp://127.0.0.1:0", "sink": {"connect": refused_address(), "on_slow": "spill"}}, []
    ) as running:
        with connected(running.bound[-1]) as source:
            send_all(source, b"x")
            eventually(lambda: len(said) > 2, "three attempts")
    assert said[:3] == [0.0, 0.0, 0.0]


# --- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", ["one", "each"])
def test_a_source_that_connects_is_connected_again(tmp_path: Path, turns: str) -> None:
    """In serve each connection is a turn or a pipeline of its own, one after another; SIGTERM ends it with 0."""
    sink = "{file: 'out.bin', append: true}" if turns == "one" else "'{id}.bin'"
    address = refused_address()
    config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: {sink}}}}}"
    with serving(config, tmp_path) as served:
        refused = served.said("the source is away")
        with listening_at(Address.parse(address).port) as listener:
            for number in range(3):
                with accept(listener) as sock:
                    send_all(sock, b"stream %d\n" % number)
            records = served.sessions(3)
            served.said("its connection has ended")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert "connecting to" in refused["message"]
    assert "ECONNREFUSED" in refused["message"]
    assert [record["result"] for record in records] == ["delivered"] * 3
    assert [record["bytes"] for record in records] == [9, 9, 9]
    files = [tmp_path / "out.bin"] if turns == "one" else [tmp_path / f"{n}.bin" for n in (1, 2, 3)]
    assert b"".join(file.read_bytes() for file in files) == b"stream 0\nstream 1\nstream 2\n"


def test_a_source_that_resets_is_connected_again(tmp_path: Path) -> None:
    """A source's reset fails its own stream only: the next connection is a whole one."""
    with tcp_listener() as (listener, address):
        config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: '{{id}}.bin'}}}}"
        with serving(config, tmp_path) as served:
            first = accept(listener)
            send_all(first, b"broken")
            eventually(lambda: list(tmp_path.glob("1.bin.part")), "its file is begun")
            reset(first)
            with accept(listener) as second:
                send_all(second, b"whole")
            broken, whole = served.sessions(2)
            served.signal(signal.SIGTERM)
            served.wait()
    assert (broken["result"], whole["result"]) == ("failed", "delivered")
    assert (tmp_path / "2.bin").read_bytes() == b"whole"


def test_a_drain_lets_a_source_that_connected_go_on(tmp_path: Path) -> None:
    """SIGTERM while a source's stream is under way: it flows out, and nobody is connected to again."""
    with tcp_listener() as (listener, address):
        config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: '{{id}}.bin'}}}}"
        with serving(config, tmp_path) as served:
            with accept(listener) as sock:
                send_all(sock, b"begun, ")
                eventually(lambda: list(tmp_path.glob("1.bin.part")), "its file is begun")
                served.signal(signal.SIGTERM)
                served.said("draining")
                send_all(sock, b"done")
            assert served.wait() == 0
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert (tmp_path / "1.bin").read_bytes() == b"begun, done"


def test_a_unix_source_is_connected_again(tmp_path: Path) -> None:
    """A unix source is no different."""
    with unix_listener(tmp_path / "s") as (listener, address):
        config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: '{{id}}.bin'}}}}"
        with serving(config, tmp_path) as served:
            for number in range(2):
                with accept(listener) as sock:
                    send_all(sock, b"%d" % number)
            served.sessions(2)
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    assert [(tmp_path / f"{n}.bin").read_bytes() for n in (1, 2)] == [b"0", b"1"]


# --- waiting for sinks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", ["one", "each"])
def test_nothing_is_read_before_every_sink_is_open(tmp_path: Path, connections: str) -> None:
    """With wait_for_sinks a sink that is there gets nothing until the one that is refused is there as well."""
    address = refused_address()
    with tcp_listener() as (listener, there):
        config = standing(f"'{address}'", f"[tee: {{to: '{there}'}}]", "wait_for_sinks: 15s")
        with serving(config.replace("connections: one", f"connections: {connections}"), tmp_path) as served:
            with source_of(served) as source:
                send_all(source, b"all or nothing")
                source.shutdown(socket.SHUT_WR)
                with accept(listener) as early:
                    if connections == "one":
                        served.said("is away")
                    assert not select.select([early], [], [], 0.1)[0]
                    with listening_at(Address.parse(address).port) as late_listener:
                        late = accept(late_listener)
                    with late:
                        assert receive_exactly(late, 14) == b"all or nothing"
                        assert receive_exactly(early, 14) == b"all or nothing"
            if connections == "each":
                assert served.sessions()[0]["result"] == "delivered"


def test_a_stream_does_not_wait_for_ever(tmp_path: Path) -> None:
    """When the time is over the stream goes on without the sink that is not there, and the log names it."""
    address = refused_address()
    drop = f"[tee: {{to: '{address}', on_slow: drop}}]"
    with tcp_listener() as (listener, there):
        config = standing(f"'{there}'", drop, "wait_for_sinks: 300ms")
        with serving(config, tmp_path) as served, accept(listener) as sink, source_of(served) as source:
            send_all(source, b"late")
            said = served.said("goes on without")
            assert receive_exactly(sink, 4) == b"late"
    assert "goes on without tee" in said["message"] or address in said["message"]


# --- connecting -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_place() -> Iterator[tuple[int, Any]]:
    """A place that never answers: a listener whose backlog is full drops whoever comes."""
    with socket.socket() as listener, contextlib.ExitStack() as callers:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                caller.connect(listener.getsockname())
        yield socket.AF_INET, listener.getsockname()


def connect_to(places: list[tuple[int, Any]], timeout: float) -> tuple[socket.socket | None, int]:
    """What Connecting makes of them."""
    engine = Engine("connecting")
    answers: list[tuple[socket.socket | None, int]] = []
    try:
        Connecting(engine, places, lambda sock, code: answers.append((sock, code)), timeout=timeout)
        while not answers:
            engine.turn(0.05)
    finally:
        engine.close()
    return answers[0]


def test_a_silent_place_leaves_time_for_the_next() -> None:
    """The first of two places never answers: it uses its share of the time, and the second is reached."""
    with silent_place() as silent, tcp_listener() as (listener, address):
        port = Address.parse(address).port
        sock, code = connect_to([silent, (socket.AF_INET, ("127.0.0.1", port))], 0.6)
        assert code == 0
        assert sock is not None
        sock.close()
        accept(listener).close()


def test_a_socket_connected_to_itself_has_met_nobody() -> None:
    """Connecting to a port of this machine may come back to the very socket: that is found out."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert connected_to_itself(sock)
    with tcp_listener() as (listener, address), connected(address) as sock, accept(listener):
        assert not connected_to_itself(sock)


def test_a_reset_before_the_end_counts_what_was_under_way() -> None:
    """A receiver that resets just before relay ends the stream to it: what it had not acknowledged is lost, though
    nobody had looked at the connection again."""
    engine = Engine("reset")
    with tcp_listener() as (listener, address):
        sink = TcpSink(engine, Address.parse(address))
        try:
            sink.open()
            while sink.state == "opening":
                engine.turn(0.05)
            fd, sent = int(sink.c.fd), 0
            with accept(listener) as peer:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += os.write(fd, bytes(1 << 16))
                sink.c.moved = sent
                reset(peer)
            wait_for(fd, 0)
            waiting = unacknowledged(fd)
            sink.finish()
            assert sink.state == "failed"
            assert 0 < sink.lost == waiting < sent
            assert "ECONNRESET" in sink.reason
        finally:
            sink.close()
            engine.close()


def failing_sink(address: str, monkeypatch: pytest.MonkeyPatch, **limits: float) -> str:
    """Why a sink there failed to connect."""
    engine = Engine("failing")
    if limits:
        monkeypatch.setattr(Connecting.__init__, "__kwdefaults__", limits)
    sink = TcpSink(engine, Address.parse(address))
    failed: list[str] = []
    sink.on_fail = lambda _sink: failed.append(sink.reason)
    try:
        sink.open()
        while not failed:
            engine.turn(0.05)
    finally:
        engine.close()
    return failed[0]


def test_errors_of_a_connect_say_what_and_what_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, timed out, unknown: each names the operation, the address, the errno and what to do."""
    address = refused_address()
    refused = failing_sink(address, monkeypatch)
    assert refused.startswith(f"connecting to {address}: Connection refused (ECONNREFUSED); is the receiver")
    with silent_place() as (_family, (host, port)):
        silent = failing_sink(f"tcp://{host}:{port}", monkeypatch, timeout=0.2)
    assert silent.startswith(
        f"connecting to tcp://{host}:{port}: Connection timed out (ETIMEDOUT); is the host up"
    )
    unknown = failing_sink("tcp://nobody.invalid:9", monkeypatch)
    assert unknown.startswith("connecting to tcp://nobody.invalid:9: looking up 'nobody.invalid': ")
    assert unknown.endswith("check the name, or write the address in figures")


# --- liveness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead_after", [2.0, 2.5, 3.0, 5.0, 7.0, 15.0, 60.0, 3600.0])
def test_keepalive_finds_a_dead_peer_within_dead_after(dead_after: float) -> None:
    """Idle time and all probes together fit into dead_after, and use most of it."""
    idle, interval, count = keepalive(dead_after)
    assert dead_after - 1 < idle + interval * count <= dead_after
    assert min(idle, interval, count) >= 1
    assert keepalive(0.1) == (1, 1, 1)


def test_one_lost_packet_is_no_death() -> None:
    """A probe or a retransmission that is just late is no proof; two are, and so is one overdue by half."""
    quiet = TcpState(retransmits=0, probes=0, backoff=0, rto=0.2, unacked=0, heard=100.0)
    assert not quiet.asking()
    shut = quiet._replace(backoff=9, rto=0.2)  # backoff stays while a shut window's probes are answered
    assert not shut.asking()
    assert shut._replace(probes=1).asking()
    assert not shut._replace(probes=1).unanswered(100.0)
    assert shut._replace(probes=2).unanswered(100.0)
    shrunk = quiet._replace(unacked=3, backoff=8, rto=60.0)
    assert shrunk.asking()
    assert not shrunk.unanswered(60.0)
    assert shrunk.unanswered(90.0)


def test_an_idle_connection_is_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    """Once all is acknowledged the timer ends; the next byte begins it again."""
    caplog.set_level(logging.ERROR)
    records: list[SessionRecord] = []
    with tcp_listener() as (listener, address):
        route = {
            "source": {"listen": "tcp://127.0.0.1:0", "connections": "one"},
            "sink": {"connect": address, "dead_after": "200ms"},
        }
        with (
            at_work(route, records) as running,
            accept(listener) as sink,
            connected(running.bound[-1]) as source,
        ):
            assert running._standing is not None
            (outlet,) = running._standing.chain.outlets
            for _ in range(2):
                send_all(source, b"x")
                receive_exactly(sink, 1)
                end_of_line = outlet.sink
                assert isinstance(end_of_line, TcpSink)
                assert end_of_line._liveness is not None
                eventually(
                    lambda end=end_of_line: end.c.rouse == 1 and not end._liveness.looking,  # type: ignore[misc] # bound
                    "nothing is outstanding, nothing is looked at",
                )
    assert not caplog.records
