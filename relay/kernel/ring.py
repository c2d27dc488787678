"""A broadcast's ring: memory that the stream passes through, read by many, each at its own position.

Nothing of it is ever lent: it is written again and again. Every reader is sent its bytes out of it by copying,
which for several sockets is cheaper than references are, and takes neither pipes nor descriptors.
"""

from __future__ import annotations

import mmap

from relay.errors import KernelError
from relay.kernel import core


class Reader:
    """One reader's place in a ring: its struct, and room for the piece under way when a gap begins.

    `sink` is the struct of its end, which must live as long.
    """

    def __init__(self, sink: core.Struct, after: float) -> None:
        self.c = core.new("reader", sink=sink, after_ns=max(1, int(after * 1e9)))
        self._sink = sink
        self._rest: core.Struct = None

    def give_rest(self, size: int) -> core.Struct:
        """At least one byte of memory that lives as long as the reader."""
        if self._rest is None:
            self._rest = core.buffer(max(1, size))
        return self._rest


class Ring:
    """Memory that a stream passes through and many read, private; owns the mapping and keeps the readers alive.

    A reader's time runs when it is `full` bytes behind; `reserve` bytes later it holds the source. A newcomer gets
    the last `keep` bytes, from a multiple of `align` on. The memory is there while anybody reads or `keep` is not
    0. All calls between sweeps, on the engine's thread.
    """

    def __init__(self, full: int, keep: int, align: int, reserve: int) -> None:
        size = max(full + max(reserve, full // 7 + 1), 8 * align)
        size += -size % mmap.PAGESIZE
        self.c = core.new("ring", size=size, full=full, keep=keep, align=align, turns=1)
        self._readers: set[Reader] = set()
        self._map: mmap.mmap | None = None
        self._pointer: core.Struct = None

    @property
    def size(self) -> int:
        """Bytes of memory: by so much a reader may be behind at most."""
        return int(self.c.size)

    @property
    def full(self) -> int:
        """Bytes by which a reader may be behind before its time runs."""
        return int(self.c.full)

    def open(self) -> None:
        """Makes the memory, if it is not there. Raises KernelError where there is none."""
        if self._map is not None:
            return
        try:
            self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise KernelError(
                f"mmap of {self.size} bytes: {error.strerror}",
                hint="a smaller buffer or burst needs less memory, or raise its limit (ulimit -v)",
            ) from error
        self._pointer = core.ffi.from_buffer("char[]", self._map)
        self.c.memory = self._pointer
        self.c.start = self.c.oldest = self.c.position

    def join(self, reader: Reader) -> None:
        """It reads from here on, and the kept bytes before. Raises KernelError where there is no memory."""
        self.open()
        self._readers.add(reader)
        core.lib.relay_ring_join(self.c, reader.c)

    def leave(self, reader: Reader) -> None:
        """It reads no more; the last one leaves no memory behind unless something is to be kept."""
        self._readers.discard(reader)
        core.lib.relay_ring_leave(self.c, reader.c)
        if not self._readers and not self.c.keep:
            self.close()

    def drop(self, reader: Reader) -> None:
        """A gap begins for this reader, behind the piece that is under way; it ends when its way is free."""
        core.lib.relay_ring_drop(self.c, reader.c, reader.give_rest(int(self.c.align)))

    def new_stream(self) -> None:
        """What comes from now on is another stream: `align` is counted anew."""
        core.lib.relay_ring_stream(self.c)

    def close(self) -> None:
        """Gives the memory back; bytes pass by from now on. Safe to call again."""
        if self._map is not None:
            self.c.memory = core.ffi.NULL
            core.ffi.release(self._pointer)
            self._pointer = None
            self._map.close()
            self._map = None
