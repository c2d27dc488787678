"""Streams whose every byte tells where it belongs, and what may be said of bytes that came out somewhere.

A stream is a row of 8-byte words, each the stream's number and its own place in it. So a run of 24 bytes found
anywhere, at any phase, says which stream it is from and at what offset.
"""

from __future__ import annotations

import array
import dataclasses
import struct

WORD = 8
SURE = 3 * WORD  # bytes that are needed to tell where a run begins
PLACES = 32  # bits of a word's place


def stream(number: int, size: int) -> bytes:
    """The first `size` bytes of stream `number`, from 1."""
    words = array.array("Q", range(number << PLACES, (number << PLACES) + size // WORD + 1))
    return words.tobytes()[:size]


@dataclasses.dataclass(frozen=True)
class Run:
    """Bytes that came one after another from one stream."""

    stream: int
    begin: int
    end: int


def _begins(data: bytes, at: int) -> tuple[int, int] | None:
    """Stream and offset of the byte at `at`, from the words that follow it; None where too few do."""
    for phase in range(WORD):
        if at + phase + 2 * WORD > len(data):
            return None
        one, two = struct.unpack_from("<QQ", data, at + phase)
        if two == one + 1 and one >> PLACES:
            offset = (one & ((1 << PLACES) - 1)) * WORD - phase
            if offset >= 0 and stream_part(one >> PLACES, offset, phase) == data[at : at + phase]:
                return one >> PLACES, offset
    return None


def stream_part(number: int, offset: int, size: int) -> bytes:
    """`size` bytes of a stream from `offset` on."""
    first = offset // WORD
    words = array.array(
        "Q", range((number << PLACES) + first, (number << PLACES) + (offset + size) // WORD + 1)
    )
    return words.tobytes()[offset - first * WORD :][:size]


def runs(data: bytes) -> list[Run]:
    """`data` as runs; fails at the first byte that belongs nowhere. A rest too short to tell is left out."""
    found: list[Run] = []
    at = 0
    while at < len(data):
        place = _begins(data, at)
        if place is None:
            assert len(data) - at < SURE, (
                f"byte {at} of {len(data)} belongs to no stream: {data[at : at + 32]!r}"
            )
            return found
        number, offset = place
        length = _length(data, at, number, offset)
        found.append(Run(number, offset, offset + length))
        at += length
    return found


def _length(data: bytes, at: int, number: int, offset: int) -> int:
    """For how many bytes `data` goes on as the stream does."""
    length, step = 0, 1 << 16
    while at + length < len(data):
        size = min(step, len(data) - at - length)
        if stream_part(number, offset + length, size) == data[at + length : at + length + size]:
            length += size
        elif step == 1:
            break
        else:
            step = max(1, step // 16)
    return length
