"""A kernel pipe in plain Python, slot by slot (fs/pipe.c, fs/splice.c).

A pipe is a row of slots. A slot holds one page or a part of one, so a pipe is full when its slots are,
whatever their bytes; a write may top up the last page, tee and splice move slots, and cut the last one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from mmap import PAGESIZE


@dataclasses.dataclass
class Segment:
    """One slot: `offset` is where its bytes begin in the page, `tops` whether a write may add to it."""

    data: bytes
    offset: int = 0
    tops: bool = False


class Pipe:
    """A kernel pipe of `slots` slots. `ended`: nobody writes any more; `orphaned`: nobody reads any more."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.segments: deque[Segment] = deque()
        self.ended = self.orphaned = False

    @property
    def held(self) -> int:
        """FIONREAD."""
        return sum(len(segment.data) for segment in self.segments)

    @property
    def full(self) -> bool:
        """Whether every slot is taken."""
        return len(self.segments) >= self.slots

    def write(self, data: bytes) -> int:
        """As write(2), nonblocking; 0 is EAGAIN."""
        done = len(data) % PAGESIZE
        last = self.segments[-1] if self.segments else None
        if done and last and last.tops and last.offset + len(last.data) + done <= PAGESIZE:
            last.data += data[:done]
        else:
            done = 0
        while done < len(data) and not self.full:
            self.segments.append(Segment(data[done : done + PAGESIZE], 0, True))
            done += len(self.segments[-1].data)
        return done

    def lend(self, data: bytes) -> int:
        """As vmsplice(2) of page-aligned memory; 0 is EAGAIN."""
        done = 0
        while done < len(data) and not self.full:
            self.segments.append(Segment(data[done : done + PAGESIZE]))
            done += len(self.segments[-1].data)
        return done

    def read(self, size: int) -> bytes:
        """As read(2); empty is EAGAIN, or the end."""
        got = b""
        while self.segments and len(got) < size:
            first = self.segments[0]
            piece = first.data[: size - len(got)]
            got += piece
            first.data, first.offset = first.data[len(piece) :], first.offset + len(piece)
            if not first.data:
                self.segments.popleft()
        return got

    def splice_to(self, other: Pipe, size: int) -> int:
        """As splice(2) between two pipes; 0 is EAGAIN, or the end."""
        moved = 0
        while moved < size and self.segments and not other.full:
            first = self.segments[0]
            if len(first.data) <= size - moved:
                other.segments.append(self.segments.popleft())
                moved += len(first.data)
            else:
                other.segments.append(Segment(first.data[: size - moved], first.offset))
                first.data, first.offset = first.data[size - moved :], first.offset + size - moved
                moved = size
        return moved

    def tee_to(self, other: Pipe, size: int) -> int:
        """As tee(2): always from the head; 0 is EAGAIN."""
        moved = 0
        for segment in self.segments:
            if moved == size or other.full:
                break
            other.segments.append(Segment(segment.data[: size - moved], segment.offset))
            moved += len(other.segments[-1].data)
        return moved
