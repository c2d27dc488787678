"""Mirrors of duplex routes: they have what went each way, and are in nobody's way.

`RELAY_EXAMPLES=N` runs the random schedules N times instead of a few.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from duplexes import Duplex, connected, in_background, outcome, relayed, reset
from mirrors import Mirror, reading
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    refused_address,
    tcp_listener,
)
from stories import MIXES, both_at_once, play

from relay.config.load import loads
from relay.errors import ConfigErrors

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "12"))


# -- what a mirror cannot be


@pytest.mark.parametrize("which", ["stages", "replies"])
@pytest.mark.parametrize(
    ("to", "place", "words"),
    [
        ("{listen: 'tcp://:3'}", "listen: 'tcp://:3'", "can be listened on once only; connect instead"),
        ("'-'", "'-'", "would mix in '-'; write a file with {id} in its name"),
        ("{fd: 3}", "{fd: 3}", "would mix in 'fd://3'"),
        ("{file: x.bin}", "{file: x.bin}", "names one file for all; put {id} in the name"),
        ("'{route}.bin'", "'{route}.bin'", "names one file for all; put {id} in the name"),
    ],
)
def test_a_mirror_that_sessions_could_not_share_is_refused(
    which: str, to: str, place: str, words: str
) -> None:
    """Each session has mirrors of its own: what only one can have is refused, at its place, within branches too."""
    for tee in (f"tee: {{to: {to}}}", f"tee: {{stages: [tee: {{to: {to}}}], to: 'null:'}}"):
        head = "routes:\n  r:\n    source: 'tcp://:1'\n    sink: 'tcp://h:2'\n    duplex: true\n"
        text = f"{head}    {which}:\n    - {tee}\n"
        with pytest.raises(ConfigErrors) as caught:
            loads(text)
        (error,) = caught.value.errors
        assert words in str(error)
        assert text.splitlines()[error.line - 1][error.column - 1 :].startswith(place)


def test_two_logs_of_one_name_are_refused_across_directions() -> None:
    """A mirror of the requests and one of the replies that would keep one log on disk: refused."""
    tee = "[tee: {to: 'tcp://h:3', on_slow: {policy: spill, directory: d}}]"
    text = f"routes: {{r: {{source: 'tcp://:1', sink: 'tcp://h:2', duplex: true, stages: {tee}, replies: {tee}}}}}"
    with pytest.raises(ConfigErrors, match="keeps its log there already"):
        loads(text)


# -- mirrors have what went each way


@pytest.mark.parametrize("method", ["auto", "copy", "zero-copy"])
@pytest.mark.parametrize(("source", "sink"), MIXES)
@pytest.mark.parametrize("mirror", ["tcp", "unix"])
def test_each_way_has_a_mirror_of_its_own(
    tmp_path: Path, source: str, sink: str, mirror: str, method: str
) -> None:
    """A tee in `stages` gets what the client sent and nothing else, one in `replies` what the server answered."""
    with Mirror(tmp_path, mirror) as there, Mirror(tmp_path, mirror) as back:
        stages = {"stages": [{"tee": there.address}], "replies": [{"tee": back.address}]}
        with relayed(source, sink, tmp_path, method=method, **_tees(stages)) as (client, server, duplex):
            to_server, to_client = both_at_once(client, server)[::-1]
            assert_same(to_server[0], payload(5, 5_000_001))
            assert_same(to_client[0], payload(6, 5_000_001))
            record = duplex.record()
        assert_same(there.got[0], payload(5, 5_000_001))
        assert_same(back.got[0], payload(6, 5_000_001))
    assert (record.result, record.bytes, record.back) == ("delivered", 5_000_001, 5_000_001)
    assert [(one.way, one.bytes, one.result) for one in record.sinks] == [
        ("", 5_000_001, "delivered"),
        ("", 5_000_001, "delivered"),
        ("back", 5_000_001, "delivered"),
    ]


def _tees(stages: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [{"tee": {"to": one["tee"]}} if isinstance(one["tee"], str) else one for one in some]
        for key, some in stages.items()
    }


@pytest.mark.parametrize("which", ["stages", "replies"])
@pytest.mark.parametrize(("source", "sink"), MIXES)
def test_one_way_alone_may_have_stages(tmp_path: Path, source: str, sink: str, which: str) -> None:
    """A route with `stages` only, or `replies` only: that direction is mirrored, the other one passes."""
    with Mirror(tmp_path) as mirror:
        with relayed(source, sink, tmp_path, **{which: [{"tee": {"to": mirror.address}}]}) as (
            client,
            server,
            d,
        ):
            client.sendall(b"question")
            assert receive_exactly(server, 8) == b"question"
            server.sendall(b"answer")
            assert receive_exactly(client, 6) == b"answer"
            client.close()
            server.close()
            assert d.record().result == "delivered"
        assert mirror.got == [b"question" if which == "stages" else b"answer"]


def test_a_fifo_and_a_file_as_mirrors(tmp_path: Path) -> None:
    """A fifo's reader and a file have what went there and back."""
    with reading(tmp_path / "fifo") as read:
        to_file = {"file": str(tmp_path / "{route}-{id}.bin")}
        stages = {
            "stages": [{"tee": {"to": {"fifo": str(tmp_path / "fifo")}}}],
            "replies": [{"tee": {"to": to_file}}],
        }
        with relayed("tcp", "tcp", tmp_path, **stages) as (client, server, duplex):
            both_at_once(client, server)
            record = duplex.record()
    assert_same(read[0], payload(5, 5_000_001))
    (path,) = tmp_path.glob("r-*.bin")
    assert_same(path.read_bytes(), payload(6, 5_000_001))
    assert record.sinks[-1].path == str(path)


