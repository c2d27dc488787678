"""The source `shared`: blocks that a local program hands over with a ShareSink are a route's stream."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from consumers import Consumer
from peers import assert_same, eventually, run
from producers import STREAM, Taking, serving

import relay
from relay.config.load import loads
from relay.config.models import Config
from relay.errors import ConfigErrors
from relay.kernel.probe import machine
from relay.planning.plan import make_plan
from relay.sharing.sink import ShareSink


def pieces(seed: int) -> Iterator[bytes]:
    """STREAM in pieces of any size, empty ones among them."""
    generator, at = random.Random(seed), 0
    while at < len(STREAM):
        size = generator.choice([0, 1, 4095, 4096, 70_000, 1 << 20, 2 << 20])
        yield STREAM[at : at + size]
        at += size


def test_blocks_are_the_stream(tmp_path: Path) -> None:
    """Blocks of any size, empty ones and ones that need larger slots among them, arrive as one stream, in order."""
    with Taking(tmp_path / "in", str(tmp_path / "out")) as taking:
        with ShareSink(taking.connect(), slots=2, slot_size=1 << 20) as sink:
            for piece in pieces(1):
                sink.send(piece)
            sink.flush(timeout=20)
        outcome = taking.outcome()
    assert_same((tmp_path / "out").read_bytes(), STREAM)
    record = outcome.records[0]
    assert (record.source, record.bytes, record.result) == (
        f"shared://{tmp_path}/in",
        len(STREAM),
        "delivered",
    )
    assert (record.method, record.peer) == ("copy", f"pid:{os.getpid()}")


def test_a_slot_that_was_given_back_can_be_written_again(tmp_path: Path) -> None:
    """A producer that overwrites a slot once it has it back changes nothing that is under way to a slow reader."""
    near, far = socket.socketpair()
    size = 1 << 15  # all of it fits into a pipe
    with Taking(tmp_path / "in", f"fd://{far.fileno()}") as taking:
        with ShareSink(taking.connect(), slots=1, slot_size=size) as sink:
            for number in range(7):
                with sink.slot(size) as slot:
                    slot[:] = number
            sink.flush(timeout=20)
            with sink.slot(size) as slot:  # nothing was read so far: all of it is in relay or in the socket
                slot[:] = 99
            got = bytearray()
            while len(got) < 8 * size:
                got += near.recv(size)
        assert taking.outcome().code == 0
    expected = b"".join(bytes([number]) * (size) for number in [*range(7), 99])
    assert_same(bytes(got), expected)
    near.close()
    far.close()


@pytest.mark.parametrize("stages", [[], [{"meter": {}}]], ids=["straight", "through a pipe"])
def test_to_a_slow_socket(tmp_path: Path, stages: list[Any]) -> None:
    """A socket that takes little at a time gets every byte once, whether written from the slot or through a pipe."""
    got = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def read() -> None:
        generator = random.Random(3)
        near, _ = listener.accept()
        while piece := near.recv(generator.choice([100, 5000, 60_000])):
            got.extend(piece)
        near.close()

    reader = threading.Thread(target=read)
    reader.start()
    sink_address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    with Taking(tmp_path / "in", sink_address, stages=stages) as taking:
        with ShareSink(taking.connect(), slots=3) as sink, relay.share(STREAM[:100_000]) as final:
            for number, piece in enumerate(pieces(2)):
                sink.send(piece)
                if number == 3:
                    sink.send(final)
        at = sum(len(piece) for _number, piece in zip(range(4), pieces(2), strict=False))
        assert taking.outcome().code == 0
    reader.join(20)
    listener.close()
    assert_same(bytes(got), STREAM[:at] + STREAM[:100_000] + STREAM[at:])


def test_final_memory_goes_by_reference(tmp_path: Path) -> None:
    """A Shared is not copied on its way: relay splices its pages, and its bytes arrive between those of slots."""
    with Taking(tmp_path / "in", str(tmp_path / "out")) as taking:
        with ShareSink(taking.connect()) as sink, relay.share(STREAM) as shared:
            sink.send(b"before")
            for _ in range(6):  # more than there are slots
                sink.send(shared)
            sink.flush(timeout=20)
        outcome = taking.outcome()
    assert_same((tmp_path / "out").read_bytes(), b"before" + 6 * STREAM)
    assert outcome.records[0].method == "splice"


def test_method_copy_copies_final_memory(tmp_path: Path) -> None:
    """With `method: copy` it is read."""
    with Taking(tmp_path / "in", str(tmp_path / "out"), method="copy") as taking:
        with ShareSink(taking.connect()) as sink, relay.share(STREAM) as shared:
            sink.send(shared)
        outcome = taking.outcome()
    assert_same((tmp_path / "out").read_bytes(), STREAM)
    assert outcome.records[0].method == "copy"


def test_both_ends_shared(tmp_path: Path) -> None:
    """From a producer to a consumer, with a tee on the way; an empty stream, too."""
    for content in (STREAM, b""):
        consumer = Consumer(str(tmp_path / "out"))
        stages = [{"tee": {"to": str(tmp_path / "copy")}}]
        with Taking(tmp_path / "in", {"shared": f"unix://{tmp_path}/out"}, stages=stages) as taking:
            with ShareSink(taking.connect()) as sink:
                if content:
                    sink.send(content)
            assert taking.outcome().code == 0
        assert_same(consumer.wait(), content)
        assert_same((tmp_path / "copy").read_bytes(), content)
        (tmp_path / "out").unlink()


def test_back_pressure_reaches_the_producer(tmp_path: Path) -> None:
    """A sink that takes nothing keeps slots away from the producer, however much it has to give."""
    near, far = socket.socketpair()
    with Taking(tmp_path / "in", f"fd://{far.fileno()}") as taking:
        sink = ShareSink(taking.connect(), slots=2, slot_size=1 << 20)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64:
                sink.send(bytes(1 << 20), timeout=0.3)
                sent += 1
        assert sent < 10
        sink.part()
    near.close()
    far.close()


def test_producers_take_turns(tmp_path: Path) -> None:
    """With `connections: one` a second producer waits until the first has ended its stream, and nothing is mixed up."""
    config = {
        "routes": {
            "r": {
                "source": {"shared": f"unix://{tmp_path}/in", "connections": "one"},
                "sink": {"file": str(tmp_path / "out"), "append": True},
            }
        }
    }
    with serving(config) as records:
        socks = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        sinks = []
        for sock in socks:
            sock.connect(str(tmp_path / "in"))
            sinks.append(ShareSink(sock))
        for number, sink in enumerate(sinks):
            sink.send(bytes([number]) * 1000)
        for number, sink in enumerate(sinks):
            sink.send(bytes([number]) * 1000)
            sink.flush(timeout=20)
            sink.close()
        eventually(lambda: len(records) == 3, "each stream ends")
    assert (tmp_path / "out").read_bytes() == b"".join(bytes([number]) * 2000 for number in range(3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{source: {shared: 'tcp://127.0.0.1:1'}, sink: '-'}", "takes the address of a unix socket"),
        ("{source: {shared: 'unix:///a', burst: 1MiB}, sink: '-'}", "burst"),
        ("{source: {shared: 'unix:///a', limits: {allow: [127.0.0.1]}}, sink: '-'}", "'allow' applies to"),
        (
            "{source: {shared: 'unix://@a', mode: 0600}, sink: '-'}",
            "'mode' applies to unix sockets that listen",
        ),
        ("{source: {shared: 'unix:///a'}, sink: {shared: 'unix:///a'}}", "comes back"),
        ("{source: 'memory:', sink: '-'}", "from code"),
    ],
)
def test_configuration(text: str, said: str) -> None:
    """What makes no sense is said at its place."""
    with pytest.raises(ConfigErrors, match=said):
        loads(f"routes: {{a: {text}}}")


def test_two_routes_cannot_have_one_socket() -> None:
    """A shared source and a source that listens are told apart by their path alone."""
    with pytest.raises(ConfigErrors, match="is listened on by route 'a' already"):
        loads(
            "routes: {a: {source: 'unix:///x', sink: 'null:'}, b: {source: {shared: 'unix:///x'}, sink: 'null:'}}"
        )


def test_what_a_listener_has_applies() -> None:
    """Mode, turns and limits are those of a unix socket that listens."""
    config = loads(
        "routes: {a: {source: {shared: 'unix:///a', mode: 0600, connections: one, "
        "limits: {connections: 3, idle: 5s}}, sink: 'tcp://127.0.0.1:9'}}"
    )
    route = config.routes["a"]
    assert (route.source.verb, route.turns()) == ("listen", "one")
    plan = make_plan(Config(routes={"a": route}), machine()).routes[0]
    assert (plan.source.kind, plan.source.choice.method, plan.source.verb) == ("shared", "copy", "listen")
    assert "final memory goes by reference" in plan.source.choice.reason


def test_the_short_form(tmp_path: Path) -> None:
    """`shared:///path` listens as a source, as unix does."""
    assert loads("routes: {a: {source: 'shared:///x', sink: '-'}}").routes["a"].source.verb == "listen"


def test_the_example_produces(tmp_path: Path) -> None:
    """The producer under examples/ gives a route its stream."""
    with Taking(tmp_path / "in", str(tmp_path / "out")) as taking:
        program = Path(__file__).resolve().parent.parent / "examples" / "produce.py"
        done = run([sys.executable, str(program), str(tmp_path / "in")])
        assert taking.outcome().code == 0
    content = (tmp_path / "out").read_bytes()
    assert f"{len(content)} bytes".encode() in done.stdout
    assert content.endswith(struct.pack("<f", 99) * 1000 + b"the end")
