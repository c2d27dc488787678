"""relay.Memory: bytes in memory as source and as sink of routes from code."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import assert_same, payload

import relay

STREAM = payload(8, (3 << 20) + 5)


@pytest.fixture
def other() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of connected sockets."""
    one, two = socket.socketpair()
    with one, two:
        yield one, two


def test_memory_to_memory() -> None:
    """A route reads one memory and writes another, with a branch into a third; what is there can be read."""
    with relay.Memory(STREAM) as source, relay.Memory() as sink, relay.Memory(b"before ") as branch:
        outcome = relay.run(
            relay.Route(source=source.source, stages=[{"tee": {"to": branch.sink}}], sink=sink.sink)
        )
        assert outcome.bytes == 2 * len(STREAM)
        assert outcome.records[0].method == "splice"
        assert len(sink) == len(STREAM)
        assert_same(sink.read(), STREAM)
        assert_same(branch.read(), b"before " + STREAM)


def test_a_source_is_read_from_its_beginning_each_time(tmp_path: Path) -> None:
    """Memory that a route wrote to, or read, is whole for the next that reads it."""
    (tmp_path / "in").write_bytes(STREAM)
    with relay.Memory() as memory:
        relay.send(tmp_path / "in", memory.sink)
        for name in ("one", "two"):
            relay.send(memory.source, tmp_path / name)
            assert_same((tmp_path / name).read_bytes(), STREAM)


def test_what_came_is_shared_without_a_copy(
    tmp_path: Path, other: tuple[socket.socket, socket.socket]
) -> None:
    """What a route wrote becomes final as it is, and another process can have it."""
    (tmp_path / "in").write_bytes(STREAM)
    with relay.Memory() as memory:
        relay.send(tmp_path / "in", memory.sink)
        inode = os.fstat(memory.fileno()).st_ino
        with memory.share() as shared:
            assert os.fstat(shared.fileno()).st_ino == inode
            shared.send(other[0])
            with relay.Shared.receive(other[1]) as received:  # type: ignore[union-attr]
                assert_same(bytes(received), STREAM)
        with pytest.raises(ValueError, match="was shared"):
            memory.read()


def test_shared_memory_is_final(tmp_path: Path) -> None:
    """Nobody writes to memory that was shared, by whatever descriptor is left."""
    memory = relay.Memory(STREAM)
    left = os.dup(memory.fileno())
    with memory.share():
        with pytest.raises(PermissionError):
            os.pwrite(left, b"x", 0)
        with pytest.raises(relay.TransferError):
            relay.send(b"more", f"fd://{left}")
    os.close(left)


def test_misuse() -> None:
    """Empty memory is not shared, closed memory has no address, and the configuration file has no memory."""
    with relay.Memory() as memory:
        with pytest.raises(ValueError, match="no page to map"):
            memory.share()
        assert (len(memory), memory.read()) == (0, b"")
    with pytest.raises(ValueError, match="closed"):
        _ = memory.source
    with pytest.raises(relay.RelayError, match=r"relay\.Memory"):
        relay.send(b"x", "memory:")
