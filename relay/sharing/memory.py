"""Memory as an end of a route, for code: bytes that a route reads, or room that it writes to.

Facts (man 2 memfd_create, 5 proc): a memfd is a file without a name, in memory. /proc/self/fd/N opens it anew, from its
beginning; descriptors that were duplicated share one position, so what is written through them is appended.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from relay.kernel import memfd
from relay.sharing.content import Content
from relay.sharing.held import Held
from relay.sharing.shared import Shared

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Memory(Held):
    """A stream in memory: `source` and `sink` are its addresses in routes of this process, while it is open.

    `Memory(content)` holds a copy of the buffer `content`, `Memory()` nothing so far. A route that has `source` reads
    all of it, from its beginning, by reference; one that has `sink` writes behind what is there, as much as its stream
    has: give streams without end an end (`limit`). KernelError when memory or descriptors run out. It owns a
    descriptor until `share` or `close`, and the end of a `with` block; ValueError afterwards.
    """

    def __init__(self, content: Buffer = b"") -> None:
        self._fd = memfd.make("relay-memory")
        try:
            with memoryview(content) as view, view.cast("B") as flat:
                if flat:
                    memfd.fill(self._fd, flat)
                    os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Bytes that are there."""
        return os.fstat(self.fileno()).st_size

    @property
    def source(self) -> str:
        """The address by which a route reads it."""
        return f"/proc/self/fd/{self.fileno()}"

    @property
    def sink(self) -> str:
        """The address by which a route writes to it."""
        return f"fd://{self.fileno()}"

    def read(self) -> bytes:
        """A copy of what is there."""
        fd, size = self.fileno(), len(self)
        found = bytearray(size)
        at = 0
        with memoryview(found) as room:
            while at < size and (count := os.preadv(fd, [room[at : at + memfd.PIECE]], at)):
                at += count
        return bytes(found[:at])

    def share(self) -> Shared:
        """What is there, final, without a copy; the memory belongs to the Shared from here on.

        ValueError when nothing is there. A route that still writes to it fails.
        """
        size = len(self)
        if not size:
            raise ValueError("empty memory cannot be shared: there is no page to map")
        memfd.seal(self.fileno(), memfd.FINAL)
        return Shared(self._take(), Content("|u1", (size,)))
