"""How old the bytes are that wait in a log."""

from __future__ import annotations

import threading
import time
from collections import deque

APART = 0.5  # seconds between two marks, at first
MOST = 512  # marks; then every other one goes, and the next are twice as far apart


class Ages:
    """Notes when the bytes at a position were appended, now and then; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marks: deque[tuple[float, int]] = deque()
        self._apart = APART

    def note(self, position: int, at: float | None = None) -> None:
        """What comes at `position` and after it is appended now, or at that monotonic time."""
        now = time.monotonic() if at is None else at
        marks = self._marks
        if marks and now - marks[-1][0] < self._apart:  # one thread notes, and it sees its own last mark
            return
        with self._lock:
            marks.append((now, position))
            if len(marks) > MOST:
                self._marks = deque(list(marks)[::2])
                self._apart *= 2

    def oldest(self, position: int) -> float:
        """Seconds since the bytes at `position` were appended, at most by the distance of two marks too many."""
        with self._lock:
            marks = self._marks
            while len(marks) > 1 and marks[1][1] <= position:
                marks.popleft()
            if len(marks) < 2:
                self._apart = APART
            return max(0.0, time.monotonic() - marks[0][0]) if marks else 0.0
