"""Which way a stream begins, and what is expected of the other one."""

from __future__ import annotations

import errno
import itertools

import pytest

from relay.kernel.probe import Machine
from relay.ways import FEW_TO_NULL, FEW_TO_TCP, PLENTY, SMALL, Pieces, Ways

ALL = Machine(splice=0, tee=0, vmsplice=0, sendfile=0)
SOURCES = ("tcp", "unix", "fifo", "stdio", "fd", "file")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [2, 16])
def test_a_stream_to_several_files_begins_by_copying(source: str, count: int) -> None:
    """Files are filled by copying in any case: out of one piece of memory that costs less than out of pipes."""
    assert Ways(ALL).across(source, ["file"] * count).method == "copy"
    assert Ways(ALL, "zero-copy").across(source, ["file"] * count).method == "splice"


@pytest.mark.parametrize("source", ["tcp", "unix"])
def test_a_socket_fills_a_file_straight_from_memory(source: str) -> None:
    """What a tcp or unix peer sends to a file alone takes no pipe, unless that was asked for."""
    choice = Ways(ALL).straight(source)
    assert choice is not None
    assert choice.method == "copy"
    assert Ways(ALL, "zero-copy").straight(source) is None
    assert Ways(ALL).straight("fifo") is None


def test_a_file_to_several_tcp_sinks_begins_by_copying() -> None:
    """To several tcp sinks a file is read once and sent out of memory; to pipes its pages go by reference."""
    assert Ways(ALL).across("file", ["tcp"] * 4).method == "copy"
    assert Ways(ALL).across("file", ["unix"] * 4).method == "splice"
    assert Ways(ALL).across("file", ["tcp", "unix"]).method == "splice"


def test_what_is_dropped_is_read_from_a_unix_socket_by_copying() -> None:
    """A unix socket to null alone begins by copying, a pipe by references."""
    assert Ways(ALL).across("unix", ["null"]).method == "copy"
    assert Ways(ALL).across("fifo", ["null"]).method == "splice"


@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_begins_the_way_that_is_expected_to_be_cheaper(source: str) -> None:
    """Whatever the ends, the other way than that of the beginning is never expected to cost less."""
    for count in (1, 2, 3):
        for sinks in itertools.combinations_with_replacement(("tcp", "unix", "fifo", "null", "file"), count):
            way = "ring" if Ways(ALL).across(source, sinks).method == "copy" else "chain"
            assert Ways.odds(source, sinks, way) > 1, (source, sinks, way)


@pytest.mark.parametrize("first", [1, 512, SMALL, 4096])
@pytest.mark.parametrize("filled", [1, FEW_TO_TCP, FEW_TO_NULL, PLENTY])
def test_what_was_seen_never_makes_the_other_way_cheaper(first: int, filled: int) -> None:
    """However its first pieces came, a stream goes on the way that is expected to cost less then."""
    seen = Pieces(first, max(first, filled))
    for source, count in itertools.product(SOURCES, (1, 2, 3)):
        for sinks in itertools.combinations_with_replacement(("tcp", "unix", "fifo", "null", "file"), count):
            way = "ring" if Ways(ALL).across(source, sinks, seen).method == "copy" else "chain"
            assert Ways.odds(source, sinks, way, seen) > 1, (source, sinks, way)


@pytest.mark.parametrize(
    ("source", "sinks", "seen", "method"),
    [
        ("unix", ["tcp"] * 16, Pieces(512, 65536), "copy"),
        ("unix", ["unix"], Pieces(SMALL, 65536), "copy"),
        ("unix", ["unix"], Pieces(2 * SMALL, 65536), "splice"),
        ("unix", ["fifo"] * 4, Pieces(512, 65536), "copy"),
        ("unix", ["fifo"] * 16, Pieces(512, 65536), "splice"),
        ("fifo", ["tcp"] * 4, Pieces(4096, PLENTY), "copy"),
        ("fifo", ["tcp"], Pieces(4096, PLENTY), "splice"),
        ("fifo", ["tcp"] * 4, Pieces(4096, FEW_TO_NULL), "splice"),
        ("tcp", ["tcp"], Pieces(4096, FEW_TO_TCP), "copy"),
        ("tcp", ["tcp"] * 4, Pieces(4096, FEW_TO_TCP), "copy"),
        ("tcp", ["tcp"] * 4, Pieces(4096, FEW_TO_NULL), "splice"),
        ("tcp", ["tcp", "unix"], Pieces(4096, FEW_TO_TCP), "splice"),
        ("fifo", ["tcp"], Pieces(4096, FEW_TO_TCP), "copy"),
        ("fifo", ["null"], Pieces(4096, FEW_TO_NULL), "copy"),
        ("fifo", ["null"], Pieces(4096, PLENTY), "splice"),
    ],
)
def test_the_size_of_pieces_says_what_is_cheaper(
    source: str, sinks: list[str], seen: Pieces, method: str
) -> None:
    """Messages that take a slot each are copied, to few pipes too; full pipes of single pages are, to several tcp."""
    assert Ways(ALL).across(source, sinks, seen).method == method
    assert Ways(ALL, "zero-copy").across(source, sinks, seen).method == "splice"
    assert Ways(ALL).across(source, sinks).method == "splice"


def test_a_file_goes_straight_to_tcp_and_pipes_and_by_a_pipe_to_a_unix_socket() -> None:
    """sendfile has a pipe of its own, of 16 slots: to a unix socket a large one costs less, unless it was asked for."""
    for scheme in ("tcp", "fifo"):
        assert Ways(ALL).from_source("file", alone=scheme).method == "sendfile"
    assert Ways(ALL).from_source("file", alone="unix").method == "splice"
    assert Ways(ALL, "sendfile").from_source("file", alone="unix").method == "sendfile"
    assert Ways(ALL).from_source("file").method == "splice"


def test_without_splice_everything_is_copied() -> None:
    """A machine that refuses splice copies, and says which call answered what."""
    choice = Ways(Machine(splice=errno.ENOSYS, tee=0, vmsplice=0, sendfile=0)).across("fifo", ["fifo"])
    assert choice.method == "copy"
    assert "splice is refused here (ENOSYS)" in choice.reason
