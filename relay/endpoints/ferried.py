"""A sink whose bytes a thread of its own takes: a file, a checksum, a descriptor that may block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relay.endpoints.base import Sink
from relay.endpoints.ferry import Ferry
from relay.engine import Engine
from relay.kernel import core


class FerriedSink(Sink):
    """Owns a ferry, which closes itself when its thread has ended. `_straight`: the source is read into its memory."""

    def __init__(self, engine: Engine, address: str) -> None:
        super().__init__(engine, address)
        self._ferry: Ferry | None = None
        self._straight = False
        self.c.kind = core.FERRY

    def embark(
        self, capacity: int, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]
    ) -> None:
        """Starts the thread, as in Ferry. Raises KernelError where there is no descriptor or thread for it."""
        self._ferry = Ferry(self.engine, self.c, capacity, work, then)
        self._ferry.start()

    @property
    def method(self) -> str:
        """How bytes reach their end."""
        if self._ferry is None:
            return "splice"
        return "copy" if self._straight else core.METHOD_NAMES[self._ferry.c.method]

    def unwire(self) -> None:
        """The pipeline is going away; the thread may still be at work."""
        super().unwire()
        if self._ferry is not None:
            self._ferry.release()

    def finish(self) -> None:
        """Hands over what is left; on_finish comes when the thread is done with it."""
        if self.state in ("opening", "open") and self._ferry is not None:
            self.state = "finishing"
            self._ferry.end()

    def close(self) -> None:
        """Lets the thread end."""
        if not self.closed:
            self.closed = True
            if self._ferry is not None and self.state != "finished":
                self._ferry.end()
