"""What the commands do, from code: outcomes, errors, progress, cancellation, and asyncio."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import payload

import relay
from relay import aio
from relay.errors import ConfigErrors, SourceError, UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of 3 MiB and a bit."""
    path = tmp_path / "source"
    path.write_bytes(payload(2, (3 << 20) + 77))
    return path


@pytest.fixture(autouse=True)
def no_threads() -> Iterator[None]:
    """Fails the test after which a thread of relay's runs that did not before."""
    before = set(threading.enumerate())
    yield
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()


def collect(listener: socket.socket, into: list[bytes]) -> None:
    """Accepts one connection and reads it to its end."""
    connection, _ = listener.accept()
    with connection:
        found = bytearray()
        while piece := connection.recv(1 << 20):
            found += piece
        into.append(bytes(found))


@pytest.fixture
def receiver() -> Any:
    """A tcp receiver of one stream: its address and a function that waits for the bytes."""
    listener = socket.create_server(("127.0.0.1", 0))
    got: list[bytes] = []
    thread = threading.Thread(target=collect, args=(listener, got), daemon=True)
    thread.start()

    def wait() -> bytes:
        thread.join(20)
        return got[0]

    yield f"tcp://127.0.0.1:{listener.getsockname()[1]}", wait
    listener.close()
    thread.join(20)


def test_a_file_to_several(file: Path, tmp_path: Path, receiver: Any) -> None:
    """A path goes to a file and a socket; the outcome tells bytes, methods and checksums of each."""
    address, wait = receiver
    outcome = relay.send(file, [tmp_path / "copy", address], checksum="crc32c")
    assert (tmp_path / "copy").read_bytes() == wait() == file.read_bytes()
    assert outcome.code == 0
    assert outcome.bytes == 2 * file.stat().st_size
    assert {result["address"] for result in outcome.results} == {str(tmp_path / "copy"), address}
    assert len({result["checksum"] for result in outcome.results}) == 1
    assert all(result["file"] == str(file) for result in outcome.results)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_in_memory(kind: Any, receiver: Any) -> None:
    """A buffer is a stream as well, under the name memory."""
    address, wait = receiver
    content = payload(5, 300_000)
    outcome = relay.send(kind(content), address)
    assert wait() == content
    assert outcome.results[0]["file"] == "memory"


def test_what_fails_is_raised(file: Path, tmp_path: Path) -> None:
    """A missing file, a refused connection, another checksum: TransferError with the outcome, or just that."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(relay.TransferError, match="Connection refused") as failed:
            relay.send(file, [dead, tmp_path / "copy"])
    outcome: Any = failed.value.outcome
    assert (outcome.code, outcome.bytes) == (1, file.stat().st_size)
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    with pytest.raises(relay.TransferError, match="No such file"):
        relay.send(tmp_path / "missing", tmp_path / "x")
    with pytest.raises(relay.TransferError, match="checksum is another"):
        relay.send(file, "null:", checksum="crc32c=00000000")
    assert relay.send(tmp_path / "missing", tmp_path / "x", check=False).code == 4
    with pytest.raises(UsageError, match="did you mean 'splice'"):
        relay.send(file, "null:", method="slice")


def test_signals_are_left_alone(file: Path) -> None:
    """Neither call touches the program's signal handlers or its wake-up descriptor, on any thread."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
    relay.send(file, "null:")
    thread = threading.Thread(target=lambda: relay.run(relay.Route(source=str(file), sink="null:")))
    thread.start()
    thread.join()
    assert handlers == [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    ]
    assert signal.set_wakeup_fd(-1) == -1


