"""Logs on disks that are full or fail, for good or for a while."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from flapping import Receiver
from peers import (
    accept,
    assert_same,
    connected,
    eventually,
    payload,
    program,
    receive_all,
    receive_exactly,
    tcp_listener,
)
from relays import Relay, serving
from spills import MIB, branch_record, sending, tee

import relay.log.log
import relay.spill.directory

# --- disks that are full, or fail -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    with disks.small_disk(tmp_path / "disk", 4 * MIB) as place:
        yield place


@pytest.mark.parametrize("reserve", [1 << 20, -(64 << 20)], ids=["checked first", "ENOSPC"])
def test_a_full_disk_is_a_full_log(small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserve: int) -> None:
    """Whether the check found it or the write did: `then` decides, what was written stays, nothing is lost."""
    monkeypatch.setattr(relay.log.log, "RESERVE", reserve)
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
                    if (
                        stream is data and then == "block"
                    ):  # what was not on its way yet waits, and holds the source
                        served.said("bytes are lost")
                        resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
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
    monkeypatch.setattr(relay.log.log, "RESERVE", 1 << 20)
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
