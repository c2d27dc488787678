"""Every stage at work on real streams: what passes, what is changed, what the record says."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from faults import strace_inject
from givers import SOURCES
from peers import assert_same, eventually, payload, run
from relays import RELAY, ROOT, Relay, environment
from takers import SINKS

from relay.journal.record import SessionRecord


def through(tmp_path: Path, data: bytes, stages: list[Any], sink: Any = None, **more: Any) -> SessionRecord:
    """Sends `data` through the stages into tmp_path/out; the session's record."""
    with SOURCES["fd-pipe"](tmp_path) as giver:
        route = {"source": giver.source, "stages": stages, "sink": sink or str(tmp_path / "out"), **more}
        with Relay(route) as relay:
            giver.start(relay)
            try:
                giver.give(data)
            except BrokenPipeError:
                pass  # a limit ended the source
            giver.end()
            record = relay.wait()
    assert record is not None
    return record


def out(tmp_path: Path) -> bytes:
    """What arrived."""
    return (tmp_path / "out").read_bytes()


# --- throttle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "burst", "size"), [(1 << 20, 1 << 19, 1 << 20), (4 << 20, 65536, 2 << 20)])
def test_a_throttle_keeps_its_rate(tmp_path: Path, rate: int, burst: int, size: int) -> None:
    """What exceeds the burst takes at least its bytes over the rate; everything arrives."""
    data = payload(1, size)
    began = time.monotonic()
    record = through(tmp_path, data, [{"throttle": {"rate": rate, "burst": burst}}])
    seconds = time.monotonic() - began
    assert_same(out(tmp_path), data)
    assert record.result == "delivered"
    assert seconds >= (size - burst) / rate
    assert seconds < (size - burst) / rate + 1


def test_a_throttled_branch_leaves_the_chain_alone(tmp_path: Path) -> None:
    """A throttle in a branch that drops holds nobody: the chain gets everything, the branch a part."""
    data = payload(2, 8 << 20)
    tee = {
        "to": str(tmp_path / "slow"),
        "stages": [{"throttle": {"rate": 1 << 20, "burst": 65536}}],
        "on_slow": {"policy": "drop", "after": "10ms"},
    }
    record = through(tmp_path, data, [{"tee": tee}])
    assert_same(out(tmp_path), data)
    slow = record.sinks[0]
    assert slow.dropped > 0
    assert slow.bytes + slow.dropped == len(data)
    assert (tmp_path / "slow").stat().st_size == slow.bytes


# --- meter ------------------------------------------------------------------------------------------------


