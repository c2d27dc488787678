"""The sink `shared`: a stream handed to a local consumer in blocks of shared memory."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from consumers import Consumer
from peers import eventually, payload

import relay
from relay.config.load import loads
from relay.errors import ConfigErrors
from relay.sharing.source import ShareSource

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of 9 MiB and a bit."""
    path = tmp_path / "source"
    path.write_bytes(payload(3, (9 << 20) + 13))
    return path


def test_a_stream_arrives_in_shared_blocks(file: Path, tmp_path: Path) -> None:
    """What a route hands to a consumer is its stream, whole and in order, beside its other sinks."""
    consumer = Consumer(str(tmp_path / "app"))
    route = relay.Route(
        source=str(file),
        stages=[{"tee": {"to": {"shared": f"unix://{tmp_path}/app"}}}],
        sink=str(tmp_path / "out"),
    )
    outcome = relay.run(route)
    assert consumer.wait() == file.read_bytes() == (tmp_path / "out").read_bytes()
    assert consumer.ended == "end"
    record = outcome.records[0].sinks[0]
    assert (record.bytes, record.result, record.method) == (file.stat().st_size, "delivered", "copy")
    assert record.address == f"shared://{tmp_path}/app"


def test_send_to_a_consumer(file: Path, tmp_path: Path) -> None:
    """A plain address of the scheme works as well, for an empty stream too."""
    for content in (file, b""):
        consumer = Consumer(str(tmp_path / "app"))
        assert relay.send(content, f"shared://{tmp_path}/app").code == 0
        assert consumer.wait() == (file.read_bytes() if content else b"")
        assert consumer.ended == "end"
        (tmp_path / "app").unlink()


def test_a_consumer_that_leaves_is_a_failure(file: Path, tmp_path: Path) -> None:
    """A consumer that goes away in mid-stream fails its sink; the others get everything."""
    consumer = Consumer(str(tmp_path / "app"), stop=1)
    with pytest.raises(relay.TransferError, match=r"shared://.*no receiver is left|Broken pipe") as failed:
        relay.send(file, [f"shared://{tmp_path}/app", tmp_path / "out"])
    consumer.wait()
    assert consumer.ended == "left"
    assert (tmp_path / "out").read_bytes() == file.read_bytes()
    outcome: Any = failed.value.outcome
    assert outcome.code == 1


def test_nobody_there_is_told(file: Path, tmp_path: Path) -> None:
    """No consumer is a failure that names the address, after as long as was asked to wait."""
    with pytest.raises(relay.TransferError, match="connecting to shared://"):
        relay.send(file, f"shared://{tmp_path}/nobody")
    made: list[Consumer] = []
    timer = threading.Timer(0.3, lambda: made.append(Consumer(str(tmp_path / "late"))))
    timer.start()
    assert relay.send(file, f"shared://{tmp_path}/late", wait=10).code == 0
    timer.join()
    assert made[0].wait() == file.read_bytes()


def test_a_broken_stream_is_no_end(file: Path, tmp_path: Path) -> None:
    """A stream that is cut off reaches the consumer as a broken connection."""
    consumer = Consumer(str(tmp_path / "app"))
    cancel = relay.Cancel()

    def far(standings: Any) -> None:
        if standings and standings[0].bytes:
            cancel.cancel()

    with pytest.raises(relay.TransferCancelled):
        relay.send(file, f"shared://{tmp_path}/app", rate="1MB/s", progress=far, cancel=cancel)
    got = consumer.wait()
    assert consumer.ended == "broken"
    assert file.read_bytes().startswith(got)


