"""A log as a source: what was appended, from a position on, and then whatever comes."""

from __future__ import annotations

import os
from collections.abc import Callable

from relay.endpoints.base import Source
from relay.engine import Engine
from relay.kernel import core
from relay.log.log import Log

TORN = "the stream was cut off before its end"


class LogSource(Source):
    """Reads a log from `position` on, and waits at its end for more; owns one descriptor, of one segment.

    The pump reads what `left` says; then it is dry, and `refill` looks for what was appended since.
    """

    rings = False

    def __init__(self, engine: Engine, kept: Log, position: int) -> None:
        super().__init__(engine, "log")
        self.scheme = "file"
        self._log = kept
        self._start = position
        self._base = -1  # position of the open segment's first byte
        self._whole = False
        self.c.kind = core.INSTANT
        self.c.waits = 1
        self.began_at = position
        self.torn = ""
        self.on_refill: Callable[[], None] = lambda: None

    def open(self) -> None:
        """Opens the segment that holds the position. Raises OSError when it cannot."""
        self._look(self._start)
        self.on_open()

    @property
    def position(self) -> int:
        """Of the next byte to be read."""
        return self._base + int(self.c.offset) if self.c.fd >= 0 else self._start

    def _look(self, position: int) -> None:
        base, available = self._log.extent(position)
        if base != self._base:
            fd = self._log.open_segment(base)
            old = self.detach()
            self.c.fd, self._base = fd, base
            if old >= 0:
                os.close(old)
        self.c.offset, self.c.left, self.c.readable = position - base, available, 1

    def refill(self) -> bool:
        """Looks for what was appended since; False when there is nothing new and more may come."""
        if self.closed or self.c.fd < 0:
            return False
        if self.c.left == 0:
            self._look(self.position)
            self.on_refill()
        if self.c.left == 0 and self._whole:
            self.c.waits = 0
        self.c.readable = 1
        return bool(self.c.left) or self._whole

    def changed(self) -> str:
        """A stream that was cut off before its end must not be taken for whole."""
        return self.torn

    def whole(self) -> None:
        """Nothing more will be appended: the end of the log is the end of the stream."""
        self._whole = True