def test_progress_and_cancel(file: Path) -> None:
    """Progress is told on the way, on the caller's thread; a cancel ends it and what was sent is told."""
    cancel = relay.Cancel()
    seen: list[Any] = []
    threads = set()

    def far(standings: Any) -> None:
        threads.add(threading.get_ident())
        seen.extend(standings)
        if standings[0].bytes > 100_000:
            cancel.cancel()

    with pytest.raises(relay.TransferCancelled) as failed:
        relay.send(file, "null:", rate="2MB/s", progress=far, cancel=cancel)
    outcome: Any = failed.value.outcome
    assert outcome.code == 130
    assert 100_000 < outcome.bytes < file.stat().st_size
    assert seen[-1].whole == file.stat().st_size
    assert threads == {threading.get_ident()}
    with pytest.raises(relay.TransferCancelled):
        relay.send(file, "null:", rate="100KB/s", cancel=cancel)


def test_a_callback_that_raises_ends_it(file: Path) -> None:
    """An exception in a callback comes out of the call, and nothing is left running."""

    def far(standings: Any) -> None:
        if standings and standings[0].bytes:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        relay.send(file, "null:", rate="2MB/s", progress=far)
    route = relay.Route(source=str(file), stages=[{"throttle": {"rate": "2MB/s"}}], sink="null:")
    with pytest.raises(ZeroDivisionError):
        relay.run(route, progress=far)
    with pytest.raises(ZeroDivisionError):
        relay.run(
            relay.Route(source={"listen": "tcp://127.0.0.1:0"}, sink="null:"), on_ready=lambda _: 1 // 0
        )


def test_ctrl_c_ends_it(file: Path) -> None:
    """KeyboardInterrupt on the main thread comes out of the call, and nothing is left running."""

    def far(standings: Any) -> None:
        if standings and standings[0].bytes:
            os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            relay.send(file, "null:", rate="2MB/s", progress=far)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_route(file: Path, tmp_path: Path) -> None:
    """A Route made in code runs once, with its stages, and its record tells what moved."""
    route = relay.Route(
        source=str(file),
        stages=[{"checksum": {"algorithm": "sha256"}}, {"tee": {"to": str(tmp_path / "one")}}],
        sink=str(tmp_path / "two"),
    )
    records: list[Any] = []
    outcome = relay.run(route, on_record=records.append)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == file.read_bytes()
    assert list(outcome.records) == records
    assert records[0].stages[0]["algorithm"] == "sha256"
    assert outcome.bytes == 2 * file.stat().st_size


def test_configurations(file: Path, tmp_path: Path) -> None:
    """run takes the path of a YAML file and a mapping alike; what is wrong with them is raised."""
    path = tmp_path / "relay.yaml"
    path.write_text(f"routes: {{a: {{source: '{file}', sink: '{tmp_path / 'one'}'}}}}")
    relay.run(path)
    relay.run({"routes": {"a": {"source": str(file), "sink": str(tmp_path / "two")}}})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == file.read_bytes()
    with pytest.raises(ConfigErrors, match="did you mean 'sink'"):
        relay.run({"routes": {"a": {"source": "-", "snik": "-"}}})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SourceError, match="EADDRINUSE"):
            relay.run(relay.Route(source={"listen": address}, sink="null:"))
    with pytest.raises(SourceError, match="No such file"):
        relay.run(relay.Route(source=str(tmp_path / "missing"), sink="null:"))


def test_a_route_that_is_wrong_is_refused_as_a_configuration_is() -> None:
    """Every problem of a Route made in code is a ConfigError with its place and what to do, never pydantic's error."""
    with pytest.raises(ConfigErrors) as refused:
        relay.Route(
            source="tpc://127.0.0.1:1", sink={"conect": "unix:///x"}, stages=[{"throttel": {}}], method="fast"
        )
    assert all(isinstance(each, relay.RelayError) for each in (refused.value, *refused.value.errors))
    said = str(refused.value)
    for part in (
        "relay.Route: source: ", "relay.Route: sink", "did you mean 'connect'?", "relay.Route: stages[0].throttel: ",
        "did you mean 'throttle'?", "relay.Route: method: expected auto, zero-copy or copy, got 'fast'",
    ):  # fmt: skip
        assert part in said
    assert len(refused.value.errors) == len(said.splitlines())
    with pytest.raises(ConfigErrors, match="'replies' needs 'duplex: true'"):
        relay.Route(source="-", sink="-", replies=["meter"])
    with pytest.raises(TypeError, match="sink"):
        relay.Route(source="-")
    with pytest.raises(ConfigErrors, match=r"relay: routes\.run\.sink"):
        relay.run(relay.Route(source={"listen": "tcp://127.0.0.1:1"}, sink="tcp://127.0.0.1:1"))
    with pytest.raises(ConfigErrors) as several:  # routes within a configuration are still told all at once
        relay.run({"routes": {"a": {"source": "-"}, "b": {"source": "tpc://x", "sink": "-"}}})
    assert [str(each).split(": ")[1] for each in several.value.errors] == ["routes.a", "routes.b.source"]


