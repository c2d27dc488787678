"""One duplex session."""

from __future__ import annotations

from relay.duplex.upstream import Attempt, Upstream
from relay.kernel import core


class Session:
    """One connection and its counterpart. `slot` is its number in the exchange, -1 once it is closed.

    `via` is the proxy that named the peer, "" if none did. `attempt` is the upstream it has, or tries, the `tries`-th;
    `tried` are those that it could not be connected to, `passed` who did not get it and why, `failed` the last of those
    and the errno, `busy` whether a backlog was full, `until` when it is given up unless it is connected. `ahead` is
    memory that C sends from before all else.
    """

    __slots__ = (
        "ahead",
        "attempt",
        "began",
        "busy",
        "c",
        "failed",
        "id",
        "passed",
        "peer",
        "slot",
        "tried",
        "tries",
        "until",
        "via",
    )

    def __init__(self, slot: int, c: core.Struct, ident: int, peer: str, via: str, began: float) -> None:
        self.slot = slot
        self.c = c
        self.id = ident
        self.peer = peer
        self.via = via
        self.began = began
        self.ahead: core.Struct = None
        self.attempt: Attempt | None = None
        self.tries = 0
        self.tried: tuple[Upstream, ...] = ()
        self.passed: tuple[tuple[str, str], ...] = ()
        self.until = 0.0
        self.busy = False
        self.failed: tuple[Upstream, int] | None = None

    @property
    def scheme(self) -> str:
        """Of the upstream that it has; tcp while it has none."""
        return self.attempt.upstream.scheme if self.attempt is not None else "tcp"
