"""Every kind of source and every kind of sink keeps the same promises."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import conformance
import pytest
from conformance import SINKS, SOURCES, FileGiver, SocketTaker, check_clogged, check_delivery, route_of
from peers import accept, assert_same, eventually, payload, receive_all, receive_exactly, refused_address
from relays import Relay

SIZES = [0, 1, 65535, 65536, 65537]
LARGE = 5 << 20
SPLICES = {"splice", "sendfile"}


@pytest.fixture(params=["auto", "copy"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routes of a test go down a chain, and once more by copying, where they can through a ring."""
    monkeypatch.setattr(conformance, "METHOD", request.param)


@pytest.mark.parametrize(
    ("source", "sink"),
    # a file or a descriptor begins at once, maybe before anybody has joined
    [(a, b) for a in SOURCES for b in SINKS if not (("file" in a or "fd-" in a) and "broadcast" in b)],
)
def test_every_source_reaches_every_sink(tmp_path: Path, source: str, sink: str) -> None:
    """Bytes go unchanged from any kind of source to any kind of sink, and the end of the stream with them."""
    with SOURCES[source](tmp_path) as giver, SINKS[sink](tmp_path) as taker:
        check_delivery(giver, [taker], [payload(1, 65537)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_of_any_size(tmp_path: Path, source: str, size: int) -> None:
    """Nothing, one byte, and sizes around 64 KiB come whole out of every kind of source."""
    with (
        SOURCES[source](tmp_path) as giver,
        SINKS["tcp4"](tmp_path) as first,
        SINKS["file"](tmp_path) as last,
    ):
        check_delivery(giver, [first, last], [payload(2, size)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sink", SINKS)
def test_a_sink_of_any_size(tmp_path: Path, sink: str, size: int) -> None:
    """Nothing, one byte, and sizes around 64 KiB arrive whole at every kind of sink, at a tee or at the end."""
    with SOURCES["tcp4"](tmp_path) as giver, SINKS[sink](tmp_path) as taker:
        check_delivery(giver, [taker], [payload(3, size)])


@pytest.mark.parametrize("source", SOURCES)
def test_a_large_stream_from_every_source(tmp_path: Path, source: str) -> None:
    """5 MiB come whole out of every kind of source."""
    with SOURCES[source](tmp_path) as giver, SINKS["unix"](tmp_path) as taker:
        check_delivery(giver, [taker], [payload(4, LARGE)])


@pytest.mark.parametrize("sink", SINKS)
def test_a_large_stream_to_every_sink(tmp_path: Path, sink: str) -> None:
    """5 MiB arrive whole at every kind of sink, and at a file beside it."""
    with SOURCES["tcp4"](tmp_path) as giver, SINKS[sink](tmp_path) as taker:
        beside = tmp_path / "beside"
        beside.mkdir()
        with SINKS["file"](beside) as last:
            check_delivery(giver, [taker, last], [payload(5, LARGE)])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("source", [name for name in SOURCES if "file" not in name])
def test_single_bytes_from_every_source(tmp_path: Path, source: str) -> None:
    """2,000 segments of one byte arrive in order, more of them than a pipe has slots."""
    data = payload(6, 2000)
    with SOURCES[source](tmp_path) as giver, SINKS["tcp4"](tmp_path) as taker:
        check_delivery(giver, [taker], [data[i : i + 1] for i in range(len(data))])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("sink", SINKS)
def test_single_bytes_to_every_sink(tmp_path: Path, sink: str) -> None:
    """2,000 segments of one byte arrive in order at every kind of sink."""
    data = payload(7, 2000)
    with SOURCES["tcp4"](tmp_path) as giver, SINKS[sink](tmp_path) as taker:
        check_delivery(giver, [taker], [data[i : i + 1] for i in range(len(data))])


@pytest.mark.parametrize("method", ["zero-copy", "copy"])
@pytest.mark.parametrize("sink", SINKS)
def test_either_method_to_every_sink(tmp_path: Path, sink: str, method: str) -> None:
    """Whichever method the route asks for, the bytes are the same; `copy` copies at every hop."""
    with (
        SOURCES["tcp4"](tmp_path) as giver,
        SINKS[sink](tmp_path) as taker,
        SINKS["fd-pipe"](tmp_path) as last,
    ):
        record = check_delivery(giver, [taker, last], [payload(8, 300_000)], method=method)
    if method == "copy":
        assert record.method == "copy"
        assert {end.method for end in record.sinks} == {"copy"}


@pytest.mark.parametrize(
    ("sink", "method", "reason"),
    [
        ("tcp4", "splice", ""),
        ("unix", "splice", ""),
        ("fifo", "splice", ""),
        ("file", "copy", "memory"),
        ("fd-pipe", "splice", ""),
        ("fd-file", "copy", "memory"),
        ("fd-append", "copy", "O_APPEND"),
        ("fd-socket", "copy", "inherited socket"),
        ("fd-terminal", "copy", "terminal"),
    ],
)
def test_the_record_says_how_a_sink_was_written(tmp_path: Path, sink: str, method: str, reason: str) -> None:
    """A sink that can be spliced is; one that cannot is copied to, and the record says why."""
    with SOURCES["tcp4"](tmp_path) as giver, SINKS[sink](tmp_path) as taker:
        record = check_delivery(giver, [taker], [payload(9, 100_000)])
    assert record.sinks[0].method == method
    assert reason in record.sinks[0].why_method


@pytest.mark.parametrize(
    ("source", "method", "reason"),
    [
        ("tcp4", "splice", ""),
        ("unix", "splice", ""),
        ("fifo", "splice", ""),
        ("fd-pipe", "splice", ""),
        ("fd-file", "splice", ""),
        ("file", "splice", ""),
        ("fd-socket", "copy", "inherited socket"),
        ("fd-terminal", "copy", "terminal"),
    ],
)
def test_the_record_says_how_a_source_was_read(tmp_path: Path, source: str, method: str, reason: str) -> None:
    """A source that can be spliced is; one that cannot is read, and the record says why."""
    with SOURCES[source](tmp_path) as giver, SINKS["fd-pipe"](tmp_path) as taker:
        record = check_delivery(giver, [taker], [payload(9, 100_000)])
    assert record.method == method
    assert reason in record.why_method


def test_a_file_straight_to_a_socket_is_sent_by_sendfile(tmp_path: Path) -> None:
    """With one socket sink and no stages a file goes by sendfile, and both ends say so."""
    with SOURCES["file"](tmp_path) as giver, SINKS["tcp4"](tmp_path) as taker:
        record = check_delivery(giver, [taker], [payload(10, 3_000_000)])
    assert record.method == "sendfile"
    assert record.sinks[0].method == "sendfile"


CLOGGABLE = [
    name for name in SINKS if name not in ("file", "fd-file", "fd-append") and "broadcast" not in name
]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("sink", CLOGGABLE)
def test_a_clogged_sink_holds_the_source_and_loses_nothing(tmp_path: Path, sink: str) -> None:
    """Under policy block a reader that stalls holds the source, not for ever, and gets every byte."""
    beside = tmp_path / "beside"
    beside.mkdir()
    with (
        SOURCES["tcp4"](tmp_path) as giver,
        SINKS[sink](tmp_path) as clogged,
        SINKS["tcp4"](beside) as sibling,
    ):
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
    data = payload(12, 64 << 20 if policy == "drop" else 16 << 20)  # more than pipes hold in large fragments
    beside = tmp_path / "beside"
    beside.mkdir()
    with (
        SOURCES["tcp4"](tmp_path) as giver,
        SINKS[sink](tmp_path) as clogged,
        SINKS["tcp4"](beside) as sibling,
    ):
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
    beside = tmp_path / "beside"
    beside.mkdir()
    with (
        SOURCES["tcp4"](tmp_path) as giver,
        SINKS[sink](tmp_path) as broken,
        SINKS["tcp4"](beside) as sibling,
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


# --- what cannot be opened --------------------------------------------------------------------------------


def failed_sink(tmp_path: Path, sink: object) -> str:
    """The reason why `sink` failed; the healthy file beside it got everything."""
    giver = FileGiver(str(tmp_path / "in"), tmp_path / "in")
    giver.prepare(b"payload")
    route = {"source": giver.source, "stages": [{"tee": {"to": sink}}], "sink": str(tmp_path / "healthy")}
    with Relay(route) as relay:
        record = relay.wait()
    assert record is not None
    assert record.result == "partial"
    assert (tmp_path / "healthy").read_bytes() == b"payload"
    assert record.sinks[0].result == "failed"
    return record.sinks[0].reason


def test_a_refused_connection(tmp_path: Path) -> None:
    """A refused tcp connection names operation, address, errno and what to do."""
    address = refused_address()
    reason = failed_sink(tmp_path, {"connect": address})
    assert "connecting to" in reason
    assert address in reason
    assert "ECONNREFUSED" in reason
    assert "is the receiver running" in reason


def test_an_unknown_host(tmp_path: Path) -> None:
    """A name that does not resolve is reported as a failed look-up, with what to do."""
    reason = failed_sink(tmp_path, {"connect": "tcp://no-such-host.invalid:9000"})
    assert "looking up 'no-such-host.invalid'" in reason
    assert "check the name" in reason


def test_a_unix_socket_nobody_made(tmp_path: Path) -> None:
    """A unix path that does not exist is ENOENT with a hint."""
    reason = failed_sink(tmp_path, {"connect": f"unix://{tmp_path}/none.sock"})
    assert "ENOENT" in reason
    assert "check the path" in reason


@pytest.mark.parametrize(
    ("make", "code", "hint"),
    [
        (lambda path: (path / "dir").mkdir() or path / "dir", "EISDIR", "name a file"),
        (lambda path: path / "no" / "such" / "file", "ENOENT", "check the path"),
        (lambda path: (path / "plain").write_text("") or path / "plain" / "file", "ENOTDIR", "no directory"),
        (lambda path: path / ("n" * 300), "ENAMETOOLONG", ""),
    ],
)
def test_a_file_that_cannot_be_made(tmp_path: Path, make: object, code: str, hint: str) -> None:
    """A file sink that cannot be opened names the path, the errno and what to do."""
    path = make(tmp_path)
    path = (
        tmp_path / "plain" / "file" if code == "ENOTDIR" else tmp_path / "dir" if code == "EISDIR" else path
    )
    reason = failed_sink(tmp_path, str(path))
    assert code in reason
    assert str(path) in reason
    assert "opening" in reason
    assert hint in reason


def test_a_fifo_path_that_is_no_fifo(tmp_path: Path) -> None:
    """A fifo sink on an ordinary file is refused and leaves the file as it is."""
    (tmp_path / "plain").write_text("mine")
    reason = failed_sink(tmp_path, {"fifo": str(tmp_path / "plain")})
    assert "is not a fifo" in reason
    assert (tmp_path / "plain").read_text() == "mine"


def test_a_descriptor_that_is_not_open(tmp_path: Path) -> None:
    """A descriptor that nobody opened fails with EBADF."""
    assert "EBADF" in failed_sink(tmp_path, {"fd": 999})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing", ("opening", "missing", "ENOENT", "check the path")),
        (".", ("opening", "EISDIR", "name a file")),
        ("a.fifo", ("opening", "not a regular file", "fifo:///path")),
        ({"fd": 999}, ("using fd://999", "EBADF", "redirect something")),
        ({"fifo": "plain"}, ("opening", "is not a fifo")),
        ({"connect": "unix:///nonexistent/x.sock"}, ("connecting to", "ENOENT", "check the path")),
    ],
)
def test_a_source_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: object, words: tuple[str, ...]
) -> None:
    """A source that cannot be opened fails the route with operation, address, errno and hint."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("a.fifo")
    Path("plain").write_text("mine")
    with Relay({"source": source, "sink": "out"}) as relay:
        assert relay.wait() is None
        error = str(relay.route.failed)
    for word in words:
        assert word in error
    assert not Path("out").exists()


def test_a_source_that_nobody_listens_for(tmp_path: Path) -> None:
    """A source that connects and is refused names address, errno and what to do."""
    address = refused_address()
    with Relay({"source": {"connect": address}, "sink": str(tmp_path / "out")}) as relay:
        assert relay.wait() is None
        error = relay.route.failed
    assert error is not None
    assert "ECONNREFUSED" in str(error)
    assert address in str(error)
    assert error.hint


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """A file that shrinks under relay is a failed source, and says what happened."""
    path = tmp_path / "in"
    path.write_bytes(payload(16, 32 << 20))
    with SINKS["tcp4"](tmp_path) as taker, Relay({"source": str(path), "sink": taker.sink}) as relay:
        taker.connection()
        os.truncate(path, 1000)
        taker.take()
        record = relay.wait()
        taker.taken()
    assert record is not None
    assert record.source_failed
    assert "shrank" in record.reason


def test_one_file_to_many_takers_of_every_kind(tmp_path: Path) -> None:
    """One stream reaches a sink of every kind at once, each whole."""
    import contextlib

    with contextlib.ExitStack() as stack:
        giver = stack.enter_context(SOURCES["tcp4"](tmp_path))
        takers = [
            stack.enter_context(make(tmp_path)) for name, make in SINKS.items() if "broadcast" not in name
        ]
        check_delivery(giver, takers, [payload(17, 3 << 20)])


def test_a_subscriber_that_leaves_costs_nobody_anything(tmp_path: Path) -> None:
    """Subscribers that break off, and whoever joins meanwhile, change nothing for one that stays."""
    from conformance import connected

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
