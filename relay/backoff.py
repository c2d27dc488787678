"""How long to wait before a connection is tried again."""

from __future__ import annotations

import random


class Backoff:
    """Growing, jittered waits between attempts; only sustained success makes them short again."""

    FIRST = 0.1
    LONGEST = 15.0
    SUSTAINED = 10.0

    def __init__(self, chance: random.Random | None = None) -> None:
        self._chance = chance or random.Random()
        self._wait = self.FIRST

    def next(self) -> float:
        """Seconds to wait before the next attempt: between half of the current step and all of it."""
        wait, self._wait = self._wait, min(self._wait * 2, self.LONGEST)
        return wait * (0.5 + self._chance.random() / 2)

    def lasted(self, seconds: float) -> None:
        """A connection ended that had been up for so long."""
        if seconds >= self.SUSTAINED:
            self._wait = self.FIRST
