"""Peers of every kind that clog, reset, leave, talk back or half-close: who fails, and who loses nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance import check_clogged, route_of
from givers import SOURCES, Giver
from peers import accept, assert_same, connected, eventually, payload, receive_all, receive_exactly
from relays import Relay
from takers import SINKS, SocketTaker, Taker

CLOGGABLE = [
    name for name in SINKS if name not in ("file", "fd-file", "fd-append") and "broadcast" not in name
]


@contextlib.contextmanager
def beside_another(directory: Path, sink: str) -> Iterator[tuple[Giver, Taker, Taker]]:
    """Who gives, who takes at a sink of that kind, and who takes at a tcp sink beside it."""
    other = directory / "beside"
    other.mkdir()
    with (
        SOURCES["tcp4"](directory) as giver,
        SINKS[sink](directory) as taker,
        SINKS["tcp4"](other) as sibling,
    ):
        yield giver, taker, sibling


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("sink", CLOGGABLE)
def test_a_clogged_sink_holds_the_source_and_loses_nothing(tmp_path: Path, sink: str) -> None:
    """Under policy block a reader that stalls holds the source, not for ever, and gets every byte."""
    with beside_another(tmp_path, sink) as (giver, clogged, sibling):
        check_clogged(giver, clogged, sibling, 16 << 20)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("sink", "policy"),
    # a fifo cut off before anybody opened it, and a shared socket, show their reader no end
    [
        (a, b)
        for a in CLOGGABLE
        for b in ("drop", "disconnect")
        if b == "drop" or a not in ("fifo", "fd-socket")
    ],
)
def test_a_lossy_policy_frees_the_sibling(tmp_path: Path, sink: str, policy: str) -> None:
    """Under drop and disconnect a sink that reads nothing costs its sibling nothing but a moment."""
    data = payload(12, 64 << 20)  # more than pipes hold in large fragments
    with beside_another(tmp_path, sink) as (giver, clogged, sibling):
        on_slow = {"policy": policy, "after": "50ms"}
        with Relay(route_of(giver, [clogged, sibling], on_slow)) as relay:
            sibling.start(relay)
            sibling.take()
            giver.start(relay)
            giver.give(data)
            giver.end()
            assert_same(sibling.taken(), data)
            clogged.take()
            record = relay.wait()
            clogged.taken()
    assert record is not None
    slow, healthy = record.sinks
    assert healthy.result == "delivered"
    assert record.bytes == len(data)
    if policy == "drop":
        assert slow.result == "delivered"
        assert slow.dropped > 0
        assert slow.bytes + slow.dropped == len(data)
        assert slow.bytes == len(clogged.got)
    else:
        assert slow.result == "failed"
        assert "backlog" in slow.reason
        assert len(clogged.got) < len(data)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("source", ["tcp4", "tcp6", "tcp-connect"])
@pytest.mark.parametrize("sink", ["tcp4", "file"])
def test_a_source_that_resets_fails_the_stream(tmp_path: Path, source: str, sink: str) -> None:
    """A reset source fails the session with ECONNRESET; no sink takes what came for the whole."""
    with SOURCES[source](tmp_path) as giver, SINKS[sink](tmp_path) as taker:
        with Relay(route_of(giver, [taker])) as relay:
            taker.take()
            giver.start(relay)
            giver.give(b"x" * 100_000)
            eventually(lambda: relay.moved() == 100_000, "relay has read it all")
            giver.reset()
            record = relay.wait()
            assert record is not None
            assert record.source_failed
            assert record.result == "failed"
            assert "ECONNRESET" in record.reason
            assert record.sinks[0].result == "failed"
            if isinstance(taker, SocketTaker):
                taker.taken()
                assert taker.broke is not None, "the receiver saw a clean end"
    if sink == "file":
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.part").exists()
        assert record.sinks[0].path.endswith("out.part")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("sink", ["tcp4", "tcp6", "unix", "fd-socket"])
def test_a_sink_that_resets_fails_alone(tmp_path: Path, sink: str) -> None:
    """A receiver that breaks off is reported with its errno; its sibling gets everything."""
    data = payload(13, 4 << 20)
    with (
        beside_another(tmp_path, sink) as (giver, broken, sibling),
        Relay(route_of(giver, [broken, sibling])) as relay,
    ):
        broken.start(relay)
        sibling.take()
        giver.start(relay)
        giver.give(data[:1000])
        broken.reset()
        giver.give(data[1000:])
        giver.end()
        assert_same(sibling.taken(), data)
        record = relay.wait()
    assert record is not None
    assert record.result == "partial"
    assert [end.result for end in record.sinks] == ["failed", "delivered"]
    assert any(name in record.sinks[0].reason for name in ("ECONNRESET", "EPIPE")), record.sinks[0].reason
    assert not record.source_failed


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("sink", ["fifo", "fd-pipe", "fd-terminal"])
def test_a_reader_that_goes_away_fails_alone(tmp_path: Path, sink: str) -> None:
    """A pipe, fifo or terminal whose reader leaves fails with an errno; its sibling gets everything."""
    data = payload(14, 4 << 20)
    with (
        SOURCES["tcp4"](tmp_path) as giver,
        SINKS[sink](tmp_path) as broken,
        SINKS["tcp4"](tmp_path) as sibling,
        Relay(route_of(giver, [broken, sibling])) as relay,
    ):
        sibling.take()
        giver.start(relay)
        if sink == "fifo":
            os.close(os.open(tmp_path / "out.fifo", os.O_RDONLY))
        else:
            os.close(broken._read)
            broken._read = -1
        giver.give(data)
        giver.end()
        assert_same(sibling.taken(), data)
        record = relay.wait()
    assert record is not None
    assert record.sinks[0].result == "failed"
    assert any(name in record.sinks[0].reason for name in ("EPIPE", "EIO")), record.sinks[0].reason


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("sink", ["tcp4", "unix", "broadcast", "fd-socket"])
@pytest.mark.parametrize("early", [True, False])
def test_a_sink_that_talks_back_or_half_closes(tmp_path: Path, sink: str, early: bool) -> None:
    """What the peer of a one-way sink says is thrown away, its half-close is noted: neither costs a byte."""
    data = payload(15, 2 << 20)
    with SOURCES["tcp4"](tmp_path) as giver, SINKS[sink](tmp_path) as taker:
        with Relay(route_of(giver, [taker])) as relay:
            taker.start(relay)
            giver.start(relay)
            giver.give(data[:10])
            taker.connection()
            if early:
                taker.half_close()
            else:
                taker.talk(b"noise" * 20_000)
            taker.take()
            giver.give(data[10:])
            giver.end()
            eventually(lambda: taker.got, "relay has opened the sink")
            assert_same(taker.taken(), data)
            taker.close()
            record = relay.wait()
    assert record is not None
    assert record.result == "delivered"


def test_a_peer_that_half_closes_ends_the_sink_where_asked(tmp_path: Path) -> None:
    """`peer_eof: close` takes the receiver's half-close for its end: the sink fails and says why."""
    with SOURCES["tcp4"](tmp_path) as giver, SINKS["tcp4"](tmp_path) as taker:
        taker.sink["peer_eof"] = "close"
        with Relay(route_of(giver, [taker])) as relay:
            giver.start(relay)
            taker.half_close()
            record = relay.wait()
    assert record is not None
    assert record.sinks[0].result == "failed"
    assert "peer closed" in record.sinks[0].reason


