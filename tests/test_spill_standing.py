"""Logs that outlive a stream: of files, of sinks that stand while streams come and go; what a drain leaves in them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from flapping import Receiver
from peers import assert_same, connected, eventually, payload, program, receive_all, send_all
from relays import Relay, serving
from spills import MIB, branch_record

import relay.log.log
import relay.spill.directory
from relay.spill.directory import SpillDirectory

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
        kept = relay.log.log.Log(tmp_path / name)
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
    kept = relay.log.log.Log(tmp_path / "left")
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
