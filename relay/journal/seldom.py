"""What may happen a thousand times a second, said once in a while, with the count of what was not said."""

from __future__ import annotations

import time


class Seldom:
    """Lets one in `every` seconds through. Used on one thread."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._last = float("-inf")
        self._held_back = 0

    def __call__(self) -> int:
        """How many times it happened since it was last said, this one included; 0: say nothing now."""
        self._held_back += 1
        now = time.monotonic()
        if now - self._last < self._every:
            return 0
        self._last = now
        count, self._held_back = self._held_back, 0
        return count
