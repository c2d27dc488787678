"""Broadcasts over real connections: who joins when gets what, and what slow ones cost the others."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from peers import PATIENCE, connected, eventually, payload, receive_all, receive_exactly, running
from relays import Relay, serving
from viewers import MIB, Stage, Viewer, live, stalled_viewer

from relay.endpoints.broadcast import Broadcast


@pytest.mark.parametrize("seed", range(3))
def test_joins_and_leaves_at_random(tmp_path: Path, seed: int) -> None:
    """Each viewer's bytes are one run of the stream from its join to its leave; who stays has it to its end."""
    chance, data = random.Random(seed), payload(seed, 24 * MIB)
    with serving(live(), tmp_path) as served:
        stage = Stage(served, data)
        stays = stage.join(known=True)
        while stage.sent < len(data):
            what = chance.random()
            if what < 0.3 and len(stage.viewers) < 12:
                stage.join(wait=chance.random() < 0.5)
            elif what < 0.45 and len(stage.viewers) > 1:
                stage.leave(chance.choice(stage.viewers[1:]), reset=chance.random() < 0.5)
            stage.send(stage.sent + chance.randrange(MIB), wait=False)
        stage.work(lambda: all(v.at == len(data) for v in stage.viewers if v.start is not None), len(data))
        assert stays.at == len(data)
        stage.close()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


@pytest.mark.parametrize(("burst", "align"), [(MIB, 1), (MIB, 188), (100_000, 7)])
def test_a_late_joiner_first_gets_the_burst(tmp_path: Path, burst: int, align: int) -> None:
    """Who joins when `n` bytes have passed begins burst bytes back, at a multiple of align, and misses nothing."""
    chance, data = random.Random(align), payload(align, 12 * MIB)
    slow = f", on_slow: {{policy: drop, align: {align}}}" if align > 1 else ""
    with serving(live(f", burst: {burst}{slow}"), tmp_path) as served:
        stage = Stage(served, data)
        stage.join(known=True)
        while stage.sent < len(data) - MIB:
            stage.send(stage.sent + 1000 + chance.randrange(MIB))
            at = stage.sent
            late = stage.join()
            stage.send(at + 1000)
            first = max(0, at - burst)
            assert late.start == first + -first % align
        stage.send(len(data))
        stage.close()


def test_the_burst_is_kept_while_nobody_reads(tmp_path: Path) -> None:
    """Without subscribers bytes pass, and whoever comes first gets the last of them."""
    data = payload(3, 40 * MIB)
    with serving(live(", burst: 64KiB"), tmp_path) as served:
        stage = Stage(served, data)
        stage.send(len(data))
        stage.sock.close()
        (record,) = served.sessions()
        assert record["bytes"] == len(data)
        late = stage.join()
        stage.work(lambda: late.start is not None and late.at == len(data), len(data))
        assert late.start == len(data) - 65536
        stage.close()


def test_a_stalled_viewer_is_cut_off_and_the_others_lose_nothing(tmp_path: Path) -> None:
    """Under the default a viewer that stalls is disconnected with the reason; those beside it get every byte."""
    data = payload(5, 48 * MIB)
    with serving(live(", on_slow: {after: 300ms, buffer: 1MiB}"), tmp_path) as served:
        stage = Stage(served, data)
        for _ in range(4):
            stage.join(known=True, wait=False)
        with stalled_viewer(stage):
            stage.send(len(data))
            left = served.said("left after")
        assert left["reason"].endswith("backlog of 9.0 MiB full for 0.3 s")
        assert left["lost"] > 0
        stage.close()


