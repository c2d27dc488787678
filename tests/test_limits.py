"""Limits: who may connect and for how long; what happens when descriptors, pipe pages or threads run out.

RELAY_CHURN=1 runs the churn for a minute and with 5,000 idle connections instead of a few seconds and 500.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - getaddrinfo wants it; a child of another user may not be able to read it
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance import reset
from forked import become, forked, needs_root
from peers import assert_same, eventually, payload, receive_all, receive_exactly
from relays import Process, Relay, serving

from relay.endpoints.options import Limits
from relay.journal.seldom import Seldom
from relay.kernel.pipe import Pipe
from relay.serving.admission import Admission, host_of

FULL = os.environ.get("RELAY_CHURN") == "1"


def route(limits: str, sink: str = '"null:"', host: str = "127.0.0.1", more: str = "") -> str:
    """One route whose source has limits."""
    return (
        f'routes: {{r: {{source: {{listen: "tcp://{host}:0", limits: {{{limits}}}{more}}}, sink: {sink}}}}}'
    )


def connect(served: Process, source: str = "127.0.0.1") -> socket.socket:
    """A connection from the address `source`."""
    return socket.create_connection(("127.0.0.1", served.port()), source_address=(source, 0))


def is_in(sock: socket.socket) -> bool:
    """Whether relay takes a whole stream from the connection; it refuses with a reset."""
    try:
        sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        return receive_all(sock) == b""
    except (ConnectionResetError, BrokenPipeError, OSError):
        return False
    finally:
        sock.close()


def was_reset(sock: socket.socket) -> bool:
    """Whether the connection ends with a reset, rather than with an end of stream."""
    try:
        receive_all(sock)
    except ConnectionResetError:
        return True
    finally:
        sock.close()
    return False


def end(served: Process, code: int = 0) -> None:
    """SIGTERM, and the exit code that is expected."""
    served.signal(signal.SIGTERM)
    assert served.wait() == code, served.text


# --- who may connect --------------------------------------------------------------------------------------


def test_connections_of_a_route(tmp_path: Path) -> None:
    """One too many is reset and logged with the limit; when one leaves there is room again."""
    with serving(route("connections: 2"), tmp_path) as served:
        first, second = connect(served), connect(served)
        assert was_reset(connect(served))
        line = served.said("refused")
        assert "limits.connections" in line["message"]
        assert line["event"] == "refused"
        assert is_in(first)
        served.sessions(1)
        assert is_in(connect(served))
        assert is_in(second)
        served.sessions(3)
        end(served)


def test_waiting_connections_count(tmp_path: Path) -> None:
    """Where connections take turns, one that waits counts as well, and one that left while it waited does not."""
    with serving(route("connections: 2", "out"), tmp_path) as served:
        first, second = connect(served), connect(served)
        served.said("waits for its turn")
        assert was_reset(connect(served))
        assert is_in(first)
        assert is_in(second)
        served.sessions(2)
        assert is_in(connect(served))
        served.sessions(3)
        end(served)


def test_connections_of_a_peer(tmp_path: Path) -> None:
    """A peer's limit is that of its address: another address still gets in."""
    with serving(route("per_peer: 1"), tmp_path) as served:
        first = connect(served, "127.0.0.1")
        assert was_reset(connect(served, "127.0.0.1"))
        other = connect(served, "127.0.0.2")
        assert was_reset(connect(served, "127.0.0.2"))
        assert "limits.per_peer" in served.said("refused")["message"]
        assert is_in(first)
        assert is_in(other)
        served.sessions(2)
        assert is_in(connect(served, "127.0.0.1"))
        end(served)


