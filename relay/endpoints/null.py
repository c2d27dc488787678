"""Nothing: an empty source, a sink that forgets (`null:`).

Facts (drivers/char/mem.c): /dev/null takes a splice without looking at the pages; as input splice says EINVAL,
and its end comes at once. epoll refuses it: it never waits.
"""

from __future__ import annotations

import os

from relay.endpoints.base import Sink, Source
from relay.engine import Engine
from relay.kernel import core


class NullSource(Source):
    """A stream of no bytes."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, "null:")
        self.scheme = "null"

    def open(self) -> None:
        """There is nothing to open: the pump sees a source with no bytes left."""
        self.c.kind = core.INSTANT
        self.c.left = 0
        self.c.readable = 1
        self.on_open()


class NullSink(Sink):
    """Takes everything at once; owns a descriptor of /dev/null."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, "null:")

    def open(self) -> None:
        """Opens /dev/null."""
        self.c.fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self.c.kind = core.INSTANT
        self.c.writable = 1
        self.opened()
