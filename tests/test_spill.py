"""Sinks that read through a log, and those with a buffer: slow, away, refused, full, on disk and in memory."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance import connected, reset
from flapping import Receiver, gaps
from peers import (
    accept,
    assert_same,
    eventually,
    payload,
    program,
    receive_all,
    receive_exactly,
    received,
    send_all,
    tcp_listener,
)
from relays import Relay, serving

import relay.log
import relay.spill.directory
from relay.config.load import load_to_run, loads
from relay.endpoints.socket import unacknowledged
from relay.errors import ConfigErrors
from relay.journal.record import SinkRecord
from relay.spill.directory import SpillDirectory

MIB = 1 << 20


@pytest.fixture(params=["memory", "disk"])
def spill(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A spill's policy, with its log in memory or on disk."""
    if request.param == "memory":
        return {"policy": "spill"}
    return {"policy": "spill", "directory": str(tmp_path / "spill")}


def tee(receiver: Receiver, slow: dict[str, Any], sink: str, **more: Any) -> dict[str, Any]:
    """A route whose tee goes to `receiver`, and whose chain to `sink`."""
    branch = {"to": {"connect": receiver.address}, "on_slow": slow, **more}
    return {"source": {"listen": "tcp://127.0.0.1:0"}, "stages": [{"tee": branch}], "sink": sink}


def branch_record(relay: Relay) -> SinkRecord:
    """What the session's record says of the tee's sink."""
    record = relay.wait()
    assert record is not None
    return record.sinks[0]


# --- nothing lost, nobody held up -------------------------------------------------------------------------


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_sink_that_comes_and_goes_gets_every_byte(
    spill: dict[str, Any], tmp_path: Path, unix: bool
) -> None:
    """Down, up, reset and up again: each connection goes on where the last one had everything."""
    data = payload(1, 8 * MIB)
    with Receiver(tmp_path / "s" if unix else None) as receiver:
        with Relay(tee(receiver, spill, "null:")) as relay, connected(relay.bound[-1]) as source:
            got = b""
            for turn in range(4):
                send_all(source, data[turn * 2 * MIB : (turn + 1) * 2 * MIB])
                receiver.up()
                got += receiver.read(2 * MIB)
                if turn < 3:
                    receiver.down()
            source.shutdown(socket.SHUT_WR)
            assert receiver.rest() == b""
            record = branch_record(relay)
    assert_same(got, data)
    assert (record.bytes, record.lost, record.dropped, record.twice) == (len(data), 0, 0, 0)
    assert (record.result, record.reconnects, record.backlog) == ("delivered", 3, 0)
    assert not (tmp_path / "spill").exists() or os.listdir(tmp_path / "spill") == ["lock"]  # noqa: PTH208 - names


def test_a_reset_under_way_skips_nothing_that_was_not_acknowledged(spill: dict[str, Any]) -> None:
    """A receiver that stalls and resets: the next connection begins with the first byte its kernel did not have,
    and what had been sent beyond that comes once more."""
    data = payload(2, 12 * MIB)
    with Receiver(buffer=64 << 10) as receiver:
        with Relay(tee(receiver, spill, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.up()
            send_all(source, data)
            source.shutdown(socket.SHUT_WR)
            got = bytearray(receiver.read(100_000))
            last = -1
            while (now := receiver.waiting()) != last:  # until its window is shut
                last = now
                eventually(lambda last=last: receiver.waiting() != last or True, "a look")
            eventually(lambda: relay.moved() == len(data), "all is in the log")
            acknowledged = len(got) + receiver.waiting()
            receiver.reset()
            rest = receiver.rest()
            record = branch_record(relay)
    assert_same(rest, data[len(data) - len(rest) :])
    begun = len(data) - len(rest)
    assert begun <= acknowledged, "something was skipped"
    assert (
        acknowledged - begun <= record.twice <= 8 * MIB
    )  # a send queue; an acknowledgement may have been delayed
    assert (record.bytes, record.lost, record.reconnects) == (len(data), 0, 1)


def test_others_are_not_held_up(spill: dict[str, Any]) -> None:
    """While one receiver takes nothing the other gets the whole stream; then the first gets it too."""
    data = payload(3, 24 * MIB)
    with Receiver(buffer=64 << 10) as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, spill, address)) as relay, connected(relay.bound[-1]) as source:
            receiver.up()
            with accept(listener) as other:
                send_thread = sending(source, data)
                assert_same(receive_all(other), data)
                send_thread.join()
            assert_same(receiver.rest(), data)
            record = branch_record(relay)
    assert (record.result, record.dropped) == ("delivered", 0)


