"""A stream of blocks from or to peers who mean harm."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leaks import descriptors
from shares import take

from relay.errors import ShareError
from relay.sharing import wire
from relay.sharing.sink import ShareSink
from relay.sharing.source import ShareSource

PAGE = mmap.PAGESIZE
FUTURE_WRITE = 0x10
RING_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | FUTURE_WRITE


def ring(slots: int = 2, size: int = PAGE, seals: int = RING_SEALS, *, holes: bool = False) -> int:
    """A ring's memfd as a hostile sender makes it."""
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, slots * size) if holes else os.pwrite(fd, bytes(slots * size), 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def message(kind: int, size: int, slot: int, turn: int = 1, dtype: bytes = b"|u1", dims: int = 1) -> bytes:
    """A message that nobody has checked."""
    fixed = struct.pack("<4sBBHQII32s", wire.MAGIC, kind, dims, len(dtype), size, slot, turn, dtype)
    return (fixed + struct.pack("<Q", size)).ljust(wire.HEADER, b"\0")


@contextlib.contextmanager
def hostile(**options: Any) -> Iterator[tuple[socket.socket, ShareSource]]:
    """A socket to send anything to a source, and the source; no descriptor may be left of it."""
    before = descriptors()
    near, far = socket.socketpair()
    with near, ShareSource(far, **options) as source:
        yield near, source
    assert descriptors() == before


def offer(near: socket.socket, size: int = PAGE, slots: int = 2, **made: Any) -> None:
    """Announces a ring of `slots` of `size`, whatever the memfd that comes with it is: `made` as ring() takes it."""
    fd = ring(**made)
    socket.send_fds(near, [message(wire.RING, size, slots)], [fd])
    os.close(fd)


@pytest.mark.parametrize(
    ("slots", "size", "match"),
    [
        (0, PAGE, "slots"), (129, PAGE, "slots"), (2, 0, "slots"), (2, PAGE + 1, "whole pages"),
        (2, 1 << 40, "max_bytes"), (1 << 31, 1 << 60, "slots"), (3, PAGE, "were announced"),
        (1, PAGE, "were announced"),
    ],
)  # fmt: skip
def test_rings_that_make_no_sense_are_refused(slots: int, size: int, match: str) -> None:
    """Numbers that do not fit the memfd, or that nobody needs, are refused before anything is mapped."""
    with hostile() as (near, source):
        offer(near, size, slots)
        with pytest.raises(ShareError, match=match):
            source.receive(timeout=5)
        with pytest.raises(ShareError, match="close the connection"):
            source.receive(timeout=5)


@pytest.mark.parametrize("seals", [0, RING_SEALS & ~fcntl.F_SEAL_SHRINK, RING_SEALS & ~FUTURE_WRITE])
def test_rings_that_could_shrink_or_lose_pages_are_refused(seals: int) -> None:
    """Without SHRINK a slot could fault, without FUTURE_WRITE it could be punched: refused."""
    with hostile() as (near, source):
        offer(near, seals=seals)
        with pytest.raises(ShareError, match="lacks the seals"):
            source.receive(timeout=5)


def test_a_ring_of_holes_is_refused() -> None:
    """A ring without pages would be filled with the receiver's."""
    with hostile() as (near, source):
        offer(near, holes=True)
        with pytest.raises(ShareError, match="holes"):
            source.receive(timeout=5)


def test_blocks_that_are_not_there_are_refused() -> None:
    """A slot beyond the ring, a block beyond its slot, one before any ring, one not given back: refused."""
    bad: list[tuple[bytes, str]] = [
        (message(wire.BLOCK, 10, 2), "ring of 2"), (message(wire.BLOCK, PAGE + 1, 0), "in a slot of"),
        (message(wire.BLOCK, 10, 0xFFFFFFFF), "ring of 2"), (message(wire.BLOCK, 10, 1, turn=7), "not given back"),
        (message(wire.BLOCK, 10, 0, turn=8), "not given back"), (message(9, 10, 0), "unknown kind"),
        (message(wire.KEEP, 10, 0), "0 descriptors"),
    ]  # fmt: skip
    for raw, match in bad:
        with hostile() as (near, source):
            offer(near)
            near.send(message(wire.BLOCK, 10, 0, turn=7))
            kept = take(source)
            near.send(raw)
            with pytest.raises(ShareError, match=match):
                source.receive(timeout=5)
            kept.release()
    with hostile() as (near, source):
        near.send(message(wire.BLOCK, 10, 0))
        with pytest.raises(ShareError, match="ring of 0"):
            source.receive(timeout=5)


def test_rings_without_end_cost_nothing() -> None:
    """A sender that announces ring after ring fills neither the receiver's descriptors nor its memory."""
    with hostile() as (near, source):
        fd = ring(128)
        before = len(descriptors()), _lines_of_maps()
        for turn in range(100):
            socket.send_fds(near, [message(wire.RING, PAGE, 128)], [fd])
            near.send(message(wire.BLOCK, 10, 0, turn))
            take(source).release()
        assert len(descriptors()) == before[0]
        assert _lines_of_maps() <= before[1] + 140
        os.close(fd)


def _lines_of_maps() -> int:
    with open("/proc/self/maps") as file:
        return len(file.readlines())


def test_a_receiver_that_gives_back_what_it_does_not_have_is_dropped() -> None:
    """Slots given back twice, never had, or of another turn: that receiver is gone, the others go on."""
    for number, turn in ((0, 99), (5, 1), (1, 1), (0xFFFFFFFF, 0xFFFFFFFF)):
        pairs = [socket.socketpair() for _ in range(2)]
        sink = ShareSink(*(near for near, _ in pairs), slots=2)
        with ShareSource(pairs[0][1]) as good, pairs[1][1] as bad, sink:
            sink.send(b"one")
            take(good).release()
            bad.send(wire.RETURN.pack(number, turn))
            sink.send(b"two", timeout=5)
            with take(good) as block:
                assert bytes(block.view()) == b"two"
            assert sink.receivers == 1


@settings(max_examples=150, deadline=None)
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["ring", "block", "raw", "release"]), st.integers(0, 130), st.integers(0, 3 * PAGE),
            st.binary(max_size=30),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_any_sender_is_read_safely(script: list[tuple[str, int, int, bytes]]) -> None:
    """Whatever a sender says in whatever order, a source gives blocks that can be read, or ShareError."""
    with hostile() as (near, source):
        fd = ring(4)
        held: list[Any] = []
        for turn, (what, slot, size, raw) in enumerate(script):
            if what == "ring":
                socket.send_fds(near, [message(wire.RING, PAGE, slot % 6)], [fd])
            elif what == "block":
                near.send(message(wire.BLOCK, size, slot % 5, turn))
            elif what == "raw":
                socket.send_fds(near, [raw.ljust(wire.HEADER, b"\0")], [fd] * (slot % 3))
            elif held:
                held.pop().release()
            try:
                if (block := source.receive(timeout=0)) is not None:
                    assert len(bytes(block.view())) == len(block)
                    held.append(block)
            except (TimeoutError, ShareError):
                pass
        for block in held:
            block.release()
        os.close(fd)
