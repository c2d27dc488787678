"""Stages of duplex routes, `stages` towards the sink and `replies` on the way back: what they do, and to whom not.

`RELAY_EXAMPLES=N` runs the random schedules N times instead of a few.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import socket
import time
from pathlib import Path

import pytest
from duplexes import (
    BOTH,
    Duplex,
    connected,
    descriptors,
    in_background,
    listener,
    outcome,
    relayed,
    reset,
    turned_away,
)
from mirrors import Mirror
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    tcp_listener,
)
from stories import MIXES, play

from relay.config.data import from_data
from relay.kernel.probe import machine
from relay.planning.plan import make_plan

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "12"))


# -- what stages do


def test_a_throttle_holds_its_own_direction(tmp_path: Path) -> None:
    """Replies at 1 MB/s take their time, requests beside them do not."""
    replies = [{"throttle": {"rate": "1MB/s", "burst": "100kB"}}]
    with relayed("tcp", "tcp", tmp_path, replies=replies) as (client, server, _duplex):
        began = time.monotonic()
        sender = in_background(server.sendall, bytes(600_000))
        client.sendall(bytes(5_000_000))
        receive_exactly(server, 5_000_000)
        assert time.monotonic() - began < 0.4
        receive_exactly(client, 600_000)
        assert time.monotonic() - began > 0.4
        sender.join(PATIENCE)


def test_header_limit_checksum_and_meter(tmp_path: Path) -> None:
    """Each stage acts on the direction it is written for, and says in the record which one that was."""
    stages = ["meter", {"checksum": "sha256"}, {"header": {"text": "{route} {peer}\n"}}]
    replies = [{"limit": {"skip": 5, "stop": 6}}, {"checksum": {"algorithm": "crc32c", "name": "answers"}}]
    with relayed("tcp", "tcp", tmp_path, stages=stages, replies=replies) as (client, server, duplex):
        name = f"r 127.0.0.1:{client.getsockname()[1]}\n".encode()
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(server) == name + b"question"
        server.sendall(b"skip-answer and more")
        assert receive_all(client) == b"answer"
        server.close()
        record = duplex.record()
    meter, digest, answers = record.stages
    assert (meter["stage"], meter["bytes"]) == ("meter", 8)
    assert digest["digest"] == hashlib.sha256(b"question").hexdigest()
    assert (answers["stage"], answers["way"]) == ("answers", "back")
    assert answers["digest"]
    assert (record.result, record.bytes, record.back) == ("delivered", 8, 6)
    assert record.sinks[0].bytes == 8 + len(name)


def test_a_branch_has_stages_of_its_own(tmp_path: Path) -> None:
    """Behind a tee the stream may be headed and cut short for the mirror alone."""
    with Mirror(tmp_path) as mirror:
        branch = {
            "stages": [{"limit": {"stop": 4}}, {"header": {"text": "<{id}>"}}],
            "to": mirror.address,
            "on_slow": "drop",
        }
        with relayed("tcp", "tcp", tmp_path, replies=[{"tee": branch}]) as (client, server, duplex):
            server.sendall(b"1234567890")
            server.close()
            assert receive_all(client) == b"1234567890"
            client.close()
            record = duplex.record()
        eventually(lambda: mirror.got, "the mirror has it")
        assert mirror.got == [f"<{record.id}>1234".encode()]


def test_a_header_file_that_is_missing_ends_the_session(tmp_path: Path) -> None:
    """A stage that cannot begin: both parties are reset, the record says why, and the next one is served again."""
    header = tmp_path / "header"
    with tcp_listener() as (listening, address):
        stages = [{"header": {"file": str(header)}}]
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, replies=stages) as duplex:
            assert turned_away(duplex.address)
            with accept(listening) as server:
                server.settimeout(PATIENCE)
                assert outcome(server) == (b"", "ConnectionResetError")
            record = duplex.record()
            assert (record.result, record.ended_by) == ("failed", "relay")
            assert "header" in record.reason
            header.write_bytes(b"hello ")
            with connected(duplex.address) as client, accept(listening) as server:
                server.sendall(b"you")
                server.close()
                assert receive_all(client) == b"hello you"


# -- bytes


@pytest.mark.parametrize("method", ["auto", "copy", "zero-copy"])
@pytest.mark.parametrize(("source", "sink"), MIXES)
def test_random_schedules(tmp_path: Path, source: str, sink: str, method: str) -> None:
    """Whatever is sent in whatever pieces, read or not, half-closed when: both sides and both mirrors get it all."""
    with Mirror(tmp_path) as there, Mirror(tmp_path) as back:
        slow = [{"policy": "block"}, {"policy": "spill"}]
        for seed in range(EXAMPLES):
            rng = random.Random(seed)
            stages = {
                "stages": [{"tee": {"to": there.address, "on_slow": rng.choice(slow)}}],
                "replies": [{"tee": {"to": back.address, "on_slow": rng.choice(slow)}}],
            }
            for some in stages.values():
                some += rng.choice([[], ["meter"], [{"checksum": "xxh3"}], [{"tee": {"to": "null:"}}]])
            where = "tcp://127.0.0.1:0" if source == "tcp" else f"unix://{tmp_path}/{seed}"
            with listener(sink, tmp_path, f"sink-{seed}") as (listening, address):
                duplex = Duplex({"listen": where}, {"connect": address}, method=method, **stages)
                with duplex, connected(duplex.address) as client, accept(listening) as server:
                    streams = play(rng, client, server)
                    record = duplex.record()
                    assert record.result == "delivered", (seed, record.reason)
            eventually(lambda want=seed: len(there.got) == len(back.got) == want + 1, "the mirrors have it")
            assert_same(there.got[seed], streams[0])
            assert_same(back.got[seed], streams[1])


# -- resets


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_reaches_a_side_that_does_not_read(tmp_path: Path, who: str) -> None:
    """A party that resets while the other one takes nothing: that one hears of it within seconds, not never."""
    with relayed("tcp", "tcp", tmp_path, **BOTH) as (client, server, duplex):
        bad, good = (client, server) if who == "client" else (server, client)
        bad.settimeout(0.5)
        with pytest.raises(TimeoutError):
            bad.sendall(bytes(64 << 20))
        reset(bad)
        record = duplex.record()
        assert record.result == "failed"
        assert record.ended_by == ("source" if who == "client" else "sinks")
        assert outcome(good)[1] == "ConnectionResetError"


@pytest.mark.parametrize("shape", ["plain", "mirrored"])
@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_behind_a_half_close_passes(tmp_path: Path, who: str, shape: str) -> None:
    """A party ends its stream, and then resets while the other one is silent: that one hears of both, in seconds."""
    with relayed("tcp", "tcp", tmp_path, **({} if shape == "plain" else BOTH)) as (client, server, duplex):
        bad, good = (client, server) if who == "client" else (server, client)
        bad.sendall(b"last words")
        bad.shutdown(socket.SHUT_WR)
        assert outcome(good) == (b"last words", "end")
        reset(bad)
        record = duplex.record()
        assert (record.result, record.ended_by) == ("failed", "source" if who == "client" else "sinks")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            good.sendall(b"nobody hears this")


@pytest.mark.parametrize("shape", ["plain", "mirrored"])
def test_what_a_party_sent_before_it_broke_is_delivered_before_the_reset(tmp_path: Path, shape: str) -> None:
    """A server fills everything up to the client and is gone; the client says something, which goes nowhere. Then it
    reads: all that the server sent is there, to the last byte, and then a reset, for nobody had its words."""
    with relayed("tcp", "unix", tmp_path, **({} if shape == "plain" else BOTH)) as (client, server, duplex):
        data = payload(7, 64 << 20)
        server.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < len(data):
                sent += server.send(data[sent : sent + (1 << 20)])
        assert sent < len(data)
        server.close()
        client.sendall(b"words")
        select.select([], [], [], 0.2)
        got, end = outcome(client)
        assert_same(got, data[:sent])
        assert end == "ConnectionResetError"
        record = duplex.record()
        assert (record.result, record.ended_by, record.back) == ("failed", "sinks", sent)
        assert "EPIPE" in record.reason


def test_the_mirror_of_a_session_that_broke_is_told(tmp_path: Path) -> None:
    """The client resets: its mirror has what arrived and then a reset, its recording stays a .part."""
    with Mirror(tmp_path, deaf=True) as mirror:
        to_file = {"tee": {"to": {"file": f"{tmp_path}/{{id}}.bin"}}}
        stages = [{"tee": {"to": mirror.address}}, to_file]
        with relayed("tcp", "tcp", tmp_path, stages=stages) as (client, server, duplex):
            client.sendall(b"half")
            assert receive_exactly(server, 4) == b"half"
            eventually(lambda: mirror.held, "it is connected")
            reset(client)
            assert outcome(server) == (b"", "ConnectionResetError")
            assert outcome(mirror.held[0]) == (b"half", "ConnectionResetError")
            record = duplex.record()
        assert [one.result for one in record.sinks] == ["failed"] * 3
        assert [path.name for path in tmp_path.glob("*.bin*")] == [f"{record.id}.bin.part"]


def test_what_a_broken_party_did_not_get_is_lost_and_counted(tmp_path: Path) -> None:
    """The server sends much, the client resets without reading: the record's account of the way back adds up."""
    with relayed("tcp", "tcp", tmp_path, **BOTH) as (client, server, duplex):
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.sendall(bytes(64 << 20))
        reset(client)
        record = duplex.record()
        assert record.back is not None
        assert record.back > 0
        assert record.back_lost > 0
        (mirror,) = (one for one in record.sinks if one.way == "back")
        assert mirror.bytes == record.back + record.back_lost