def sending(source: socket.socket, data: bytes) -> Any:
    """A thread that sends all of `data` and ends the stream."""

    def send() -> None:
        send_all(source, data)
        source.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_stages_behind_the_log_hold_nobody(spill: dict[str, Any]) -> None:
    """A throttled branch that spills gets all at its rate; the chain is done long before."""
    data = payload(4, 2 * MIB)
    stages = [{"throttle": {"rate": "4MiB/s", "burst": "64KiB"}}, "meter"]
    with Receiver() as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, spill, address, stages=stages)) as relay:
            receiver.up()
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                send_thread = sending(source, data)
                assert_same(receive_all(other), data)
                assert relay.moved() == len(data)
                assert receiver.accept()
                assert_same(receiver.rest(), data)
                send_thread.join()
                assert branch_record(relay).seconds > 0.3


# --- the bound --------------------------------------------------------------------------------------------


def full(spill: dict[str, Any], then: str, **more: Any) -> dict[str, Any]:
    """The policy with a bound that is soon reached."""
    return {**spill, "max": "1MiB", "then": then, "after": "50ms", **more}


def test_a_full_log_that_blocks_holds_the_source(spill: dict[str, Any]) -> None:
    """At the bound no more is read than fits the log and the pipes; when the sink is back all of it comes."""
    data = payload(5, 48 * MIB)
    with Receiver() as receiver:
        with Relay(tee(receiver, full(spill, "block"), "null:")) as relay:
            with connected(relay.bound[-1]) as source:
                sender = sending(source, data)
                held = [0]

                def still() -> bool:
                    before, held[0] = held[0], relay.moved()
                    return before == held[0] >= MIB

                eventually(still, "the source is held")
                assert held[0] < len(data)
                receiver.up()
                assert_same(receiver.rest(), data)
                sender.join()
                record = branch_record(relay)
    assert (record.bytes, record.dropped, record.lost) == (len(data), 0, 0)
    assert record.blocked_seconds > 0


def test_a_full_log_that_drops_leaves_aligned_gaps(spill: dict[str, Any]) -> None:
    """The others get everything; the sink gets a subsequence whose gaps are whole pieces, and counted."""
    data = payload(6, 24 * MIB)
    with Receiver() as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, full(spill, "drop", align=188), address)) as relay:
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                sender = sending(source, data)
                assert_same(receive_all(other), data)
                receiver.up()
                got = receiver.rest()
                sender.join()
                record = branch_record(relay)
    left_out = gaps(got, data)
    assert left_out
    assert all(start % 188 == 0 and (end % 188 == 0 or end == len(data)) for start, end in left_out)
    assert sum(end - start for start, end in left_out) == record.dropped
    assert (record.bytes, record.lost) == (len(got), 0)


def test_a_full_log_that_disconnects_ends_its_sink_alone(spill: dict[str, Any]) -> None:
    """The reason says how much was full for how long; the others get everything."""
    data = payload(7, 24 * MIB)
    with Receiver() as receiver, tcp_listener() as (listener, address):
        with Relay(tee(receiver, full(spill, "disconnect"), address)) as relay:
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                sender = sending(source, data)
                assert_same(receive_all(other), data)
                sender.join()
                record = branch_record(relay)
    assert record.result == "failed"
    assert "backlog of 2.0 MiB full for 0.1 s" in record.reason
    if "directory" in spill:
        assert "bytes wait in" in record.reason
        assert record.backlog > 0
    else:
        assert record.bytes == record.lost > 0  # what was in memory went nowhere
    assert record.bytes + record.backlog + record.dropped == len(data)


