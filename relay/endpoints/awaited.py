"""A socket on which something is waited for, and what goes with the waiting."""

from __future__ import annotations

import socket

from relay.engine import Timer, Watch


class Awaited:
    """Owns a socket, the watch on it, and a timer; each may be missing.

    `close` ends all three, `let_go` gives the socket away.
    """

    __slots__ = ("sock", "timer", "watch")

    def __init__(self, sock: socket.socket | None = None) -> None:
        self.sock = sock
        self.watch: Watch | None = None
        self.timer: Timer | None = None

    def let_go(self) -> socket.socket | None:
        """Nothing is waited for any more; the socket is the caller's. Safe to call again."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        sock, self.sock = self.sock, None
        return sock

    def close(self) -> None:
        """Nothing is waited for any more, the socket is closed. Safe to call again."""
        sock = self.let_go()
        if sock is not None:
            sock.close()
