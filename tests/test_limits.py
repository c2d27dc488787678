"""Limits: who may connect and for how long."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from pathlib import Path

import pytest
from limited import connect, is_in, route, was_reset
from peers import receive_exactly
from relays import end, serving

from relay.endpoints.options import Limits
from relay.journal.seldom import Seldom
from relay.serving.admission import Admission, host_of

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