# --- disks that are full, or fail -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    if os.geteuid():
        pytest.skip("mounting a small filesystem needs root")
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run([program("mount"), "-t", "tmpfs", "-o", "size=4m", "none", path], check=False)
    if done.returncode:
        pytest.skip("mount is not allowed here")
    yield path
    subprocess.run([program("umount"), path], check=True)


@pytest.mark.parametrize("reserve", [1 << 20, -(64 << 20)], ids=["checked first", "ENOSPC"])
def test_a_full_disk_is_a_full_log(small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserve: int) -> None:
    """Whether the check found it or the write did: `then` decides, what was written stays, nothing is lost."""
    monkeypatch.setattr(relay.log, "RESERVE", reserve)
    data = payload(8, 16 * MIB)
    slow = {"policy": "spill", "directory": str(small_disk / "spill"), "then": "block", "after": "50ms"}
    with Receiver() as receiver:
        with Relay(tee(receiver, slow, "null:")) as running, connected(running.bound[-1]) as source:
            sender = sending(source, data)
            eventually(lambda: os.statvfs(small_disk).f_bavail * 4096 <= max(reserve, 0) + 4096, "it is full")
            # segments of 16 MiB are not passed before they are full: somebody makes room
            subprocess.run([program("mount"), "-o", "remount,size=64m", small_disk], check=True)
            receiver.up()
            assert_same(receiver.rest(), data)
            sender.join()
            record = branch_record(running)
    assert (record.result, record.bytes, record.dropped, record.lost) == ("delivered", len(data), 0, 0)


LIMITED = """
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: each}}
    stages:
      - tee: {{to: {{connect: "{away}"}}, on_slow: {{policy: spill, directory: spill, then: {then}}}}}
    sink: {{connect: "{there}"}}
"""


@pytest.mark.parametrize("then", ["drop", "block"])
def test_a_disk_that_fails_is_the_sinks_failure(tmp_path: Path, then: str) -> None:
    """A write that fails for good ends that sink with the errno and the log's name; the chain goes on. Under block
    the stream has failed, and its source is told by a reset."""
    data = payload(9, 6 * MIB)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))

    with Receiver() as away, tcp_listener() as (listener, there):
        config = LIMITED.format(away=away.address, there=there, then=then)
        with serving(config, tmp_path, preexec_fn=limit) as served:
            with socket.create_connection(("127.0.0.1", served.port())) as source, accept(listener) as other:
                sender = sending(source, data)
                assert_same(receive_all(other), data)
                other.close()
                sender.join()
                (record,) = served.sessions()
                if then == "block":
                    with pytest.raises(ConnectionResetError):
                        receive_all(source)
                else:
                    assert receive_all(source) == b""
            served.signal(signal.SIGTERM)
            served.wait()
    failed, whole = record["sinks"]
    assert "EFBIG" in failed["reason"]
    assert "bytes wait in spill/r." in failed["reason"]
    assert failed["backlog"] == 2 * MIB
    assert whole["result"] == "delivered"
    (kept,) = (tmp_path / "spill").glob("r.*/0*")
    assert_same(kept.read_bytes(), data[: 2 * MIB])


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_behind_a_log_in_memory_is_whole(tmp_path: Path) -> None:
    """The contract's camera: the archive is written through a log, gets its name when it is whole."""
    data = payload(10, 8 * MIB)
    to = {"file": str(tmp_path / "{route}-{id}.ts"), "sidecar": True}
    route = {
        "source": {"listen": "tcp://127.0.0.1:0"},
        "stages": [{"tee": {"to": to, "on_slow": "spill"}}],
        "sink": "null:",
    }
    with Relay(route) as relay, connected(relay.bound[-1]) as source:
        send_all(source, data)
        source.shutdown(socket.SHUT_WR)
        record = branch_record(relay)
    (file,) = tmp_path.glob("*.ts")
    assert_same(file.read_bytes(), data)
    assert (record.result, record.bytes) == ("delivered", len(data))
    assert (
        subprocess.run(
            [program("sha256sum"), "-c", f"{file.name}.sha256"], cwd=tmp_path, check=False
        ).returncode
        == 0
    )


