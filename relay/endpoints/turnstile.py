"""How many connections may come in a second: those beyond it wait in the kernel's backlog, nobody is refused."""

from __future__ import annotations

SHORTEST = 0.01  # seconds until it is looked at again: at a high rate several come in at once


class Turnstile:
    """Lets `rate` through in a second on the long run, and after a quiet second as many at once. Used on one thread.

    Times are monotonic seconds, given by whoever asks.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._most = max(1.0, rate)
        self._tokens = self._most
        self._at: float | None = None

    def room(self, now: float) -> int:
        """How many may come in now."""
        if self._at is not None:
            self._tokens = min(self._most, self._tokens + (now - self._at) * self.rate)
        self._at = now
        return int(self._tokens + 1e-9)

    def took(self, count: int) -> None:
        """So many have come in."""
        self._tokens -= count

    def wait(self) -> float:
        """Seconds until there is room for the next one, when there was none."""
        return max(SHORTEST, (1.0 - self._tokens) / self.rate)