@pytest.mark.parametrize("policy", ["block", "drop", "disconnect", "spill"])
def test_sessions_are_recorded_into_files_of_their_own(tmp_path: Path, policy: str) -> None:
    """`{route}-{time}-{id}` names a file for each direction of each session; each has its session's bytes."""
    name = f"{tmp_path}/{{route}}-{{time}}-{{id}}"
    stages = {
        "stages": [{"tee": {"to": {"file": f"{name}.to"}, "on_slow": policy}}],
        "replies": [{"tee": {"to": {"file": f"{name}.back"}, "on_slow": policy}}],
    }
    with tcp_listener() as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, **stages) as duplex:
            for number in range(5):
                with connected(duplex.address) as client, accept(listening) as server:
                    client.sendall(f"question {number}".encode())
                    client.shutdown(socket.SHUT_WR)
                    assert receive_all(server) == f"question {number}".encode()
                    server.sendall(f"answer {number}".encode())
                    server.close()
                    receive_all(client)
            eventually(lambda: len(duplex.records) == 5, "all are recorded")
            for number, record in enumerate(sorted(duplex.records, key=lambda one: int(one.id))):
                (to,) = tmp_path.glob(f"r-2*Z-{record.id}.to")
                (back,) = tmp_path.glob(f"r-2*Z-{record.id}.back")
                assert to.read_text() == f"question {number}"
                assert back.read_text() == f"answer {number}"
                assert record.result == "delivered"
                assert [one.path for one in record.sinks if one.path] == [str(to), str(back)]


# -- a mirror is in nobody's way