def test_a_plain_file_of_a_route_without_end_is_written_in_place(tmp_path: Path) -> None:
    """With `one` the file behind the log grows under its own name, stream after stream."""
    config = "routes: {r: {source: {listen: 'tcp://127.0.0.1:0'}, sink: {file: all.bin, on_slow: spill}}}"
    with serving(config, tmp_path) as served:
        for turn in range(2):
            with socket.create_connection(("127.0.0.1", served.port())) as source:
                source.sendall(payload(turn, 100_000))
                source.shutdown(socket.SHUT_WR)
                receive_all(source)
            size, file = (turn + 1) * 100_000, tmp_path / "all.bin"
            eventually(lambda: file.exists() and file.stat().st_size == size, "it is written")  # noqa: B023 - asked now
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert_same((tmp_path / "all.bin").read_bytes(), payload(0, 100_000) + payload(1, 100_000))


# --- routes whose sinks outlive a stream, and drains --------------------------------------------------------

STANDING = """
drain: {drain}
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: {connections}}}
    sink: {{connect: "{address}", on_slow: {{policy: spill{directory}}}}}
"""


def test_a_standing_sink_gets_streams_that_came_while_it_was_away(tmp_path: Path) -> None:
    """With `one`, streams come one after the other whether or not the sink is there; it gets them all."""
    with Receiver() as receiver:
        config = STANDING.format(drain="10s", connections="one", address=receiver.address, directory="")
        with serving(config, tmp_path) as served:
            for turn in range(3):
                with socket.create_connection(("127.0.0.1", served.port())) as source:
                    source.sendall(payload(turn, 200_000))
                    source.shutdown(socket.SHUT_WR)
                    assert receive_all(source) == b""
            assert [record["sinks"][0]["backlog"] for record in served.sessions(3)] == [
                200_000,
                400_000,
                600_000,
            ]
            receiver.up()
            assert_same(receiver.read(600_000), b"".join(payload(turn, 200_000) for turn in range(3)))
            served.signal(signal.SIGTERM)
            assert receiver.rest() == b""
            assert served.wait() == 0


@pytest.mark.parametrize("connections", ["each", "one"])
@pytest.mark.parametrize("directory", ["", ", directory: spill"], ids=["memory", "disk"])
def test_a_drain_that_is_cut_short_says_what_waits(tmp_path: Path, connections: str, directory: str) -> None:
    """What is in a log on disk is kept, named, and delivered by the next start; in memory it is counted as lost."""
    data = payload(12, 3 * MIB)
    with Receiver() as receiver:
        config = STANDING.format(
            drain="200ms", connections=connections, address=receiver.address, directory=directory
        )
        with serving(config, tmp_path) as served:
            served.said("ready")
            with socket.create_connection(("127.0.0.1", served.port())) as source:
                source.sendall(data)
                source.shutdown(socket.SHUT_WR)
                if connections == "one":
                    served.sessions(1)
                else:
                    log = tmp_path / "spill"
                    eventually(
                        lambda: not directory or sum(p.stat().st_size for p in log.glob("*/0*")) == len(data),
                        "all is in the log",
                    )
                served.signal(signal.SIGTERM)
                assert served.wait() == 1
            if connections == "each":
                sink = served.sessions(1)[-1]["sinks"][0]
                assert sink["result"] == "failed"
                if directory:
                    assert f"{len(data)} bytes wait in spill/r." in sink["reason"]
                    assert sink["backlog"] == len(data)
                else:
                    assert sink["lost"] == sink["bytes"] > 0
            assert ("wait in spill/r." in served.text) == bool(directory)
        if not directory:
            return
        with serving(config, tmp_path) as served:
            served.said("of an earlier run go on to")
            served.said("ready")
            receiver.up()
            assert_same(receiver.read(len(data)), data)
            served.signal(signal.SIGTERM)
            assert receiver.rest() == b""
            assert served.wait() == 0
        assert os.listdir(tmp_path / "spill") == ["lock"]  # noqa: PTH208 - names


