"""Memory that many read, and whoever reads it."""

from __future__ import annotations

import dataclasses

from model.ends import Sink


def border(origins: list[int], at: int, align: int, *, down: bool = False) -> int:
    """The first border at or behind `at`, or the last one at or before it, where streams began at `origins`."""
    known = origins[-8:] or [0]
    begun = [origin for origin in known if origin <= at]
    if not begun:
        return known[0]
    over = (at - begun[-1]) % align
    if down or not over:
        return at - over
    return min([at + align - over, *(origin for origin in known if origin > at)])


@dataclasses.dataclass(eq=False)
class Reader:
    """One subscriber, or the place of a pipeline's sink (`stays`). What it is still to get is the ring's stream from
    `at` on, after `rest`."""

    sink: Sink | None
    after: int
    align: int = 1
    name: str = ""
    stays: bool = False
    hold: bool = False
    apart: int = 0
    at: int = 0
    dropped: int = 0
    since: int = 0
    blocked: int = 0
    slow: bool = False
    dropping: bool = False
    done: bool = False
    rest: bytes = b""
    runs: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # what it was given, [from, to)

    @property
    def holding(self) -> bool:
        """Whether room is kept for it."""
        return bool(self.sink and (not self.sink.failed or self.hold) and not self.done and not self.dropping)


@dataclasses.dataclass(eq=False)
class Ring:
    """Memory that many read: here the whole stream is kept, and what the C core's memory holds of it is derived."""

    size: int
    full: int
    keep: int
    there: bool = False  # its memory
    stream: bytearray = dataclasses.field(default_factory=bytearray)
    start: int = 0
    origins: list[int] = dataclasses.field(default_factory=lambda: [0])
    ended: bool = False
    readers: list[Reader] = dataclasses.field(default_factory=list)
    offered: int = 0  # a pipeline's own: what is behind is held back
    base: int = 0
    batch: int = 0
    hold: int = 0  # nanoseconds
    held: int = 0
    quick: int = 0
    least: int = 0
    need: int = 0
    rush: int = 0
    window_at: int = 0
    window: int = 0

    @property
    def empty(self) -> bool:
        """Whether nobody has anything to get."""
        return not any(r.dropping or (r.holding and r.at < self.position) for r in self.readers)

    def behind(self, at: int) -> int:
        """Bytes from there to the end of its memory."""
        return self.size - (at - self.base) % self.size

    @property
    def position(self) -> int:
        """Bytes that ever came."""
        return len(self.stream)

    @property
    def room(self) -> int:
        """Bytes that fit before the reader furthest behind, of those that hold."""
        oldest = min((r.at for r in self.readers if r.holding), default=self.position)
        return self.size - (self.position - min(oldest, self.position))

    def border(self, at: int, align: int, *, down: bool = False) -> int:
        """The first border at or behind `at`, or the last one at or before it."""
        return border(self.origins, at, align, down=down)

    def join(self, reader: Reader) -> None:
        """A newcomer, `keep` bytes back, from a border on."""
        if not self.there:
            self.there, self.start = True, self.position
        first = max(self.position - self.keep, self.start, self.position - self.size)
        reader.at = self.position if reader.stays else self.border(first, reader.align)
        self.readers.insert(0, reader)

    def leave(self, reader: Reader) -> None:
        """It reads no more; with the last one the memory goes, unless something is to be kept."""
        self.readers.remove(reader)
        self.there = bool(self.readers or self.keep)

    def drop(self, reader: Reader) -> None:
        """A gap begins, once the piece that is under way is whole."""
        to = self.border(reader.at, reader.align)
        reader.rest = bytes(self.stream[reader.at : to])
        if reader.rest:
            reader.runs.append((reader.at, to))
        reader.at, reader.dropping = to, True

    def new_stream(self) -> None:
        """`align` is counted anew."""
        if self.position != self.origins[-1]:
            self.origins.append(self.position)
        for reader in self.readers:
            reader.at = min(reader.at, self.position)
