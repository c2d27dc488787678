"""The memory of a process that serves for a year: what streams left behind is given back.

Facts (CPython's Modules/gcmodule.c and Objects/obmalloc.c; kernel/heap.c for the C library's):
- The collector looks when 700 more objects that may refer to others were made than freed, and at the oldest of them
  only when those have grown by a quarter. What is frozen it never looks at.
- Small objects lie in arenas of 1 MiB, and one is given back when nothing in it is alive: a few hundred objects that
  were made in a crowd of connections keep all of the crowd's memory. Such are the free tuples and the like that are
  kept for use (a full collection empties these lists) and records of the last sessions (put together by being made
  anew).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from relay.journal.record import SessionRecord
from relay.kernel import core

MANY = 500  # sessions whose memory is worth a full collection
QUIET = 1.0  # seconds without the end of a session, in which a collection holds up nobody


class Heap:
    """The heap of a process that is a server's own, looked after on its main thread.

    `tell(action)` has the main thread do it, from any other one. `compact()` puts together what others have kept of
    the sessions that ended.
    """

    def __init__(self, tell: Callable[[Callable[[], None]], None], compact: Callable[[], None]) -> None:
        self._tell = tell
        self._compact = compact
        self._ended = self._seen = self._before = (
            0  # sessions: until now, at the last look, when it was last small
        )
        self._asked = False
        self._next_look: float | None = None

    def own(self) -> None:
        """Once what stays to the end is there, and before other threads begin.

        The collector leaves that alone. So it soon has looked at what streams leave behind, and can do that often:
        otherwise some ten thousand of them wait for it in memory. One arena serves all threads.
        """
        core.lib.relay_keep_heap_small()
        gc.collect()
        gc.freeze()
        gc.set_threshold(700, 10, 4)

    def watched(self, on_record: Callable[[SessionRecord], None]) -> Callable[[SessionRecord], None]:
        """`on_record`, by which it knows of sessions that ended. On any engine's thread."""

        def noted(record: SessionRecord) -> None:
            self._ended += 1
            if not self._asked and self._ended >= self._before + MANY:
                self._asked = True
                self._tell(self._wait)
            on_record(record)

        return noted

    def _wait(self) -> None:
        self._seen = self._ended
        self._next_look = time.monotonic() + QUIET

    @property
    def due(self) -> float | None:
        """Seconds until it wants to `look`; None if never."""
        return None if self._next_look is None else max(0.0, self._next_look - time.monotonic())

    def look(self) -> None:
        """Gives memory back when many sessions have ended, and none has lately."""
        if self.due != 0.0:
            return
        if self._ended != self._seen:
            self._wait()
            return
        self._next_look = None
        self._before, self._asked = self._ended, False
        self._compact()
        gc.collect()
        core.lib.relay_trim_heap()
