"""Every kind of source and every kind of sink passes the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance import check_delivery
from givers import SOURCES
from peers import payload
from takers import SINKS

SIZES = [0, 1, 65535, 65536, 65537]
LARGE = 5 << 20
SPLICES = {"splice", "sendfile"}


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


def test_one_file_to_many_takers_of_every_kind(tmp_path: Path) -> None:
    """One stream reaches a sink of every kind at once, each whole."""
    import contextlib

    with contextlib.ExitStack() as stack:
        giver = stack.enter_context(SOURCES["tcp4"](tmp_path))
        takers = [
            stack.enter_context(make(tmp_path)) for name, make in SINKS.items() if "broadcast" not in name
        ]
        check_delivery(giver, takers, [payload(17, 3 << 20)])