def test_a_meter_counts_and_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meter says so far and rate at its interval, and the record has its bytes; the stream is unchanged."""
    monkeypatch.setattr(logging.getLogger("relay"), "propagate", True)
    with caplog.at_level(logging.INFO, "relay.meter"), SOURCES["fd-pipe"](tmp_path) as giver:
        with Relay(
            {
                "source": giver.source,
                "stages": [{"meter": {"every": "20ms", "name": "m"}}],
                "sink": str(tmp_path / "out"),
            }
        ) as relay:
            giver.give(b"x" * 12345)
            eventually(
                lambda: any(
                    line.name == "relay.meter" and getattr(line, "bytes", 0) == 12345
                    for line in caplog.records
                ),
                "the meter speaks",
            )
            giver.end()
            record = relay.wait()
    assert record is not None
    assert record.stages[0]["stage"] == "m"
    assert record.stages[0]["bytes"] == 12345
    assert record.stages[0]["bytes_per_second"] > 0
    assert out(tmp_path) == b"x" * 12345


# --- limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"skip": 3}, slice(3, None)),
        ({"stop": 70_000}, slice(0, 70_000)),
        ({"skip": 65_537, "stop": 65_537}, slice(65_537, 131_074)),
        ({"skip": 10_000_000}, slice(0, 0)),
        ({"stop": 0}, slice(0, 0)),
        ({"stop": 10_000_000}, slice(0, None)),
    ],
)
def test_a_limit_skips_and_stops(tmp_path: Path, settings: dict[str, int], expected: slice) -> None:
    """The first `skip` bytes are gone, `stop` bytes follow, then the stream ends; it counts as delivered."""
    data = payload(3, 300_000)
    record = through(tmp_path, data, [{"limit": settings}])
    assert_same(out(tmp_path), data[expected])
    assert record.result == "delivered"


def test_a_limit_ends_an_endless_source(tmp_path: Path) -> None:
    """When nothing else wants bytes the source is not read to an end that never comes."""
    with SOURCES["tcp4"](tmp_path) as giver:
        with Relay(
            {"source": giver.source, "stages": [{"limit": {"stop": 1000}}], "sink": str(tmp_path / "out")}
        ) as relay:
            giver.start(relay)
            giver.give(b"x" * 5000)
            record = relay.wait()
    assert record is not None
    assert record.result == "delivered"
    assert record.ended_by == "sinks"
    assert out(tmp_path) == b"x" * 1000


def test_a_limit_in_a_branch_leaves_the_chain_alone(tmp_path: Path) -> None:
    """A branch that stops early has its end; the chain gets the rest."""
    data = payload(4, 1 << 20)
    tee = {"to": str(tmp_path / "head"), "stages": [{"limit": {"stop": 1000}}]}
    record = through(tmp_path, data, [{"tee": tee}])
    assert_same(out(tmp_path), data)
    assert (tmp_path / "head").read_bytes() == data[:1000]
    assert [sink.result for sink in record.sinks] == ["delivered", "delivered"]


# --- header -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 200_000])
@pytest.mark.parametrize("kind", ["text", "base64", "file", "large"])
def test_a_header_comes_first(tmp_path: Path, kind: str, size: int) -> None:
    """A header of text, base64 or a file, small or larger than a pipe, stands before streams of any size."""
    head = payload(5, 3_000_001) if kind == "large" else "grüße\n".encode()
    (tmp_path / "head").write_bytes(head)
    settings = {
        "text": {"text": head.decode() if kind == "text" else ""},
        "base64": {"base64": base64.b64encode(head).decode()},
    }.get(kind, {"file": str(tmp_path / "head")})
    data = payload(6, size)
    record = through(tmp_path, data, [{"header": settings}])
    assert record.result == "delivered"
    assert_same(out(tmp_path), head + data)


def test_a_header_is_filled_in(tmp_path: Path) -> None:
    """{route}, {time}, {peer} and {id} get their values; other braces stay."""
    through(tmp_path, b"body", [{"header": {"text": '{"a": 1} {route} {time} {id}|'}}])
    before, _, rest = out(tmp_path).decode().partition(" r ")
    assert before == '{"a": 1}'
    assert rest.endswith("|body")
    assert rest[:8].isdigit()


def test_a_header_in_a_branch_is_in_that_branch_only(tmp_path: Path) -> None:
    """The chain and the other branch do not see it."""
    data = payload(7, 500_000)
    tees = [
        {"tee": {"to": str(tmp_path / "with"), "stages": [{"header": {"text": "head "}}]}},
        {"tee": {"to": str(tmp_path / "without")}},
    ]
    through(tmp_path, data, tees)
    assert_same((tmp_path / "with").read_bytes(), b"head " + data)
    assert_same((tmp_path / "without").read_bytes(), data)
    assert_same(out(tmp_path), data)


def test_a_header_where_vmsplice_is_denied(tmp_path: Path) -> None:
    """Where the kernel refuses vmsplice the header is written instead."""
    (tmp_path / "c.yaml").write_text(
        "routes: {r: {source: in, stages: [{header: {text: 'head '}}], sink: out}}"
    )
    (tmp_path / "in").write_bytes(b"body")
    argv = strace_inject([*RELAY, "serve", "c.yaml"], "vmsplice:error=EPERM")
    done = run(argv, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert out(tmp_path) == b"head body"


def test_a_header_that_is_missing(tmp_path: Path) -> None:
    """The session fails as its source does, and names the file and the stage."""
    record = through(tmp_path, b"", [{"header": {"file": str(tmp_path / "none")}}])
    assert record.result == "failed"
    assert "reading the header from" in record.reason
    assert "none" in record.reason
    assert not (tmp_path / "out").exists()


# --- checksum ---------------------------------------------------------------------------------------------

KNOWN = {
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "blake3": lambda data: __import__("blake3").blake3(data).hexdigest(),
    "xxh3": lambda data: __import__("xxhash").xxh3_64(data).hexdigest(),
    "crc32c": lambda data: f"{__import__('crc32c').crc32c(data):08x}",
}


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
@pytest.mark.parametrize("algorithm", KNOWN)
def test_a_checksum_of_the_stream(tmp_path: Path, algorithm: str, size: int) -> None:
    """The record has the digest of what passed; the stream is unchanged."""
    data = payload(8, size)
    record = through(tmp_path, data, [{"checksum": algorithm}])
    assert record.stages == [{"stage": "checksum", "algorithm": algorithm, "digest": KNOWN[algorithm](data)}]
    assert_same(out(tmp_path), data)


def test_a_checksum_sees_the_stream_at_its_place(tmp_path: Path) -> None:
    """Before and after a header and a limit the digests differ as the stream does."""
    data = payload(9, 100_000)
    stages = [
        {"checksum": {"algorithm": "sha256", "name": "before"}},
        {"header": {"text": "head "}},
        {"limit": {"stop": 50_000}},
        {"checksum": {"algorithm": "sha256", "name": "after"}},
    ]
    record = through(tmp_path, data, stages)
    digests = {stage["stage"]: stage["digest"] for stage in record.stages}
    assert_same(out(tmp_path), (b"head " + data)[:50_000])
    assert digests["before"] == hashlib.sha256(data).hexdigest()
    assert digests["after"] == hashlib.sha256(out(tmp_path)).hexdigest()


@pytest.mark.parametrize(
    ("algorithm", "tool"), [("sha256", "sha256sum"), ("blake3", "b3sum"), ("xxh3", "xxhsum"), ("crc32c", "")]
)
@pytest.mark.parametrize("branch", [False, True])
def test_a_sidecar_that_the_standard_tool_verifies(
    tmp_path: Path, algorithm: str, tool: str, branch: bool
) -> None:
    """The checksum beside the file is accepted by the tool of that name, and refused once the file changed."""
    data = payload(10, 700_000)
    sink = {"file": str(tmp_path / "out"), "sidecar": algorithm}
    record = (
        through(tmp_path, data, [{"tee": {"to": sink}}], "null:")
        if branch
        else through(tmp_path, data, [], sink)
    )
    assert record.result == "delivered"
    assert_same(out(tmp_path), data)
    sidecar = tmp_path / f"out.{algorithm}"
    assert KNOWN[algorithm](data) in sidecar.read_text()
    if tool:
        assert run([tool, "-c", sidecar.name], cwd=tmp_path).returncode == 0
        (tmp_path / "out").write_bytes(data[:-1] + b"?")
        assert run([tool, "-c", sidecar.name], cwd=tmp_path).returncode != 0


# --- tee --------------------------------------------------------------------------------------------------


def test_tees_nested_three_deep(tmp_path: Path) -> None:
    """A branch of a branch of a branch gets the same bytes."""
    data = payload(11, 2 << 20)
    tee: dict[str, Any] = {"to": str(tmp_path / "leaf")}
    for depth in range(3):
        tee = {"to": str(tmp_path / f"depth{depth}"), "stages": [{"tee": tee}]}
    record = through(tmp_path, data, [{"tee": tee}])
    assert record.result == "delivered"
    for name in ("leaf", "depth0", "depth1", "depth2", "out"):
        assert_same((tmp_path / name).read_bytes(), data)
    assert len(record.sinks) == 5


def test_thirty_two_branches_to_files_and_sockets(tmp_path: Path) -> None:
    """16 files and 16 sockets beside the chain all get every byte."""
    import contextlib

    data = payload(12, 3 << 20)
    with contextlib.ExitStack() as stack:
        takers = []
        for number in range(32):
            place = tmp_path / str(number)
            place.mkdir()
            takers.append(stack.enter_context(SINKS[("file", "tcp4", "file", "unix")[number % 4]](place)))
        giver = stack.enter_context(SOURCES["tcp4"](tmp_path))
        route = {
            "source": giver.source,
            "stages": [{"tee": {"to": taker.sink}} for taker in takers],
            "sink": str(tmp_path / "out"),
        }
        relay = stack.enter_context(Relay(route))
        for taker in takers:
            taker.take()
        giver.start(relay)
        giver.give(data)
        giver.end()
        record = relay.wait()
        assert record is not None
        assert record.result == "delivered"
        for taker in takers:
            assert_same(taker.taken(), data)
        assert_same(out(tmp_path), data)


def test_a_branch_that_fails_takes_its_branches_only(tmp_path: Path) -> None:
    """A nested sink that cannot be opened fails alone: its siblings in the same branch are whole."""
    data = payload(13, 1 << 20)
    inner = {"tee": {"to": str(tmp_path / "no" / "such" / "place")}}
    record = through(tmp_path, data, [{"tee": {"to": str(tmp_path / "outer"), "stages": [inner]}}])
    assert [sink.result for sink in record.sinks].count("failed") == 1
    assert record.result == "partial"
    assert_same((tmp_path / "outer").read_bytes(), data)
    assert_same(out(tmp_path), data)


@pytest.mark.parametrize("method", ["zero-copy", "copy"])
def test_all_stages_together_by_either_method(tmp_path: Path, method: str) -> None:
    """Header, limit, checksum, meter, throttle and nested tees in one route agree, copied or not."""
    data = payload(14, 2 << 20)
    stages = [
        {"header": {"text": "H"}},
        {"checksum": "xxh3"},
        {"tee": {"to": str(tmp_path / "a"), "stages": [{"limit": {"skip": 1}}, {"header": {"text": "G"}}]}},
        "meter",
        {"throttle": {"rate": "200MB/s"}},
        {"limit": {"stop": 1 << 20}},
    ]
    record = through(tmp_path, data, stages, method=method)
    assert record.result == "delivered"
    assert_same((tmp_path / "a").read_bytes(), b"G" + data)
    assert_same(out(tmp_path), (b"H" + data)[: 1 << 20])
    assert record.stages[0]["digest"] == KNOWN["xxh3"](b"H" + data)


# --- a stage of one's own ---------------------------------------------------------------------------------


def test_adding_a_stage_touches_no_other_file(tmp_path: Path) -> None:
    """One new file in relay/stages is a stage: in the configuration, the schema, and at work."""
    shutil.copytree(ROOT / "relay", tmp_path / "relay", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "relay" / "stages" / "stamp.py").write_text(
        textwrap.dedent(
            '''
            """stamp: a word in front of the stream."""
            from relay.kernel.arena import Arena
            from relay.stages.base import StageSettings
            from relay.stages.stage import Stage

            class Settings(StageSettings):
                """Puts a word in front."""
                kind = "stamp"
                word: str = "stamped "
                def make(self):
                    return Stamp(self)

            class Stamp(Stage):
                def __init__(self, settings):
                    super().__init__(settings.kind, settings.name or settings.kind)
                    self.word = settings.word
                def begin(self, turn):
                    self.arena = Arena(self.word.encode())
                    self.node.prefix, self.node.prefix_left = self.arena.pointer(), self.arena.size
                def close(self):
                    self.arena.close()
            '''
        )
    )
    (tmp_path / "in").write_bytes(b"body")
    (tmp_path / "c.yaml").write_text("routes: {r: {source: in, stages: [{stamp: {word: 'my '}}], sink: out}}")
    own = environment(PYTHONPATH=str(tmp_path))
    argv = [sys.executable, "-m", "relay"]
    done = subprocess.run(
        [*argv, "serve", "c.yaml"], cwd=tmp_path, env=own, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert out(tmp_path) == b"my body"
    (tmp_path / "c.yaml").write_text("routes: {r: {source: in, stages: [stampp], sink: out}}")
    done = subprocess.run(
        [*argv, "serve", "c.yaml"], cwd=tmp_path, env=own, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 3
    assert b"did you mean 'stamp'" in done.stderr
    done = subprocess.run(
        [*argv, "schema"], cwd=tmp_path, env=own, capture_output=True, timeout=20, check=False
    )
    assert "stamp" in json.dumps(json.loads(done.stdout))
    assert os.listdir(tmp_path / "relay" / "stages").count("stamp.py") == 1  # noqa: PTH208 - only the name
