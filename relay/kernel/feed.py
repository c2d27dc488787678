"""The typed face of feed.c: the loops that feed sources and read from sinks while something is measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, Literal

from relay.kernel import core

DrainKind = Literal["pipe", "tcp", "unix"]

_KINDS: Final = {
    "pipe": int(core.lib.RELAY_DRAIN_PIPE),
    "tcp": int(core.lib.RELAY_DRAIN_TCP),
    "unix": int(core.lib.RELAY_DRAIN_UNIX),
}
MOST: Final = 64  # consumers in one loop
TAKES: Final = 256 * 1024  # bytes a unix socket is read by


class Feed:
    """Gives `size` bytes a call to the blocking descriptor `fd`, which it borrows, until it is stopped.

    With `file` (of `file_size` bytes) they go by reference into the pipe `fd`; else from memory, by write.
    """

    def __init__(self, fd: int, size: int, *, file: int = -1, file_size: int = 0) -> None:
        self._memory = core.buffer(size) if file < 0 else None
        self._c = core.ffi.new(
            "struct relay_feed *", {"fd": fd, "size": size, "file": file, "file_size": file_size}
        )
        if self._memory is not None:
            self._c.memory = self._memory

    def run(self) -> int:
        """Feeds; 0 once it was stopped, or the errno when nobody takes the bytes. Without the GIL."""
        return -int(core.lib.relay_feed_run(self._c))

    def stop(self) -> None:
        """No further call is begun. From any thread."""
        self._c.stop = 1

    @property
    def moved(self) -> int:
        """Bytes given so far."""
        return int(self._c.moved)


class Drain:
    """Throws away what comes from nonblocking descriptors, which it borrows; owns /dev/null and an eventfd."""

    def __init__(self, fds: Sequence[int], kind: DrainKind) -> None:
        self._fds = core.ffi.new("int[]", list(fds))
        self._kinds = core.ffi.new("int[]", [_KINDS[kind]] * len(fds))
        self._got = core.ffi.new("int64_t[]", len(fds))
        self._memory = core.buffer(TAKES)
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._c = core.ffi.new(
            "struct relay_drain *",
            {
                "fds": self._fds,
                "kinds": self._kinds,
                "got": self._got,
                "count": len(fds),
                "null_fd": self._null,
                "stop": self._stop,
                "memory": self._memory,
                "memory_size": TAKES,
            },
        )

    def run(self) -> int:
        """Reads until all streams have ended or it is stopped: 0, or the errno of the first that broke."""
        return -int(core.lib.relay_drain_run(self._c))

    def stop(self) -> None:
        """Ends the loop. From any thread."""
        os.eventfd_write(self._stop, 1)

    @property
    def got(self) -> list[int]:
        """Bytes that came from each."""
        return [int(count) for count in self._got]

    def close(self) -> None:
        """Closes its own descriptors. `run` must have ended, or never begun."""
        os.close(self._null)
        os.close(self._stop)