def test_a_server_runs_until_it_is_cancelled(file: Path, tmp_path: Path) -> None:
    """Routes that listen run on a thread; addresses and records are told; a cancel drains and is no error."""
    cancel = relay.Cancel()
    ready = threading.Event()
    bound: list[str] = []
    records: list[Any] = []
    outcomes: list[Any] = []

    def began(addresses: list[str]) -> None:
        bound.extend(addresses)
        ready.set()

    config = {
        "routes": {
            "in": {"source": {"listen": "tcp://127.0.0.1:0"}, "sink": {"file": f"{tmp_path}/in-{{id}}"}}
        }
    }
    thread = threading.Thread(
        target=lambda: outcomes.append(
            relay.run(config, on_ready=began, on_record=records.append, cancel=cancel)
        )
    )
    thread.start()
    assert ready.wait(20)
    for _ in range(3):
        relay.send(file, bound[0])
    cancel.cancel()
    thread.join(20)
    assert outcomes[0].code == 0
    assert [record.result for record in records] == ["delivered"] * 3
    assert [path.read_bytes() == file.read_bytes() for path in tmp_path.glob("in-*")] == [True] * 3


def test_asyncio(file: Path, tmp_path: Path) -> None:
    """The async twins leave the loop free, tell on the loop, and end when their task is cancelled."""

    async def main() -> None:
        ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        config = {
            "routes": {"in": {"source": {"listen": "tcp://127.0.0.1:0"}, "sink": f"{tmp_path}/in-{{id}}"}}
        }
        server = asyncio.create_task(aio.run(config, on_ready=ready.set_result))
        (address,) = await ready
        outcomes = await asyncio.gather(*(aio.send(file, address) for _ in range(3)))
        assert [outcome.bytes for outcome in outcomes] == [file.stat().st_size] * 3
        seen: list[Any] = []
        slow = asyncio.create_task(aio.send(file, "null:", rate="100KB/s", progress=seen.append))
        while not seen:
            await asyncio.sleep(0)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        with pytest.raises(relay.TransferError):
            await aio.send(tmp_path / "missing", "null:")
        server.cancel()
        with pytest.raises(asyncio.CancelledError):
            await server

    asyncio.run(main())
    assert len(list(tmp_path.glob("in-*"))) == 3


def test_whatever_order_memory_is_in(tmp_path: Path) -> None:
    """A buffer that is not contiguous is sent in the order of its own bytes, an empty one as an empty stream."""
    for view in (memoryview(bytes(range(100)))[::3], memoryview(b"")[:0], memoryview(b"").cast("B")):
        outcome = relay.send(view, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == view.tobytes()
        assert outcome.records[0].source == "memory"


def test_nobody_to_send_to(file: Path) -> None:
    """An empty list of addresses is a mistake, and no address that was never given is used in its place."""
    with pytest.raises(relay.UsageError, match="nobody to send to"):
        relay.send(file, [])


def test_the_twins_take_the_same_options() -> None:
    """What relay.aio names as options are those of relay.send and relay.run, all of them."""
    for twin, options in ((relay.send, aio.SendOptions), (relay.run, aio.RunOptions)):
        keyword = [one for one in inspect.signature(twin).parameters.values() if one.kind is one.KEYWORD_ONLY]
        assert set(options.__annotations__) == {one.name for one in keyword}
