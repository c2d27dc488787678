"""A PROXY header in front of a stream: a sink's first bytes, which name the peer of the source."""

from __future__ import annotations

from relay.endpoints.proxy_header import Version, make
from relay.kernel.arena import Arena
from relay.stages.stage import Stage, Turn


class Introduction(Stage):
    """Lends the header to the pipe out of which the sink is filled, behind the place where its policy drops bytes: what
    is dropped is never a part of the header. Owns the arena.
    """

    of_a_stream = True

    def __init__(self, version: Version) -> None:
        super().__init__("proxy_protocol", "proxy_protocol")
        self._version: Version = version
        self._arena: Arena | None = None

    def begin(self, turn: Turn) -> None:
        """Lays the header out in memory for the pump to lend."""
        self.close()
        self._arena = Arena(make(self._version, turn.peer, turn.local))
        self.node.prefix = self._arena.pointer()
        self.node.prefix_left = self._arena.size

    def close(self) -> None:
        """Unmaps the header; pages that were lent live on with their readers."""
        if self._arena is not None:
            self.node.prefix_left = 0
            self._arena.close()
            self._arena = None