POLICIES = {
    "drop": {"policy": "drop", "after": "50ms"},
    "disconnect": {"policy": "disconnect", "after": "50ms"},
    "spill": {"policy": "spill", "max": "256MiB"},
    "spill then drop": {"policy": "spill", "max": "1MiB", "then": "drop", "after": "50ms"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("which", "method"), [("stages", "copy"), ("replies", "zero-copy")])
def test_a_stalled_mirror_slows_nobody(tmp_path: Path, policy: str, method: str, which: str) -> None:
    """A mirror that reads nothing at all: 48 MiB pass each way, beside it; then the sockets are closed."""
    size = 48 << 20
    data = bytes(payload(1, 1 << 20)) * 48
    with Mirror(tmp_path, deaf=True) as mirror:
        tee = {"tee": {"to": mirror.address, "on_slow": POLICIES[policy]}}
        with relayed("tcp", "tcp", tmp_path, method=method, **{which: [tee]}) as (client, server, duplex):
            began = time.monotonic()
            got: dict[str, bytes] = {}

            def send(sock: socket.socket) -> None:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

            threads = [in_background(send, sock) for sock in (client, server)]
            threads.append(in_background(lambda: got.update(server=outcome(server)[0])))
            got["client"] = outcome(client)[0]
            for thread in threads:
                thread.join(PATIENCE)
            assert_same(got["client"], data)
            assert_same(got["server"], data)
            assert time.monotonic() - began < 10
            if policy.startswith("spill"):  # a log waits for its reader
                late = mirror.hears_again()
                assert policy != "spill" or late == data
            record = duplex.record()
            assert record.result == ("delivered" if policy.startswith("spill") else "partial")
            (one,) = (sink for sink in record.sinks if sink.address == mirror.address)
            (main,) = (sink for sink in record.sinks if sink.address != mirror.address)
            assert (record.bytes, record.back, main.bytes, main.result) == (size, size, size, "delivered")
            assert record.back_lost == main.lost == 0
            if policy != "spill":
                assert one.bytes + one.dropped >= size - one.lost
                assert one.bytes < size


@pytest.mark.parametrize("policy", ["block", "drop", "disconnect", "spill"])
@pytest.mark.parametrize("which", ["stages", "replies"])
def test_a_dead_mirror_changes_nothing(tmp_path: Path, policy: str, which: str) -> None:
    """Nobody listens where the mirror is: whatever the policy, both parties get every byte and clean ends."""
    slow: Any = {"policy": policy, "then": "drop", "after": "50ms"} if policy == "spill" else policy
    tee = {"tee": {"to": refused_address(), "on_slow": slow}}
    with relayed("tcp", "unix", tmp_path, **{which: [tee]}) as (client, server, duplex):
        seen = both_at_once(client, server)
        assert [end for _, end in seen] == ["end", "end"]
        assert_same(seen[0][0], payload(6, 5_000_001))
        assert_same(seen[1][0], payload(5, 5_000_001))
        client.close()
        server.close()
        if policy == "spill":  # its log would wait for as long as relay runs
            eventually(lambda: duplex.route.under_way, "its mirror is waited for")
            duplex.engines[0].post(lambda: duplex.route.abort("enough"))
        record = duplex.record()
        (one,) = (sink for sink in record.sinks if sink.address == tee["tee"]["to"])
        (main,) = (sink for sink in record.sinks if sink.address != one.address)
        assert (one.result, main.result) == ("failed", "delivered")
        assert record.result == "partial"
        assert record.ended_by in ("source", "sinks")


@pytest.mark.parametrize("which", ["stages", "replies"])
def test_a_mirror_that_dies_on_the_way(tmp_path: Path, which: str) -> None:
    """A mirror that resets in mid-stream: both parties go on as if it had not been there."""
    with Mirror(tmp_path, deaf=True) as mirror:
        stages = {which: [{"tee": {"to": mirror.address, "on_slow": "drop"}}]}
        with relayed("tcp", "tcp", tmp_path, **stages) as (client, server, duplex):
            giver, taker = (client, server) if which == "stages" else (server, client)
            giver.sendall(b"first")
            assert receive_exactly(taker, 5) == b"first"
            eventually(lambda: mirror.held, "it is connected")
            reset(mirror.held[0])
            for round_ in range(50):
                giver.sendall(payload(round_, 10_000))
                assert_same(receive_exactly(taker, 10_000), payload(round_, 10_000))
            client.close()
            server.close()
            assert duplex.record().result == "partial"


def test_a_mirror_that_blocks_holds_its_own_direction(tmp_path: Path) -> None:
    """`on_slow: block`, the default of a tee: a mirror that reads nothing holds the requests, not the replies."""
    with Mirror(tmp_path, deaf=True) as mirror:
        stages = {"stages": [{"tee": {"to": mirror.address}}]}
        with relayed("tcp", "tcp", tmp_path, **stages) as (client, server, duplex):
            data = payload(3, 40 << 20)
            sender = in_background(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            server.settimeout(0.3)
            got = bytearray()
            with contextlib.suppress(TimeoutError):
                while len(got) < len(data):
                    got += server.recv(1 << 20)
            assert len(got) < len(data)
            server.sendall(b"replies pass")
            assert receive_exactly(client, 12) == b"replies pass"
            server.settimeout(PATIENCE)
            hears = in_background(mirror.hears_again)
            got += receive_all(server)
            assert_same(bytes(got), data)
            hears.join(PATIENCE)
            sender.join(PATIENCE)
            server.close()
            client.close()
            assert duplex.record().result == "delivered"


@pytest.mark.parametrize("method", ["auto", "copy", "zero-copy"])
def test_random_schedules_with_hostile_mirrors(tmp_path: Path, method: str) -> None:
    """Mirrors that refuse, read nothing, or reset at some moment, under policies that hold nobody: whatever the
    schedule, both parties get all of it, and clean ends."""
    with Mirror(tmp_path, deaf=True) as deaf, tcp_listener() as (listening, address):
        for seed in range(EXAMPLES):
            rng = random.Random(seed)
            policies = [*POLICIES.values()][:2]
            mirrors = [{"to": refused_address()}, {"to": deaf.address}, {"to": "null:"}]
            stages = {
                which: [
                    {"tee": {**rng.choice(mirrors), "on_slow": rng.choice(policies)}}
                    for _ in range(rng.randint(0 if which == "replies" else 1, 3))
                ]
                for which in ("stages", "replies")
            }
            source = {"listen": "tcp://127.0.0.1:0"}
            with Duplex(source, {"connect": address}, method=method, **stages) as duplex:
                with connected(duplex.address) as client, accept(listening) as server:
                    cruel = in_background(_reset_one, deaf, rng.random() * 0.02)
                    play(rng, client, server)
                    cruel.join(PATIENCE)
                duplex.engines[0].post(lambda one=duplex: one.route.abort("enough"))
                record = duplex.record()
                assert record.ended_by in ("source", "sinks"), (seed, record.reason)
                assert (record.result, record.reason) in (("delivered", ""), ("partial", "")), seed
                assert record.back_lost == 0


def _reset_one(deaf: Mirror, after: float) -> None:
    """One of its connections, if there is one by then."""
    select.select([], [], [], after)
    if deaf.held:
        reset(deaf.held.pop())