def test_a_consumer_that_keeps_its_blocks_does_not_hold_the_end_up(file: Path, tmp_path: Path) -> None:
    """A sink whose consumer gives nothing back can still be cancelled at once."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "app"))
    listener.listen(1)
    cancel = relay.Cancel()
    timer = threading.Timer(0.3, cancel.cancel)
    timer.start()
    with pytest.raises(relay.TransferCancelled):
        relay.send(file, f"shared://{tmp_path}/app", cancel=cancel)
    timer.join()
    listener.close()


@pytest.mark.parametrize(
    ("sink", "said"),
    [
        ("{shared: 'tcp://127.0.0.1:1'}", "'shared' takes the address of a unix socket"),
        ("{shared: 'unix:///a', append: true}", "'append' applies to files only"),
        ("'shared://'", "names no socket"),
    ],
)
def test_configuration(sink: str, said: str) -> None:
    """What makes no sense is said at its place."""
    with pytest.raises(ConfigErrors, match=said):
        loads(f"routes: {{a: {{source: '-', sink: {sink}}}}}")


@contextlib.contextmanager
def example(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """An example at work."""
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        assert "listening" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("language", ["python", "c"])
def test_the_examples_consume(language: str, file: Path, tmp_path: Path) -> None:
    """The consumers under examples/ count the bytes of a stream and add them up."""
    path = str(tmp_path / "app")
    if language == "c":
        program = str(tmp_path / "consume")
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["cc", *flags, "-o", program, str(EXAMPLES / "consume.c")], check=True)
        argv = [program, path]
    else:
        argv = [sys.executable, str(EXAMPLES / "consume.py"), path]
    with example(*argv) as process:
        relay.send(file, f"shared://{path}")
        out, _ = process.communicate(timeout=20)
    content = file.read_bytes()
    assert f"{len(content)} bytes, their sum is {sum(content)}" in out
    assert process.returncode == 0


class Standing:
    """A route at work whose sink is a consumer at `path`; `feed` is a connection to its source."""

    def __init__(self, path: Path, **sink: Any) -> None:
        self.records: list[Any] = []
        self._ready, self._cancel = threading.Event(), relay.Cancel()
        route = {
            "source": {"listen": f"unix://{path}.in", "connections": "one"},
            "sink": {"shared": f"unix://{path}", **sink},
        }
        self._thread = threading.Thread(target=self._run, args=({"routes": {"r": route}},))
        self._thread.start()
        assert self._ready.wait(20)
        self.feed = socket.socket(socket.AF_UNIX)
        self.feed.connect(f"{path}.in")

    def _run(self, config: Any) -> None:
        relay.run(
            config,
            on_ready=lambda _bound: self._ready.set(),
            on_record=self.records.append,
            cancel=self._cancel,
            check=False,
        )

    def end(self) -> Any:
        """Ends the stream and the route; the record of its sink."""
        self.feed.close()
        eventually(lambda: bool(self.records), "the stream ends")
        self.stop()
        return self.records[0].sinks[0]

    def stop(self) -> None:
        """Ends the route at once."""
        self.feed.close()
        self._cancel.cancel()
        self._cancel.cancel()
        self._thread.join(20)


def test_a_consumer_that_comes_back_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A standing sink connects again: what came while nobody was there waits, and nothing is given twice."""
    path = tmp_path / "app"
    first = Consumer(str(path), stop=1 << 20)
    standing = Standing(path)
    stream = payload(4, 3 << 20)
    standing.feed.sendall(stream[: 1 << 20])
    got = first.wait()
    path.unlink()
    assert got == stream[: 1 << 20]
    eventually(lambda: "is away" in caplog.text, "it is noticed that the consumer left")
    standing.feed.sendall(
        stream[1 << 20 : (1 << 20) + 100_000]
    )  # it fits into the pipe while nobody is there
    second = Consumer(str(path))
    standing.feed.sendall(stream[(1 << 20) + 100_000 :])
    record = standing.end()
    assert second.wait() == stream[1 << 20 :]
    assert (record.reconnects, record.lost, record.result) == (1, 0, "delivered")
    assert record.bytes == len(stream)


def test_what_was_not_given_back_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Blocks that a consumer took along are counted as lost, and the sink has failed in the record."""
    path = tmp_path / "app"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    standing = Standing(path)
    connection, _ = listener.accept()
    kept = given_back = 0
    with ShareSource(connection) as source:
        for number in range(3):
            standing.feed.sendall(bytes([number]) * 1000)
            block = source.receive(timeout=20)
            assert block is not None
            assert len(block) == 1000
            if number == 1:
                kept += 1000  # and never given back
                blocks = [block]
            else:
                block.release()
                given_back += 1000
        del block
        listener.close()
        path.unlink()
        connection.shutdown(socket.SHUT_RDWR)
        blocks.clear()
    eventually(lambda: "is away" in caplog.text, "it is noticed that the consumer left")
    second = Consumer(str(path))
    standing.feed.sendall(b"last")
    eventually(lambda: second.got == b"last", "the second consumer has the rest")
    record = standing.end()
    second.wait()
    # from the first block on that was not given back: that those after it were is not remembered
    assert (record.lost, record.result, record.bytes) == (2000, "failed", 3004)
    assert record.reconnects == 1


def test_drop_while_the_consumer_is_away(tmp_path: Path) -> None:
    """Under drop an absent consumer holds nobody; what it missed is counted, and it gets what comes later."""
    path = tmp_path / "app"
    standing = Standing(path, on_slow={"policy": "drop", "after": "50ms"})
    stream = payload(6, 6 << 20)
    standing.feed.settimeout(20)
    standing.feed.sendall(stream)  # more than any pipe holds
    consumer = Consumer(str(path))
    eventually(lambda: consumer.connected, "it is connected")
    marks = 0
    while b"mark" not in consumer.got[-64:]:
        standing.feed.sendall(b"mark")
        marks += 1
    record = standing.end()
    got = consumer.wait()
    assert got[: 1 << 16] == stream[: 1 << 16]  # its pipe had the beginning
    assert record.dropped > 0
    assert record.dropped + record.bytes == len(stream) + 4 * marks


def test_spill_carries_on_where_the_consumer_was(tmp_path: Path) -> None:
    """A sink that spills goes on, at the next consumer, with the first block that was not given back."""
    path = tmp_path / "app"
    first = Consumer(str(path), stop=1 << 20)
    standing = Standing(path, on_slow={"policy": "spill", "max": "64MiB"})
    stream = payload(7, 8 << 20)
    standing.feed.sendall(stream)  # nobody is held, however slow the consumer
    got = first.wait()
    path.unlink()
    assert stream.startswith(got)
    second = Consumer(str(path))
    eventually(lambda: second.got.endswith(stream[-1000:]), "the second consumer has the rest")
    record = standing.end()
    rest = second.wait()
    assert stream.endswith(rest)
    assert len(got) + len(rest) >= len(stream)
    assert (record.result, record.lost) == ("delivered", 0)


def test_spill_on_disk_is_allowed() -> None:
    """A consumer can be reached again, so its log may be on disk."""
    config = loads(
        "routes: {a: {source: '-', sink: {shared: 'unix:///x', on_slow: {policy: spill, directory: /d}}}}"
    )
    assert config.routes["a"].sink.verb == "connect"