def test_a_directory_in_use_stops_the_start(tmp_path: Path) -> None:
    """A second relay on the same spill directory says so and exits with 4."""
    config = STANDING.format(
        drain="1s", connections="each", address="tcp://127.0.0.1:1", directory=", directory: spill"
    )
    with serving(config, tmp_path) as first:
        first.port()
        with serving(config, tmp_path) as second:
            assert second.wait() == 4
            assert "another relay uses it" in second.text
        first.signal(signal.SIGTERM)
        assert first.wait() == 0


def test_a_log_that_goes_while_logs_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is delivered between the listing and the look into it is none any more; the others are found."""
    for name in ("goes", "stays"):
        kept = relay.log.Log(tmp_path / name)
        kept.close(keep=True)
    directory = SpillDirectory(str(tmp_path))
    look = relay.spill.directory.is_log

    def gone_by_then(path: Path) -> bool:
        if path.name == "goes":
            shutil.rmtree(path)
        return look(path)

    monkeypatch.setattr(relay.spill.directory, "is_log", gone_by_then)
    assert directory.found() == ["stays"]
    directory.close()


def test_a_log_that_no_route_claims_is_kept_and_named(tmp_path: Path) -> None:
    """A log of a route that is not there any more is left as it is, and said at the start."""
    kept = relay.log.Log(tmp_path / "left")
    os.write(kept.tail(), b"abc")
    kept.appended(3)
    kept.close(keep=True)
    (tmp_path / "spill").mkdir()
    (tmp_path / "left").rename(tmp_path / "spill" / "gone.tcp")
    config = STANDING.format(
        drain="1s", connections="each", address="tcp://127.0.0.1:1", directory=", directory: spill"
    )
    with serving(config, tmp_path) as served:
        assert "spill/gone.tcp" in served.said("belongs to no route")["message"]
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert (tmp_path / "spill" / "gone.tcp" / f"{0:020d}").read_bytes() == b"abc"


# --- a buffer ---------------------------------------------------------------------------------------------


def test_a_buffer_is_backlog_beside_the_pipe() -> None:
    """A receiver that takes nothing holds nobody while the buffer has room; block then holds the source."""
    data = payload(13, 56 * MIB)
    with Receiver(buffer=64 << 10) as receiver:
        slow = {"policy": "block", "buffer": "8MiB"}
        receiver.up()
        with Relay(tee(receiver, slow, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.accept()
            sender = sending(source, data)
            held = [0]

            def still() -> bool:
                before, held[0] = held[0], relay.moved()
                return before == held[0] >= 8 * MIB

            eventually(still, "the source is held, and not before the buffer was full")
            assert held[0] < len(data)
            assert_same(receiver.rest(), data)
            sender.join()
            record = branch_record(relay)
    assert (record.result, record.bytes, record.lost) == ("delivered", len(data), 0)


def test_a_pause_that_fits_the_buffer_drops_nothing() -> None:
    """With drop, what fits the buffer waits there for a receiver that pauses: no gap."""
    data = payload(14, 10 * MIB)
    with Receiver(buffer=64 << 10) as receiver:
        slow = {"policy": "drop", "buffer": "16MiB", "after": "10ms"}
        receiver.up()
        with Relay(tee(receiver, slow, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.accept()
            send_all(source, data)
            source.shutdown(socket.SHUT_WR)
            eventually(lambda: relay.moved() == len(data), "all was read")
            assert_same(receiver.rest(), data)
            assert branch_record(relay).dropped == 0


def test_a_full_buffer_drops_whole_pieces() -> None:
    """Once the buffer is full for too long, gaps are aligned and counted; the others get everything."""
    data = payload(15, 32 * MIB)
    with Receiver(buffer=64 << 10) as receiver, tcp_listener() as (listener, address):
        slow = {"policy": "drop", "buffer": "2MiB", "after": "500ms", "align": 1316}
        with Relay(tee(receiver, slow, address)) as relay:
            receiver.up()
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                receiver.accept()
                taken: list[bytes] = []
                taker = threading.Thread(target=lambda: taken.append(receiver.rest()))
                feeder = threading.Thread(target=send_all, args=(source, data[: 24 * MIB]))
                feeder.start()
                begun = receive_exactly(other, 24 * MIB)  # far more than the branch can hold: it drops
                feeder.join()
                taker.start()  # before the end of the stream: from there on it must not stall for `after`
                sender = sending(source, data[24 * MIB :])
                assert_same(begun + receive_all(other), data)
                sender.join()
                taker.join()
                record = branch_record(relay)
    (got,) = taken
    left_out = gaps(got, data)
    assert left_out
    assert all(start % 1316 == 0 and (end % 1316 == 0 or end == len(data)) for start, end in left_out)
    assert sum(end - start for start, end in left_out) == record.dropped
    assert len(got) == record.bytes


def test_a_full_buffer_disconnects_and_says_how_much(tmp_path: Path) -> None:
    """The reason counts the buffer as backlog, and what was in it is lost."""
    data = payload(16, 24 * MIB)
    with Receiver(buffer=64 << 10) as receiver, tcp_listener() as (listener, address):
        slow = {"policy": "disconnect", "buffer": "3MiB", "after": "20ms"}
        with Relay(tee(receiver, slow, address)) as relay:
            receiver.up()
            with connected(relay.bound[-1]) as source, accept(listener) as other:
                sender = sending(source, data)
                assert_same(receive_all(other), data)
                sender.join()
                record = branch_record(relay)
    assert "backlog of 4.0 MiB full" in record.reason
    assert record.lost > 3 * MIB


def test_a_break_behind_a_buffer_fails_as_without_one() -> None:
    """With a pipeline a connection, a block sink that breaks fails the stream: the source is reset."""
    with Receiver(buffer=64 << 10) as receiver:
        slow = {"policy": "block", "buffer": "8MiB"}
        receiver.up()
        with Relay(tee(receiver, slow, "null:")) as relay, connected(relay.bound[-1]) as source:
            receiver.accept()
            send_all(source, payload(17, 2 * MIB))
            eventually(receiver.waiting, "some came")
            receiver.down()
            source.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                receive_all(source)
            record = branch_record(relay)
    assert record.result == "failed"
    assert record.lost > 0


def test_a_buffered_standing_sink_rejoins(tmp_path: Path) -> None:
    """With `one` it is connected again, without what was under way and with what waits in the buffer."""
    with Receiver() as receiver:
        config = (
            "routes: {r: {source: {listen: 'tcp://127.0.0.1:0', connections: one}, sink: {connect: '"
            + receiver.address
            + "', on_slow: {policy: block, buffer: 8MiB}}}}"
        )
        with serving(config, tmp_path) as served:
            with socket.create_connection(("127.0.0.1", served.port())) as source:
                source.sendall(payload(1, 100_000))
                receiver.up()
                assert_same(receiver.read(100_000), payload(1, 100_000))
                receiver.down()
                served.said("is away")
                source.sendall(payload(2, 3 * MIB))
                source.shutdown(socket.SHUT_WR)
                receiver.up()
                assert_same(receiver.read(3 * MIB), payload(2, 3 * MIB))
                assert receive_all(source) == b""
            (record,) = served.sessions()
            served.signal(signal.SIGTERM)
            assert receiver.rest() == b""
            assert served.wait() == 0
    assert record["sinks"][0].get("lost", 0) == 0


# --- what the configuration refuses -----------------------------------------------------------------------

HEAD = "routes: {a: {source: 'tcp://:1', "


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ("sink: {file: x, on_slow: {policy: spill, directory: d}}", "'x' is none; leave 'directory' out"),
        (
            "stages: [tee: {to: {file: x}, on_slow: {policy: spill, directory: d}}], sink: 'null:'",
            "leave 'directory'",
        ),
        (
            "sink: {listen: 'tcp://:2', on_slow: {policy: spill, directory: d}}",
            "its subscribers read from one ring in memory",
        ),
        ("sink: {connect: 'tcp://h:2', on_slow: {policy: spill, buffer: 1MiB}}", "'max' bounds it"),
        *(
            (
                f"stages: [tee: {{stages: [{stage}], to: 'tcp://h:2', on_slow: spill}}], sink: 'null:'",
                f"'{stage.partition(':')[0]}' cannot be in a branch that spills",
            )
            for stage in ("header: {text: x}", "limit: {stop: 1KB}", "checksum", "tee: {to: 'tcp://h:3'}")
        ),
        (
            "stages: [tee: {to: 'tcp://h:2', on_slow: {policy: spill, directory: d}}], "
            "sink: {connect: 'tcp://h:2', on_slow: {policy: spill, directory: d}}",
            "name another directory",
        ),
    ],
)
def test_what_a_log_cannot_do_is_refused(route: str, said: str) -> None:
    """A log that would give other bytes than promised is a configuration error that says what to do."""
    with pytest.raises(ConfigErrors) as caught:
        loads(HEAD + route + "}}", "f", to_run=True)
    (error,) = caught.value.errors
    assert said in str(error)
    assert error.line == 1
    assert error.column > len("routes: ")


def test_what_a_log_can_do_is_accepted(tmp_path: Path) -> None:
    """Logs and buffers in front of sinks of every kind that can have one."""
    (tmp_path / "c.yaml").write_text(
        HEAD
        + "stages: [tee: {stages: [meter, throttle: 1MB/s], to: 'unix:///s', on_slow: {policy: spill, directory: d}},"
        " tee: {to: {file: x}, on_slow: spill}, tee: {to: 'fifo:///f', on_slow: {policy: spill, directory: d}},"
        " tee: {to: {file: y, on_slow: {policy: drop, buffer: 1MiB, align: 188}}}],"
        " sink: {connect: 'tcp://h:2', on_slow: {policy: spill, directory: d, max: 1GiB, then: drop, align: 188}}}}"
    )
    assert load_to_run(str(tmp_path / "c.yaml")).routes


# --- a disk that fails and works again ----------------------------------------------------------------------


@pytest.mark.parametrize("then", ["block", "drop"])
def test_a_standing_sink_recovers_with_its_disk(tmp_path: Path, then: str) -> None:
    """While its log cannot be written a standing spill sink is away, under its `then`; then it goes on, and the record
    counts what was lost."""
    data, more = payload(9, 6 * MIB), payload(10, MIB)
    with Receiver() as receiver, tcp_listener() as (listener, there):
        config = LIMITED.format(away=receiver.address, there=there, then=f"{then}, after: 200ms")
        config = config.replace("connections: each", "connections: one")

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, resource.RLIM_INFINITY))

        with serving(config, tmp_path, preexec_fn=limit) as served, accept(listener) as other:
            for stream in (data, more):
                with socket.create_connection(("127.0.0.1", served.port())) as source:
                    sender = sending(source, stream)
                    assert_same(receive_exactly(other, len(stream)), stream)
                    sender.join()
                    with contextlib.suppress(ConnectionResetError):  # under block the stream has failed
                        receive_all(source)
                if stream is data:
                    served.said("bytes are lost")
                    served.said("go on to")  # it stands again
                    resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                    receiver.up()
            records = [each["sinks"][0] for each in served.sessions(2)]
            lost = sum(each["lost"] + each["dropped"] for each in records)
            got = receiver.read(len(data) + len(more) - lost)
            served.signal(signal.SIGTERM)
            served.wait()
    assert 0 < lost <= 4 * MIB
    assert_same(got[: 2 * MIB], data[: 2 * MIB])
    assert_same(got[-MIB:], more)
    assert (records[0]["result"], records[1]["result"]) == ("failed", "delivered")
    assert "EFBIG" in records[0]["reason"]


def test_a_disk_that_goes_on_failing_takes_nothing_more_under_block(tmp_path: Path) -> None:
    """A standing spill sink loses what was on its way when its disk failed, once: then `block` holds the source, what
    the log has is delivered, and every byte that comes later arrives when the disk works again."""
    data = payload(12, 40 * MIB)
    with Receiver() as receiver, tcp_listener() as (listener, there):
        config = LIMITED.format(away=receiver.address, there=there, then="block, after: 200ms")
        config = config.replace("connections: each", "connections: one")

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, resource.RLIM_INFINITY))

        with serving(config, tmp_path, preexec_fn=limit) as served, accept(listener) as other:
            with socket.create_connection(("127.0.0.1", served.port())) as source:
                sender = sending(source, data)
                reader = threading.Thread(target=lambda: receive_exactly(other, len(data)))
                reader.start()
                lost = int(served.said("bytes are lost")["message"].split(" bytes")[0].rpartition(" ")[2])
                served.said("still fails")
                served.said("it holds the source")
                receiver.up()
                got = bytearray(receiver.read(2 * MIB))  # the disk takes nothing, it gives
                resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                got += receiver.read(len(data) - len(got) - lost)
                sender.join()
                reader.join()
                with contextlib.suppress(ConnectionResetError):  # under block the stream has failed
                    receive_all(source)
            (sink, _there) = served.sessions()[0]["sinks"]
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    assert (sink["lost"], sink["dropped"]) == (lost, 0)
    assert len([line for line in served.lines if "bytes are lost" in line["message"]]) == 1
    assert_same(bytes(got), data[: 2 * MIB] + data[2 * MIB + lost :])
    assert not list(tmp_path.glob("**/trial"))


def test_a_full_disk_empties_when_its_sink_has_had_all(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk smaller than a segment is full again and again: what the sink has had makes room, and nobody hangs."""
    monkeypatch.setattr(relay.log, "RESERVE", 1 << 20)
    data = payload(13, 16 * MIB)
    slow = {"policy": "spill", "directory": str(small_disk / "spill"), "then": "block", "after": "50ms"}
    with Receiver() as receiver:
        receiver.up()
        with Relay(tee(receiver, slow, "null:")) as running, connected(running.bound[-1]) as source:
            sender = sending(source, data)
            assert_same(receiver.rest(), data)
            sender.join()
            record = branch_record(running)
    assert (record.result, record.bytes, record.dropped, record.lost) == ("delivered", len(data), 0, 0)


