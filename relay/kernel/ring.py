"""A ring: memory that a stream passes through, read by many, each at its own position.

Nothing of it is ever lent: it is written again and again. Every reader is sent its bytes out of it by copying,
which for several sockets is cheaper than references are, and takes neither pipes nor descriptors.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from typing import Protocol

from relay.errors import KernelError
from relay.kernel import core

SIZE = 4 << 20  # bytes of a pool's rings: four batches, so that one is read while others are under way
MOST = 8  # rings of one engine at a time
KEPT = 2  # of these, how many keep their memory when nobody uses them
BATCH = 1 << 20  # bytes: no less is given out while more is coming
HOLD = 1_000_000  # nanoseconds for which something may be held back
QUICK = 128 << 10  # bytes in that time: a stream that is faster is a rush
LEAST = 2 << 20  # bytes that it must last for before anything is held back


class Borrower(Protocol):
    """A ferry: its thread may have spans of a ring."""

    c: core.Struct

    def afterwards(self, action: Callable[[], None]) -> None:
        """Calls `action` on the engine's thread once its own thread has ended; at once if it has."""
        ...


class Reader:
    """One reader's place in a ring: its struct, and room for the piece under way when a gap begins.

    `sink` is the struct of its end, which must live as long. `align`: gaps start and end at multiples of it.
    """

    def __init__(self, sink: core.Struct, after: float, align: int = 1) -> None:
        self.c = core.new("reader", sink=sink, after_ns=max(1, int(after * 1e9)), align=align)
        self._sink = sink
        self._rest: core.Struct = None

    def give_rest(self) -> core.Struct:
        """At least one byte of memory that lives as long as the reader, and room for an unfinished piece."""
        if self._rest is None:
            self._rest = core.buffer(max(1, int(self.c.align)))
        return self._rest


class Pool:
    """Memory for the rings of one engine's pipelines: SIZE bytes each, MOST of them at a time."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._out = 0

    def take(self) -> mmap.mmap | None:
        """A ring's memory; None when all are out, or the system has none."""
        if self._out >= MOST:
            return None
        memory = self._free.pop() if self._free else _anonymous(SIZE)
        self._out += memory is not None
        return memory

    def give_back(self, memory: mmap.mmap) -> None:
        """Nobody uses it any more."""
        self._out -= 1
        if len(self._free) < KEPT:
            self._free.append(memory)
        else:
            memory.close()

    def close(self) -> None:
        """Unmaps what is not out. Safe to call again."""
        while self._free:
            self._free.pop().close()


def _anonymous(size: int) -> mmap.mmap | None:
    with contextlib.suppress(OSError):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return None


class Ring:
    """Memory that a stream passes through and many read, private; owns the mapping and keeps the readers alive.

    A reader's time runs when it is `full` bytes behind; `reserve` bytes later it holds the source. A newcomer gets
    the last `keep` bytes, from a multiple of `align` on. The memory is there while anybody reads or `keep` is not
    0. All calls between sweeps, on the engine's thread.
    """

    def __init__(self, full: int, keep: int, align: int, reserve: int) -> None:
        size = max(full + max(reserve, full // 7 + 1), 8 * align)
        size += -size % mmap.PAGESIZE
        self.c = core.new("ring", size=size, full=full, keep=keep)
        self.c.turns.count = 1
        self._readers: set[Reader] = set()
        self._map: mmap.mmap | None = None
        self._pool: Pool | None = None
        self._pointer: core.Struct = None

    @classmethod
    def pooled(cls, pool: Pool, position: int, origin: int) -> Ring | None:
        """A ring for a stream of which `position` bytes have passed, counted as its first byte's `origin` is; its
        memory is the pool's until `close`, and it holds back what comes in a rush. None when there is none."""
        memory = pool.take()
        if memory is None:
            return None
        ring = cls(SIZE * 7 // 8, 0, 1, SIZE // 8)
        ring._pool = pool
        ring._use(memory)
        c = ring.c
        c.size = SIZE
        c.position = c.offered = c.start = c.oldest = c.base = position
        c.turns.origins[0] = origin
        c.batch, c.hold_ns, c.quick, c.least, c.need = BATCH, HOLD, QUICK, LEAST, LEAST
        return ring

    @property
    def origin(self) -> int:
        """The position at which the present stream began."""
        turns = self.c.turns
        return int(turns.origins[(turns.count - 1) % len(turns.origins)])

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
        memory = _anonymous(self.size)
        if memory is None:
            raise KernelError(
                f"mmap of {self.size} bytes failed",
                hint="a smaller buffer or burst needs less memory, or raise its limit (ulimit -v)",
            )
        self._use(memory)
        self.c.start = self.c.oldest = self.c.offered = self.c.position

    def _use(self, memory: mmap.mmap) -> None:
        self._map = memory
        self._pointer = core.ffi.from_buffer("char[]", memory)
        self.c.memory = self._pointer

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
        core.lib.relay_ring_drop(self.c, reader.c, reader.give_rest())

    def new_stream(self) -> None:
        """What comes from now on is another stream: `align` is counted anew."""
        core.lib.relay_ring_stream(self.c)

    def leave_behind(self, borrowers: Sequence[Borrower]) -> None:
        """Goes on in other memory, with what readers are still to get: what the threads of `borrowers` have stays where
        it is until they have ended. Where there is no other memory nothing changes."""
        if self._map is None:
            return
        memory = self._pool.take() if self._pool is not None else None
        pool = self._pool if memory is not None else None
        memory = memory or _anonymous(self.size)
        if memory is None:
            return
        memory[:] = memoryview(self._map)[: len(memory)]
        let_go = self._letting_go(len(borrowers))
        self._pool = pool
        self._use(memory)
        for reader in self._readers:
            reader.c.ends[0] = reader.c.ends[1] = 0
        for borrower in borrowers:
            borrower.afterwards(let_go)

    def _letting_go(self, times: int) -> Callable[[], None]:
        """Called so many times it gives back the memory that is the ring's now."""
        pointer, memory, pool, left = self._pointer, self._map, self._pool, times

        def let_go() -> None:
            nonlocal left
            left -= 1
            if left > 0 or memory is None:
                return
            core.ffi.release(pointer)
            if pool is not None:
                pool.give_back(memory)
            else:
                memory.close()

        return let_go

    def close(self, borrowers: Sequence[Borrower] = ()) -> None:
        """Gives the memory back; bytes pass by from now on. Safe to call again.

        The threads of `borrowers` may still read it: nobody else gets it before they have ended.
        """
        if self._map is None:
            return
        let_go = self._letting_go(len(borrowers))
        self.c.memory = core.ffi.NULL
        self._pointer = self._map = None
        for borrower in borrowers:
            borrower.afterwards(let_go)
        if not borrowers:
            let_go()
