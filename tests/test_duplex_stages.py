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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from duplexes import (
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
    unix_listener,
)
from stories import MIXES, both_at_once, play

from relay.config.data import from_data
from relay.config.load import loads
from relay.endpoints import tcp
from relay.errors import ConfigErrors
from relay.kernel.probe import machine
from relay.planning.plan import make_plan

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "12"))
BOTH = {"stages": [{"tee": {"to": "null:"}}], "replies": [{"tee": {"to": "null:"}}]}


class Mirror:
    """A listener that keeps what each connection sent, or reads nothing while it is `deaf`."""

    def __init__(self, directory: Path, scheme: str = "tcp", *, deaf: bool = False) -> None:
        self._made = unix_listener(directory / f"mirror-{id(self)}") if scheme == "unix" else tcp_listener()
        self._deaf = deaf
        self._wake = threading.Event()
        self.got: list[bytes] = []
        self.held: list[socket.socket] = []

    def __enter__(self) -> Mirror:
        self._listening, self.address = self._made.__enter__()
        self._thread = in_background(self._run)
        return self

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                if self._deaf:
                    self.held.append(sock)
                    continue
                with sock:
                    self.got.append(outcome(sock)[0])

    def hears_again(self) -> bytes:
        """All that its one connection has for it."""
        eventually(lambda: self.held, "somebody has connected")
        return outcome(self.held[0])[0]

    def __exit__(self, *error: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._made.__exit__(None, None, None)
        for sock in self.held:
            sock.close()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[list[bytes]]:
    """Somebody who reads a fifo to its end; afterwards the list has what came."""
    os.mkfifo(path)
    got: list[bytes] = []

    def read() -> None:
        with path.open("rb") as fifo:
            got.append(fifo.read())

    thread = in_background(read)
    yield got
    thread.join(PATIENCE)


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


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
def test_segments_of_one_byte(tmp_path: Path, method: str) -> None:
    """Thousands of one-byte segments that wait for a reader, more than any pipe has slots, all arrive."""
    data = payload(31, 3000)
    with Mirror(tmp_path) as mirror:
        stages = [{"tee": {"to": mirror.address}}]
        with relayed("tcp", "tcp", tmp_path, method=method, stages=stages) as (client, server, _duplex):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for i in range(len(data)):
                client.send(data[i : i + 1])
            assert_same(receive_exactly(server, len(data)), data)
            bulk = payload(32, 3_000_000)  # and after them bulk, still in order
            sender = in_background(client.sendall, bulk)
            assert_same(receive_exactly(server, len(bulk)), bulk)
            sender.join(PATIENCE)
            client.close()
            server.close()
            eventually(lambda: mirror.got, "the mirror has it")
        assert_same(mirror.got[0], data + bulk)


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
def test_urgent_data_does_no_harm(tmp_path: Path, method: str) -> None:
    """Urgent bytes are left out, as by a reader who does not ask for them; what is around them arrives, both ways."""
    with relayed("tcp", "tcp", tmp_path, method=method, **BOTH) as (client, server, _duplex):
        for round_ in range(50):
            for from_, to in ((client, server), (server, client)):
                from_.sendall(b"before")
                from_.send(b"!", socket.MSG_OOB)
                from_.sendall(b"after")
                assert receive_exactly(to, 11) == b"beforeafter", round_


def test_descriptors_sent_along_do_no_harm(tmp_path: Path) -> None:
    """A unix peer that sends descriptors with its bytes: the bytes arrive, all of them."""
    with relayed("unix", "unix", tmp_path, **BOTH) as (client, server, _duplex):
        with Path(os.devnull).open() as null:
            for _ in range(20):
                socket.send_fds(client, [b"with"], [null.fileno()])
                client.sendall(b"out")
            assert receive_exactly(server, 140) == b"without" * 20


@pytest.mark.parametrize("method", ["auto", "zero-copy"])
@pytest.mark.parametrize("size", [1, 64, 4096, 16385, 100_000])
def test_ping_pong_never_waits_for_a_timer(tmp_path: Path, size: int, method: str) -> None:
    """Of many round trips of any size hardly one takes long: no 40 ms of delayed acknowledgements, no 200 ms."""
    times = []
    with relayed("tcp", "tcp", tmp_path, method=method, **BOTH) as (client, server, _duplex):
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        message = payload(51, size)
        for _ in range(150):
            began = time.perf_counter()
            client.sendall(message)
            server.sendall(receive_exactly(server, size))
            assert receive_exactly(client, size) == message
            times.append(time.perf_counter() - began)
    times.sort()
    assert times[len(times) // 2] < 0.02, times[-10:]
    assert sum(one > 0.035 for one in times) < 15, times[-20:]


@pytest.mark.parametrize("method", ["copy", "zero-copy"])
def test_a_clogged_side_does_not_spin(tmp_path: Path, method: str) -> None:
    """While the server takes nothing and the client's bytes wait, the loop sleeps."""
    with relayed("tcp", "tcp", tmp_path, method=method, **BOTH) as (client, server, duplex):
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 << 20))
        c = duplex.engines[0].c
        woken = c.wakeups
        select.select([], [], [], 0.5)
        assert c.wakeups - woken < 10
        assert len(server.recv(1000)) > 0


