"""What the duplex sessions of one engine share: memory and pipes for bytes that wait, and the sessions' structs.

Facts: a private anonymous mapping takes no memory until it is written to. Buffers are handed out last in, first out
(kernel/duplex.c), so those that were never needed at once stay untouched.

What this means here: the mapping may be as large as the worst case, an idle session costs its struct alone. Pipes
are made one by one, when C says that bulk would go through one.
"""

from __future__ import annotations

import mmap
from typing import Final

from relay.errors import KernelError
from relay.kernel import core
from relay.kernel.pipe import Pipe

SMALL: Final = 64 << 10  # bytes of a buffer for messages
LARGE: Final = 4 << 20  # bytes of a buffer for bulk: what a send queue takes at most
SMALL_BUFFERS: Final = 256
LARGE_BUFFERS: Final = 16
PIPES: Final = 8  # of 1 MiB each; bulk that finds none free is copied
SLAB: Final = 64  # sessions' structs that are allocated together


class Exchange:
    """Owns the buffers, the pipes and the structs. Lives on its engine; `close` it after every session is gone.

    `sessions[slot]` is the struct of a session; `take` gives the number of a free slot, `give_back` frees it.
    """

    def __init__(
        self, *, small_buffers: int = SMALL_BUFFERS, large_buffers: int = LARGE_BUFFERS, pipes: int = PIPES
    ) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        size = max(small_buffers * SMALL + large_buffers * LARGE, mmap.PAGESIZE)
        self._memory = mmap.mmap(-1, size, flags=flags)
        self._view = core.ffi.from_buffer("char[]", self._memory)
        self._small_free = core.ffi.new("int32_t[]", list(range(small_buffers)) or 1)
        self._large_free = core.ffi.new("int32_t[]", list(range(large_buffers)) or 1)
        self._pipes_r = core.ffi.new("int[]", max(1, pipes))
        self._pipes_w = core.ffi.new("int[]", max(1, pipes))
        self._pipes: list[Pipe] = []
        self._most_pipes = pipes
        self.c = core.new(
            "exchange",
            small=self._view,
            large=self._view + small_buffers * SMALL,
            small_free=self._small_free,
            large_free=self._large_free,
            small_size=SMALL,
            large_size=LARGE,
            small_count=small_buffers,
            large_count=large_buffers,
            pipes_r=self._pipes_r,
            pipes_w=self._pipes_w,
            wants_pipe=int(pipes > 0),
        )
        self.sessions: list[core.Struct] = []
        self._slabs: list[core.Struct] = []
        self._free: list[int] = []

    def add_pipe(self) -> None:
        """C found none free: one more, up to the limit. Without descriptors for it bulk goes on being copied."""
        if len(self._pipes) >= self._most_pipes:
            return
        try:
            pipe = Pipe()
        except KernelError:
            return
        self._pipes.append(pipe)
        count = self.c.pipe_count
        self._pipes_r[count], self._pipes_w[count] = pipe.read_fd, pipe.write_fd
        self.c.pipe_count = count + 1
        self.c.wants_pipe = int(len(self._pipes) < self._most_pipes)

    def take(self) -> int:
        """A free slot; relay_duplex_begin fills its struct."""
        if not self._free:
            slab = core.ffi.new("struct relay_duplex[]", SLAB)
            self._slabs.append(slab)
            first = len(self.sessions)
            self.sessions += [slab + i for i in range(SLAB)]
            self._free += range(first + SLAB - 1, first - 1, -1)
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """The session there is closed (relay_duplex_close)."""
        self._free.append(slot)

    @property
    def free(self) -> tuple[int, int, int]:
        """Small buffers, large buffers and pipes that nobody holds."""
        return int(self.c.small_count), int(self.c.large_count), int(self.c.pipe_count)

    def close(self) -> None:
        """Closes the pipes and gives the memory back."""
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self.c.pipe_count = 0
        core.ffi.release(self._view)
        self._memory.close()