# -- limits and numbers


@pytest.mark.parametrize("limit", ["idle", "lifetime"])
def test_limits_of_time(limit: str) -> None:
    """`limits.idle` counts both directions, `limits.lifetime` the session; both ends are reset, and it is said."""
    with tcp_listener() as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "limits": {limit: "0.4s"}}
        with Duplex(source, {"connect": address}, **BOTH) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                began = time.monotonic()
                while time.monotonic() - began < 0.6 and limit == "idle":  # replies alone keep it alive
                    server.sendall(b"x")
                    receive_exactly(client, 1)
                    select.select([], [], [], 0.05)
                client.settimeout(PATIENCE)
                assert outcome(client) == (b"", "ConnectionResetError")
                assert outcome(server) == (b"", "ConnectionResetError")
            record = duplex.record()
            assert record.ended_by == "relay"
            assert f"limits.{limit}" in record.reason


@pytest.mark.parametrize("engines", [1, 3])
def test_200_sessions_leave_nothing(tmp_path: Path, engines: int) -> None:
    """Two hundred sessions, mirrored both ways, opened and closed: every descriptor comes back."""
    with tcp_listener(backlog=512) as (listening, address), Mirror(tmp_path) as mirror:
        slow = {"policy": "drop"}
        stages = {
            "stages": [{"tee": {"to": mirror.address, "on_slow": slow}}],
            "replies": [{"tee": {"to": "null:"}}],
        }
        source = {"listen": "tcp://127.0.0.1:0"}
        with Duplex(source, {"connect": address}, engines=engines, **stages) as duplex:
            before = 0
            for round_ in range(6):
                pairs = []
                for number in range(34):
                    client = connected(duplex.address)
                    client.sendall(f"{number:04}".encode())
                    pairs.append((client, accept(listening)))
                for number, (client, server) in enumerate(pairs):
                    assert receive_exactly(server, 4) == f"{number:04}".encode()
                    if number % 3 == 0:
                        reset(client)
                    elif number % 3 == 1:
                        client.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):  # it has passed already
                        server.sendall(b"bye")
                    server.close()
                    client.close()
                eventually(lambda want=34 * (round_ + 1): len(duplex.records) == want, "all are over")
                eventually(lambda want=34 * (round_ + 1): len(mirror.got) == want, "the mirror is done")
                before = before or descriptors()
                eventually(lambda most=before: descriptors() <= most, "nothing stays open")
            assert not duplex.route.under_way