# --- streams that break off ---------------------------------------------------------------------------------


def until_reset(sock: socket.socket) -> tuple[bytes, bool]:
    """What comes, and whether it had an orderly end."""
    got = bytearray()
    try:
        for piece in received(sock):
            got += piece
    except ConnectionResetError:
        return bytes(got), False
    return bytes(got), True


@pytest.mark.parametrize("directory", ["", ", directory: spill"])
def test_what_a_broken_stream_left_in_its_log_is_delivered(tmp_path: Path, directory: str) -> None:
    """A source that resets leaves no orphan: what was logged comes out when the sink is there, cut off at its end."""
    data = payload(11, 2 * MIB)
    with Receiver() as receiver:
        config = (
            'routes: {r: {source: {listen: "tcp://127.0.0.1:0", connections: each}, '
            f'sink: {{connect: "{receiver.address}", on_slow: {{policy: spill{directory}}}}}}}}}'
        )
        with serving(config, tmp_path) as served:
            with socket.create_connection(("127.0.0.1", served.port())) as source:
                source.sendall(data)
                served.said("is away")
                eventually(lambda: unacknowledged(source.fileno()) == 0, "relay's kernel has it")
                reset(source)
            served.said("reading from")
            receiver.up()
            connection = receiver.accept()
            got, ended = until_reset(connection)
            assert not ended
            (record,) = served.sessions()
            assert not list((tmp_path / "spill").glob("r.*"))
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    (sink,) = record["sinks"]
    assert_same(got, data[: len(got)])
    assert (record["result"], sink["result"], sink["lost"]) == ("failed", "failed", 0)
    assert len(got) == sink["bytes"] == record["bytes"]
