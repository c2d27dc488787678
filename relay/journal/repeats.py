"""Warnings that come again and again: said so many times, then once in a while with the count of what was not said.

What is held back is told by its text before the names are filled in: a thousand sinks that fail alike are one thing.
Lines of sessions and whatever is said once at most (what listens, a reload and its problems) always pass.
"""

from __future__ import annotations

import logging
import threading
import time

BURST = 100  # lines of one text that pass
WINDOW = 10.0  # seconds for which they count; after that as many pass again
BETWEEN = 1.0  # seconds between two lines of a text beyond its burst
MOST = 1000  # texts that are counted; they are the program's own, so there are not that many


class _Said:
    """How often a text came: in this window, and since it was last let through."""

    __slots__ = ("began", "count", "held", "last")

    def __init__(self, now: float) -> None:
        self.began = self.last = now
        self.count = self.held = 0


class Repeats(logging.Filter):
    """Lets a line through or holds it back; one that ends a row of held ones says how many there were."""

    def __init__(self, *, burst: int = BURST, window: float = WINDOW, between: float = BETWEEN) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._texts: dict[tuple[str, int, str], _Said] = {}
        self._burst = burst
        self._window = window
        self._between = between

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is said."""
        if record.levelno < logging.WARNING or record.name == "relay.session" or hasattr(record, "event"):
            return True
        now = time.monotonic()
        with self._lock:
            held = self._count((record.name, record.levelno, str(record.msg)), now)
        if held < 0:
            return False
        if held:
            record.msg = f"{record.getMessage()} (and {held} more like it that were not said)"
            record.args = ()
            record.repeated = held
        return True

    def _count(self, key: tuple[str, int, str], now: float) -> int:
        """How many were held back before this one, which passes; -1 when it is held back itself."""
        if len(self._texts) >= MOST:
            self._texts.clear()
        said = self._texts.setdefault(key, _Said(now))
        if now - said.began >= self._window:
            said.began, said.count = now, 0
        said.count += 1
        if said.count > self._burst and now - said.last < self._between:
            said.held += 1
            return -1
        said.last = now
        held, said.held = said.held, 0
        return held