@pytest.mark.usefixtures("either_way")
def test_the_source_ends_when_nobody_is_left(tmp_path: Path) -> None:
    """When every sink has failed the source is closed too, though it would give more."""
    with SOURCES["tcp4"](tmp_path) as giver, SINKS["tcp4"](tmp_path) as taker:
        with Relay(route_of(giver, [taker])) as relay:
            giver.start(relay)
            giver.give(b"x")
            taker.reset()
            record = relay.wait()
    assert record is not None
    assert record.ended_by == "sinks"
    assert record.result == "failed"


def test_a_subscriber_that_leaves_costs_nobody_anything(tmp_path: Path) -> None:
    """Subscribers that break off, and whoever joins meanwhile, change nothing for one that stays."""
    data = payload(18, 4 << 20)
    with SOURCES["tcp4"](tmp_path) as giver, SINKS["broadcast"](tmp_path) as stays:
        with Relay(route_of(giver, [stays])) as relay:
            stays.start(relay)
            stays.take()
            giver.start(relay)
            for start in range(0, len(data), 1 << 18):
                with connected(relay.bound[0]):
                    giver.give(data[start : start + (1 << 18)])
            giver.end()
            assert_same(stays.taken(), data)
            record = relay.wait()
    assert record is not None
    assert record.result == "delivered"


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "reset"])
def test_a_shared_socket_is_left_to_those_who_share_it(broken: bool) -> None:
    """However a stream into an inherited socket ends, whoever else holds it goes on writing, and closes it cleanly."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = accept(listener)
    with near, far, SOURCES["tcp4"](Path()) as giver:
        with Relay({"source": giver.source, "sink": {"fd": near.fileno()}, "wait_for_sinks": "10s"}) as relay:
            giver.start(relay)
            giver.give(b"relay ")
            assert receive_exactly(far, 6) == b"relay "
            if broken:
                giver.reset()
            else:
                giver.end()
            record = relay.wait()
        assert record is not None
        assert record.result == ("failed" if broken else "delivered")
        near.sendall(b"goes on")
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8), "a close would be a reset"
        near.close()
        assert receive_all(far) == b"goes on"