def test_a_session_takes_the_descriptors_that_the_plan_says(tmp_path: Path) -> None:
    """Two sockets, a pipe for each stage and each way, a socket for each mirror: counted, and as planned."""
    with tcp_listener() as (listening, address), Mirror(tmp_path, deaf=True) as mirror:
        tee = {"tee": {"to": mirror.address}}
        stages = {"stages": [tee], "replies": ["meter", {"tee": {"to": mirror.address, "on_slow": "drop"}}]}
        settings = {"source": {"listen": "tcp://127.0.0.1:0"}, "sink": {"connect": address}, "duplex": True}
        config = from_data({"routes": {"r": {**settings, **stages}}}, "test")
        with Duplex(settings["source"], settings["sink"], **stages) as duplex:
            before = descriptors()
            with connected(duplex.address) as client, accept(listening) as server:
                for from_, to in ((client, server), (server, client)):
                    from_.sendall(b"x")
                    assert receive_exactly(to, 1) == b"x"
                eventually(lambda: len(mirror.held) == 2, "both mirrors are connected")
                ours = 2 + 2  # the client's and the server's sockets, the mirror's two
                planned = make_plan(config, machine()).routes[0].stream
                assert descriptors() - before - ours == planned.descriptors


# -- ending


def test_the_record_is_that_of_a_plain_session_and_more(tmp_path: Path) -> None:
    """Every key of a plain duplex session is in the record of one with stages, and says the same."""
    found = []
    for number, stages in enumerate(({}, BOTH)):
        directory = tmp_path / str(number)
        directory.mkdir()
        with relayed("tcp", "tcp", directory, method="copy", **stages) as (client, server, duplex):
            client.sendall(b"question")
            receive_exactly(server, 8)
            server.sendall(b"answers")
            receive_exactly(client, 7)
            client.close()
            receive_all(server)
            server.close()
            found.append(duplex.record().as_dict())
    plain, staged = found
    varying = {"id", "source", "peer", "seconds", "sinks", "why_method"}
    assert {key: value for key, value in plain.items() if key not in varying} == {
        key: value for key, value in staged.items() if key not in varying and key in plain
    }
    (one,), (main,) = plain["sinks"], [sink for sink in staged["sinks"] if sink["address"] != "null:"]
    assert set(one) <= set(main)
    assert (one["bytes"], one["result"], one["method"]) == (main["bytes"], main["result"], main["method"])