@pytest.mark.parametrize(
    ("limits", "allowed", "refused"),
    [
        ('allow: ["127.0.0.2"]', ["127.0.0.2"], ["127.0.0.1", "127.0.0.3"]),
        ('allow: ["127.0.0.0/30"]', ["127.0.0.1", "127.0.0.3"], ["127.0.0.4"]),
        ('deny: ["127.0.0.2/31"]', ["127.0.0.1", "127.0.0.4"], ["127.0.0.2", "127.0.0.3"]),
        ('allow: ["127.0.0.0/8"], deny: ["127.0.0.2"]', ["127.0.0.1"], ["127.0.0.2"]),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_networks(tmp_path: Path, limits: str, allowed: list[str], refused: list[str], host: str) -> None:
    """allow and deny, deny first; on a dual-stack listener too, where a v4 peer comes as ::ffff:1.2.3.4."""
    if host:
        host = "0.0.0.0"
    with serving(route(limits, host=host), tmp_path) as served:
        assert [is_in(connect(served, source)) for source in allowed] == [True] * len(allowed)
        assert [is_in(connect(served, source)) for source in refused] == [False] * len(refused)
        served.sessions(len(allowed))
        end(served)


@pytest.mark.parametrize(
    ("limits", "peer", "inside"),
    [
        ({"allow": ["2001:db8::/32"]}, "[2001:db8::1]:5", True),
        ({"allow": ["2001:db8::/32"]}, "[2001:db9::1]:5", False),
        ({"allow": ["10.0.0.0/8"]}, "[2001:db8::1]:5", False),
        ({"deny": ["10.0.0.0/8"]}, "[::ffff:10.1.2.3]:5", False),
        ({"allow": ["10.0.0.0/8"]}, "[::ffff:10.1.2.3]:5", True),
        ({"deny": ["fe80::/10"]}, "[fe80::1%eth0]:5", False),
        ({"deny": ["::/0"]}, "10.0.0.1:5", True),
        ({"deny": ["0.0.0.0/0"]}, "pid:77", True),
    ],
)
def test_networks_of_every_kind(limits: dict[str, list[str]], peer: str, inside: bool) -> None:
    """v6, v4 in v6, a scope, and peers that have no address."""
    assert Admission("r", Limits.model_validate(limits)).admit(peer) is inside


def test_the_host_of_a_peer() -> None:
    """The name of a peer without its port; a unix peer is its process."""
    assert [host_of(peer) for peer in ("1.2.3.4:5", "[::1]:5", "pid:12")] == ["1.2.3.4", "::1", "pid:12"]


def test_a_crowd_that_is_refused_is_one_line_a_second(tmp_path: Path) -> None:
    """Hundreds of refusals make few lines, and those lines count them all."""
    with serving(route('deny: ["127.0.0.0/8"]'), tmp_path) as served:
        began = time.monotonic()
        for _ in range(500):
            assert not is_in(connect(served))
        lines = time.monotonic() - began + 1
        end(served)
    told = [line for line in served.lines if line.get("event") == "refused"]
    assert 1 <= len(told) <= lines + 1
    assert not [line for line in served.lines if line.get("event") == "session"]


def test_seldom_counts_what_it_holds_back() -> None:
    """The first one is said at once, then none until its time, then the count of all since."""
    seldom = Seldom(60.0)
    assert [seldom() for _ in range(4)] == [1, 0, 0, 0]
    seldom._last -= 61
    assert seldom() == 4
    assert Seldom(0.0)() == 1


# --- for how long -----------------------------------------------------------------------------------------


def test_an_idle_connection_is_ended(tmp_path: Path) -> None:
    """It is reset, its file stays .part, and the record says why; one that keeps moving lives on."""
    with serving(route("idle: 300ms", '{file: "{id}"}'), tmp_path) as served:
        idle = connect(served)
        idle.sendall(b"few bytes")
        began = time.monotonic()
        busy = connect(served)
        ended = []
        thread = threading.Thread(target=lambda: ended.append(was_reset(idle)))
        thread.start()
        while thread.is_alive():
            busy.sendall(b"x")
            thread.join(0.02)
        assert ended == [True]
        assert 0.25 < time.monotonic() - began < 3
        (record,) = served.sessions(1)
        assert "limits.idle" in record["reason"]
        assert (record["ended_by"], record["result"]) == ("relay", "failed")
        assert is_in(busy)
        served.sessions(2)
        end(served)
    path = record["sinks"][0]["path"]
    assert path.endswith(".part")
    assert (tmp_path / path).read_bytes() == b"few bytes"


def test_a_lifetime_is_over_whatever_happens(tmp_path: Path) -> None:
    """A connection that moves all the time is ended all the same; what it gave until then is in its `.part`."""
    with serving(route("lifetime: 300ms", '{file: "{id}"}'), tmp_path) as served:
        with connect(served) as sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in itertools.count():
                sock.sendall(b"x" * 100)
        (record,) = served.sessions(1)
        assert "limits.lifetime" in record["reason"]
        assert record["bytes"] > 0
        end(served)
    assert (tmp_path / "1.part").stat().st_size == record["sinks"][0]["bytes"] == record["bytes"]


def test_turns_have_limits_of_their_own(tmp_path: Path) -> None:
    """Where connections take turns an idle one loses its turn, and the next one has its own time."""
    with serving(route("idle: 200ms", '{listen: "tcp://127.0.0.1:0"}'), tmp_path) as served:
        live, source = (int(address.rpartition(":")[2]) for address in served.addresses(2))
        with socket.create_connection(("127.0.0.1", live)) as viewer:
            served.said("joined")
            first = socket.create_connection(("127.0.0.1", source))
            first.sendall(b"first ")
            assert receive_exactly(viewer, 6) == b"first "
            second = socket.create_connection(("127.0.0.1", source))
            second.sendall(b"second")
            assert was_reset(first)
            assert receive_exactly(viewer, 6) == b"second"
            assert is_in(second)
            served.sessions(2)
            end(served)


# --- what runs out ----------------------------------------------------------------------------------------


def test_no_descriptors_are_a_pause(tmp_path: Path) -> None:
    """Without descriptors newcomers wait, which is said seldom; a stream that runs is whole; then they are served."""
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))}
    data = payload(1, 8 << 20)
    with serving(
        'routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "{id}"}}}', tmp_path, **limit
    ) as served:
        first = connect(served)
        first.sendall(data[:100])
        eventually(lambda: (tmp_path / "1.part").exists(), "the first stream begins")
        crowd = [connect(served) for _ in range(60)]
        line = served.until(
            lambda: next((x for x in served.lines if x.get("event") == "cannot_accept"), None)
        )
        assert "ulimit" in line["message"]
        first.sendall(data[100:])
        first.shutdown(socket.SHUT_WR)
        assert receive_all(first) == b""
        first.close()
        began = time.monotonic()
        for sock in crowd:
            sock.close()
        eventually(lambda: is_in(connect(served)), "there is room again")
        served.said("accepting on")
        end(served)
        seconds = time.monotonic() - began
    assert_same((tmp_path / "1").read_bytes(), data)
    complaints = [line for line in served.lines if line.get("event") == "cannot_accept"]
    assert len(complaints) <= 2 + seconds / 10