# -- connecting


def test_bytes_that_come_before_the_sink_is_connected_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that speaks, ends and even closes while the upstream's name is looked up loses nothing."""
    answer = threading.Event()
    known = tcp.lookup
    with tcp_listener() as (listening, _address), Mirror(tmp_path) as mirror:
        place = (socket.AF_INET, listening.getsockname())

        def slow(host: str, port: int, **more: Any) -> list[tuple[int, Any]]:
            if host != "slow.test":
                return known(host, port, **more)
            assert answer.wait(PATIENCE)
            return [place]

        monkeypatch.setattr(tcp, "lookup", slow)
        stages = [{"tee": {"to": mirror.address}}]
        to = {"connect": "tcp://slow.test:1"}
        with Duplex({"listen": "tcp://127.0.0.1:0"}, to, stages=stages) as duplex:
            clients = [connected(duplex.address) for _ in range(3)]
            for number, client in enumerate(clients):
                client.sendall(payload(41 + number, 100_000))
                client.close()
            eventually(lambda: duplex.route.under_way, "the clients are there")
            answer.set()
            got = set()
            for _ in clients:
                with accept(listening) as server:
                    got.add(receive_all(server))
            assert got == {payload(41 + number, 100_000) for number in range(3)}
            eventually(lambda: len(duplex.records) == 3, "all are over")
            assert {record.result for record in duplex.records} == {"delivered"}
        assert set(mirror.got) == got


def test_a_refused_upstream_resets_the_client() -> None:
    """Nobody listens upstream: the client is reset, a record says why, and the next one is served all the same."""
    with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": refused_address()}, **BOTH) as duplex:
        for count in (1, 2):
            assert turned_away(duplex.address)
            eventually(lambda want=count: len(duplex.records) == want, "its record is there")
        record = duplex.records[0]
        assert (record.result, record.ended_by, record.failed_sinks) == ("failed", "sinks", 1)
        assert "ECONNREFUSED" in record.reason


def test_a_name_that_nobody_knows_resets_the_client() -> None:
    """An upstream whose name cannot be looked up: the client is reset, a record says why."""
    sink = {"connect": "tcp://nowhere.invalid:9"}
    with Duplex({"listen": "tcp://127.0.0.1:0"}, sink, **BOTH) as duplex:
        assert turned_away(duplex.address)
        assert "nowhere.invalid" in duplex.record().reason


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


def test_limits_of_connections_count_sessions() -> None:
    """One more than limits.connections is reset at once; when one has left there is room again."""
    with tcp_listener() as (listening, address):
        source = {"listen": "tcp://127.0.0.1:0", "limits": {"per_peer": 1}}
        with Duplex(source, {"connect": address}, **BOTH) as duplex:
            with connected(duplex.address), accept(listening):
                assert turned_away(duplex.address)
            eventually(lambda: duplex.records, "the first has left")
            with connected(duplex.address) as third, accept(listening) as server:
                third.sendall(b"in")
                assert receive_exactly(server, 2) == b"in"


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


def test_drain_lets_sessions_go_on() -> None:
    """A route that drains accepts nobody, and ends when the last session has."""
    with tcp_listener() as (listening, address):
        with Duplex({"listen": "tcp://127.0.0.1:0"}, {"connect": address}, **BOTH) as duplex:
            with connected(duplex.address) as client, accept(listening) as server:
                duplex.drain()
                eventually(
                    lambda: all(one.bound is None for one in duplex.route.reception), "it accepts nobody"
                )
                client.sendall(b"still")
                assert receive_exactly(server, 5) == b"still"
                assert duplex.route.under_way
            duplex.over()
            assert duplex.record().result == "delivered"


def test_abort_resets_both_sides(tmp_path: Path) -> None:
    """A route that is aborted resets every client and every server, and says who did."""
    with relayed("tcp", "tcp", tmp_path, **BOTH) as (client, server, duplex):
        client.sendall(b"x")
        receive_exactly(server, 1)
        duplex.engines[0].post(lambda: duplex.route.abort("no more"))
        assert outcome(client)[1] == outcome(server)[1] == "ConnectionResetError"
        record = duplex.record()
        assert (record.ended_by, record.result, record.reason) == ("relay", "failed", "no more")


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