def test_a_viewer_that_drops_loses_whole_pieces_and_goes_on_at_the_newest(tmp_path: Path) -> None:
    """Under drop what a stalled viewer has got and what it has not are all of the stream; each gap is whole pieces."""
    size, packets = 188, 250_000
    data = b"".join(struct.pack(">I", number) + bytes(184) for number in range(packets))
    with serving(live(", on_slow: {policy: drop, align: 188, after: 50ms}"), tmp_path) as served:
        stage = Stage(served, data)
        stage.join(known=True)
        with stalled_viewer(stage) as stalled:
            stage.send(len(data) - size)
            served.said("is slow: dropping for it alone")
            stalled.setblocking(False)
            got = bytearray()

            def reads(until: Callable[[], bool]) -> None:
                while not until():
                    assert served.process.stderr is not None
                    poll = select.poll()
                    poll.register(stalled, select.POLLIN)
                    poll.register(served.process.stderr, select.POLLIN)
                    for fd, _ in poll.poll(PATIENCE * 1000):
                        if fd == stalled.fileno():
                            got.extend(stalled.recv(MIB))
                        else:
                            served._read(PATIENCE)

            reads(lambda: any("has caught up" in line["message"] for line in served.lines))
            stage.send(len(data))
            reads(lambda: got.endswith(data[-size:]))
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        left = served.said("left after")
        stage.close()
    numbers = [struct.unpack_from(">I", got, place)[0] for place in range(0, len(got), size)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == packets - 1
    assert len(got) + left["dropped"] == len(data)
    assert left["dropped"] > 0


def test_a_viewer_that_blocks_holds_all_and_loses_nothing(tmp_path: Path) -> None:
    """Under block a stalled viewer holds the source, is named, and has every byte once it reads again."""
    most = int(
        Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()[2]
    )  # that relay's socket may hold unread
    data = payload(6, 48 * MIB + most)
    with serving(live(", on_slow: {policy: block, after: 50ms}"), tmp_path) as served:
        stage = Stage(served, data)
        stage.join(known=True)
        with stalled_viewer(stage) as sock:
            slow = Viewer(sock, data, 0)
            held = -1
            while held < stage.sent:
                held = stage.sent
                patience = time.monotonic() + 0.5
                stage.work(lambda until=patience: time.monotonic() > until, len(data))  # type: ignore[misc]
            assert stage.sent < len(data)
            assert "it holds the source" in served.said("is slow")["message"]
            stage.viewers.append(slow)
            stage.send(len(data))
        stage.close()


def test_a_half_close_is_no_goodbye_and_a_reset_is(tmp_path: Path) -> None:
    """A viewer that shuts its write side (nc with stdin at its end) stays; one that resets leaves; peer_eof closes."""
    data = payload(7, 3 * MIB)
    with serving(live(), tmp_path) as served:
        stage = Stage(served, data)
        half, resets = stage.join(known=True), stage.join(known=True)
        half.sock.shutdown(socket.SHUT_WR)
        with (tmp_path / "seen").open("wb") as seen:
            host, port = stage.live.removeprefix("tcp://").rsplit(":", 1)
            with running(["nc", "-N", host, port], stdin=subprocess.DEVNULL, stdout=seen):
                stage.joined += 1
                stage.wait_joined()
                stage.send(MIB)
                stage.leave(resets, reset=True)
                assert "ECONNRESET" in served.said("left after")["reason"]
                stage.send(len(data))
                eventually(lambda: (tmp_path / "seen").stat().st_size == len(data), "nc has it all")
        assert (tmp_path / "seen").read_bytes() == data
        stage.close()
    with serving(live(", peer_eof: close"), tmp_path) as served:
        stage = Stage(served, data)
        stage.join(known=True).sock.shutdown(socket.SHUT_WR)
        assert "its peer closed" in served.said("left after")["reason"]
        stage.close()


def test_a_viewer_that_comes_too_late_is_refused_by_a_reset(tmp_path: Path) -> None:
    """While relay drains its broadcast goes on to those who are there; at its end nobody is left hanging."""
    data = payload(8, MIB)
    with serving(live(", burst: 1KiB"), tmp_path) as served:
        stage = Stage(served, data)
        viewer = stage.join(known=True)
        stage.send(len(data))
        served.signal(signal.SIGTERM)
        stage.sock.close()
        stage.work(lambda: viewer.ended, len(data))
        stage.close()
        assert served.wait() == 0


def test_who_connects_just_before_the_end_gets_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that the kernel still holds when the stream ends is not reset: its stream is empty, and whole."""
    late: list[socket.socket] = []
    finish = Broadcast.finish

    def connect_first(broadcast: Broadcast) -> None:
        late.append(connected(relay.bound[0]))
        finish(broadcast)

    monkeypatch.setattr(Broadcast, "finish", connect_first)
    route = {"source": {"listen": "tcp://127.0.0.1:0"}, "sink": {"listen": "tcp://127.0.0.1:0"}}
    with Relay(route) as relay, connected(relay.bound[0]) as early, connected(relay.bound[1]) as source:
        source.sendall(b"all of it")
        assert receive_exactly(early, 9) == b"all of it"
        source.shutdown(socket.SHUT_WR)
        assert receive_all(early) == b""
        with late[0]:
            assert receive_all(late[0]) == b""
        early.close()
        record = relay.wait()
    assert record is not None
    assert record.result == "delivered"


def test_who_is_accepted_together_with_the_end_gets_the_end() -> None:
    """The end of the stream and a subscriber seen in the same round: it joins before the broadcast is over."""
    route = {"source": {"listen": "tcp://127.0.0.1:0"}, "sink": {"listen": "tcp://127.0.0.1:0"}}
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(PATIENCE)

    with Relay(route) as relay, connected(relay.bound[1]) as source:
        source.sendall(b"nobody is there")
        eventually(lambda: relay.moved() == 15, "it passed")
        relay.post(hold)
        assert held.wait(PATIENCE)
        with connected(relay.bound[0]) as subscriber:
            source.shutdown(socket.SHUT_WR)
            go_on.set()
            assert receive_all(subscriber) == b""
        assert relay.wait() is not None


@pytest.mark.parametrize(
    "slow",
    [
        "{policy: disconnect, after: 200ms}",
        "{policy: drop, after: 200ms}",
        "{policy: spill, max: 16MiB, then: disconnect, after: 200ms}",
        "{policy: block, after: 100ms}",
    ],
    ids=["disconnect", "drop", "spill", "block"],
)
@pytest.mark.parametrize("size", [100_000, 4 * MIB], ids=["in its socket", "in the ring"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_end_of_a_finite_stream_waits_for_a_stalled_viewer_as_its_policy_says(
    tmp_path: Path, slow: str, size: int, kind: str
) -> None:
    """A route that ends is not kept by a viewer that takes nothing; under `block` it is, until the viewer reads."""
    data = random.Random(4).randbytes(size)
    os.mkfifo(tmp_path / "in")
    where = "tcp://127.0.0.1:0" if kind == "tcp" else f"unix://{tmp_path}/s"
    text = f"routes: {{r: {{source: {{fifo: in}}, sink: {{listen: '{where}', on_slow: {slow}}}}}}}"
    with serving(text, tmp_path) as served:
        bound = served.addresses(1)[0]
        stalled, good = connected(bound, 16384), connected(bound)
        served.until(lambda: sum("joined" in line["message"] for line in served.lines) == 2)
        with (tmp_path / "in").open("wb") as stream, contextlib.closing(good):
            viewer = Viewer(good, data, 0)
            for at in range(0, size, 65536):
                stream.write(data[at : at + 65536])
                stream.flush()
                viewer.read()
            stream.close()
            eventually(lambda: viewer.read() == 0 and viewer.ended, "the good one has all", good)
            assert viewer.at == size
        if "block" in slow:
            served.said("it holds the end of the stream")
            rest = Viewer(stalled, data, 0)
            eventually(lambda: rest.read() == 0 and rest.ended, "the slow one has all", stalled)
            assert rest.at == size
            stalled.close()
            assert served.wait() == 0
            return
        served.wait()
        said = served.said("took nothing for 0.2 s")
        assert said["bytes"] + said["dropped"] == (size if "drop" in slow else said["bytes"])
        assert said["lost"] > 0 or kind == "unix"
        stalled.close()