@needs_root
def test_no_pipe_pages_are_smaller_pipes() -> None:
    """An unprivileged user's pipes beyond the budget are small, never an error, and large again once others go."""

    def spend() -> list[int]:
        become(64987)
        resource.setrlimit(resource.RLIMIT_NOFILE, (2400, 2400))
        pipes = [Pipe() for _ in range(1100)]
        sizes = [pipe.capacity for pipe in pipes]
        for pipe in pipes:
            pipe.close()
        with Pipe() as last:
            return [sizes[0], min(sizes), last.capacity]

    with forked(spend) as child:
        first, least, last = child.answer()
    assert first == last == 1 << 20
    assert 4096 <= least < 65536


def stream(user: int, data: bytes, spoil: Callable[[], object]) -> dict[str, Any]:
    """In a child: as `user`, one stream through a tee into two files, `spoil` called when relay is ready.

    What the two files hold is in `same`; the record's sinks are in `sinks`; the client's end is in `whole`.
    """
    become(user)
    folder = Path(tempfile.mkdtemp())
    try:
        route: dict[str, Any] = {
            "source": {"listen": "tcp://127.0.0.1:0"},
            "stages": [{"tee": {"to": {"file": f"{folder}/a"}}}],
            "sink": {"file": f"{folder}/b"},
        }
        with Relay(route) as relay:
            kept = spoil()
            with socket.create_connection(("127.0.0.1", int(relay.bound[0].rpartition(":")[2]))) as sock:
                try:
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    whole = receive_all(sock) == b""
                except (ConnectionResetError, BrokenPipeError):
                    whole = False
            record = relay.wait()
            assert record is not None
            del kept
        found = [path.read_bytes() == data for path in sorted(folder.iterdir())]
        return {"same": found, "sinks": [sink.as_dict() for sink in record.sinks], "whole": whole}
    finally:
        shutil.rmtree(folder)


@needs_root
def test_streams_flow_without_pipe_pages() -> None:
    """A user whose budget of pipe pages is spent gets his streams through the smallest of pipes."""

    def spend() -> list[Pipe]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        pipes = [Pipe() for _ in range(1200)]
        assert pipes[-1].capacity < 65536
        return pipes

    data = payload(2, 4 << 20)
    with forked(lambda: stream(64986, data, spend)) as child:
        answer = child.answer()
    assert answer["whole"]
    assert answer["same"] == [True, True]


@needs_root
def test_no_threads_are_a_failed_sink() -> None:
    """A file needs a thread: where none is to be had it is that sink's failure, with its errno, and the end is told."""

    def spend() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

    with forked(lambda: stream(64985, b"content", spend)) as child:
        answer = child.answer()
    assert not answer["whole"]
    assert [sink["result"] for sink in answer["sinks"]] == ["failed", "failed"]
    assert all("EAGAIN" in sink["reason"] for sink in answer["sinks"])


# --- churn ------------------------------------------------------------------------------------------------


def footprint(served: Process) -> tuple[int, int, int]:
    """Descriptors, threads, and resident KiB of the process."""
    status = Path(f"/proc/{served.pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0])
    return (
        len(os.listdir(f"/proc/{served.pid}/fd")),  # noqa: PTH208 - only their number
        len(os.listdir(f"/proc/{served.pid}/task")),  # noqa: PTH208 - only their number
        resident,
    )


@pytest.fixture
def many() -> Iterator[int]:
    """How many connections at once; the limit of descriptors is raised for the test, four a connection in relay."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5000 if FULL else 500
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, (hard - 200) // 4)  # as many as the hard limit lets in
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * wanted + 200), hard))
    yield wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SPELL = 150 if FULL else 40  # hundreds of connections in one spell of churn
NOISE = 512 if FULL else 4096  # KiB by which the heap after one spell may differ from that after another


def churn(
    served: Process, files: Path, generator: random.Random, *, spells: int, seconds: float = 0.0
) -> int:
    """Hundreds of connections, `spells` times and for so many seconds at least, 30 open at a time; how many came.

    Each sends nothing, little or much, and is closed, reset, or left to the idle timeout. What `files` holds goes.
    """
    until, many = time.monotonic() + seconds, 0
    open_now: list[socket.socket] = []
    while spells > 0 or time.monotonic() < until:
        spells -= 1
        for _ in range(100):
            with contextlib.suppress(OSError):
                sock = connect(served)
                many += 1
                open_now.append(sock)
                sock.sendall(b"x" * generator.choice((0, 1, 1000, 200_000)))
            if len(open_now) > 30:
                leaving = open_now.pop(generator.randrange(len(open_now)))
                with contextlib.suppress(OSError):
                    reset(leaving) if generator.random() < 0.5 else leaving.close()
        for path in files.glob("x-*"):
            path.unlink(missing_ok=True)
    for sock in open_now:
        sock.close()
    return many


def at_rest(served: Process, before: tuple[int, int, int]) -> None:
    """Waits until its descriptors and threads are no more than they were."""
    eventually(lambda: footprint(served)[0] <= before[0], "descriptors are given back")
    eventually(lambda: footprint(served)[1] <= before[1], "threads have ended")


@pytest.mark.timeout(180 if FULL else 60)
@pytest.mark.parametrize("method", ["auto", "copy"])
def test_churn_leaves_nothing_behind(tmp_path: Path, method: str) -> None:
    """Connections that come, send, stall and go in every way: descriptors, threads and RSS return to where they were.

    RSS is compared with that after a first spell, in which the heap takes the size that so many streams at once need.
    """
    generator = random.Random(3)
    config = (
        f'routes: {{r: {{method: {method}, source: {{listen: "tcp://127.0.0.1:0",'
        " limits: {connections: 40, idle: 200ms}},"
        ' stages: [{tee: {to: {file: "x-{id}"}}}], sink: "null:"}}'
    )
    with serving(config, tmp_path) as served:
        for _ in range(20):
            assert is_in(connect(served))
        served.sessions(20)
        eventually(lambda: footprint(served)[1] <= 5, "the threads of the first files have ended")
        before = footprint(served)
        many = churn(served, tmp_path, generator, spells=SPELL)
        at_rest(served, before)
        warm = footprint(served)
        many += churn(served, tmp_path, generator, spells=SPELL, seconds=60.0 if FULL else 0.0)
        at_rest(served, before)
        print(
            f"{method}: {many} connections, KiB before {before[2]}, warm {warm[2]}, after {footprint(served)[2]}"
        )
        eventually(lambda: footprint(served)[2] <= warm[2] + NOISE, "memory is as it was")
        eventually(lambda: is_in(connect(served)), "newcomers are served")
        end(served)


@pytest.mark.timeout(180 if FULL else 60)
def test_idle_connections_cost_little(tmp_path: Path, many: int) -> None:
    """A host of connections that say nothing are all there, and when they go nothing of them is left."""
    with serving('routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: "null:"}}', tmp_path) as served:
        for _ in range(20):
            assert is_in(connect(served))
        served.sessions(20)
        before = footprint(served)
        rounds = []
        for _ in range(5):
            socks = [connect(served) for _ in range(many)]
            eventually(lambda: footprint(served)[0] >= before[0] + many, "all of them are in", patience=60.0)
            rounds.append(footprint(served))
            for sock in socks:
                sock.close()
            eventually(lambda: footprint(served)[0] <= before[0], "descriptors are given back", patience=60.0)
        crowd = rounds[-1][2] - before[2]
        if FULL:  # the memory of fewer is within the noise
            eventually(lambda: footprint(served)[2] < before[2] + crowd * 3 / 4, "and memory, soon after")
        print(f"{many} connections: KiB before {before[2]}, then {crowd} more, after {footprint(served)[2]}")
        assert is_in(connect(served))
        end(served)
    first, *_between, fourth, fifth = rounds
    assert {there[1] for there in rounds} == {before[1]}
    assert (first[2] - before[2]) / many < 64  # KiB a connection
    assert (
        fifth[2] - fourth[2] < 2048 + many
    )  # the queue of log lines, which nobody reads here, and the allocator
