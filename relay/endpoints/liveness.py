"""Whether the peer of a tcp connection is still there.

Facts (net/ipv4/tcp_timer.c, tcp_input.c; man 7 tcp; include/uapi/linux/tcp.h):
- Keepalive asks only while nothing is under way: a peer that vanishes with bytes outstanding is never asked by
  it. Its times are whole seconds; a connection is over after KEEPIDLE + KEEPCNT * KEEPINTVL without an answer.
- With bytes outstanding the kernel retransmits them, or, when the peer's window is shut, probes the window. Left
  alone it goes on for a quarter of an hour, the attempts up to two minutes apart.
- tcpi_retransmits counts timeouts since something was acknowledged, tcpi_probes the probes since any answer came;
  tcpi_last_ack_recv is how long ago the last acknowledgement came, also one of nothing new. A peer whose window
  is shut answers every probe with one.
- Packets in flight that meet a window which has shut meanwhile are retransmitted as probes: only tcpi_backoff
  counts those, and it goes on counting while they are answered.
- TCP_RTO_MAX_MS (Linux 6.15) bounds the time between two attempts; older kernels answer ENOPROTOOPT.

What this means here: `tune` lets keepalive find a dead idle peer. While bytes are outstanding a timer looks
LOOKS times within `dead_after`: a peer is dead when it has left retransmissions or probes unanswered for so long.
That a window is shut, for however long, is no sign of death. Where attempts cannot be bounded and are far apart, two
of them must have gone unanswered, since one packet may always be lost.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from relay.engine import Engine, Timer
from relay.kernel import core

LOOKS = 5  # at a busy connection, and attempts of the kernel's, within dead_after
TCP_RTO_MAX_MS = 44  # not in Python's socket module
RTO_MAX_MS = (1000, 120_000)  # what the kernel takes
LONGEST = 32767  # seconds that the kernel takes for keepalive

_TCP_INFO = struct.Struct("=5B3x I 12x I 28x I")  # state ... backoff, rto, unacked, last_ack_recv


class TcpState(NamedTuple):
    """What TCP_INFO says of a connection that waits for an answer; times in seconds."""

    retransmits: int
    probes: int
    backoff: int
    rto: float
    unacked: int
    heard: float  # since the last acknowledgement

    @classmethod
    def of(cls, fd: int) -> TcpState:
        """Of the connection `fd`, which is borrowed. Raises OSError."""
        sock = socket.socket(fileno=fd)
        try:
            got = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        finally:
            sock.detach()
        _state, _ca, retransmits, probes, backoff, rto, unacked, heard = _TCP_INFO.unpack(got)
        return cls(retransmits, probes, backoff, rto / 1e6, unacked, heard / 1e3)

    def asking(self) -> bool:
        """Whether something that was sent again waits for its answer."""
        return bool(self.retransmits or self.probes or (self.unacked and self.backoff))

    def unanswered(self, silent: float) -> bool:
        """Whether that many questions were left open during `silent` seconds that none of them is just late."""
        return self.retransmits + self.probes >= 2 or bool(
            self.unacked and self.backoff and not self.retransmits and silent >= 1.5 * self.rto
        )


class Liveness:
    """Calls `dead(seconds)` once when the peer of the tcp connection `end` has been silent for too long.

    Borrows `end`. `outstanding()` tells the bytes that are not acknowledged: while there are none nothing is looked
    at, and the pump says when there are some again (see `busy`). Lives on the engine of the end.
    """

    def __init__(
        self,
        engine: Engine,
        end: core.Struct,
        dead_after: float,
        outstanding: Callable[[], int],
        dead: Callable[[float], None],
    ) -> None:
        self._engine = engine
        self._end = end
        self._dead_after = dead_after
        self._outstanding = outstanding
        self._dead = dead
        self._timer: Timer | None = None
        self._asked_at = 0.0
        end.rouse = 1

    def busy(self) -> None:
        """Bytes, or the end of the stream, went out: the connection is looked at until all is acknowledged."""
        if self._timer is None and self._end.fd >= 0:
            self._asked_at = self._engine.now
            self._timer = self._engine.later(self._dead_after / LOOKS, self._look)

    @property
    def looking(self) -> bool:
        """Whether something is outstanding, as far as is known."""
        return self._timer is not None

    def _look(self) -> None:
        self._timer = None
        if self._end.fd < 0:
            return
        if not self._outstanding():
            self._end.rouse = 1
            return
        now = self._engine.now
        try:
            state = TcpState.of(self._end.fd)
        except OSError:  # it has failed already, which the pump is about to find
            return
        answered_at = now - state.heard
        if not state.asking():
            # in flight, and not late so far; or a shut window between two probes
            self._asked_at = max(answered_at, self._end.last_ns / 1e9) if state.unacked else now
        silent = now - max(self._asked_at, answered_at)
        if silent >= self._dead_after and state.asking() and state.unanswered(silent):
            self._dead(silent)
            return
        left = self._dead_after - silent
        step = self._dead_after / LOOKS
        self._timer = self._engine.later(min(step, left) if left > 0.001 else step, self._look)

    def close(self) -> None:
        """Looks no more. Safe to call again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def keepalive(dead_after: float) -> tuple[int, int, int]:
    """KEEPIDLE, KEEPINTVL (seconds) and KEEPCNT that find a dead idle peer within `dead_after`, 2 s at least."""
    whole = max(2, int(dead_after))
    count = min(3, whole - 1)
    interval = max(1, whole // 7)
    return min(whole - count * interval, LONGEST), min(interval, LONGEST), count


def tune(sock: socket.socket, dead_after: float) -> None:
    """What every tcp socket of relay's gets: no Nagle delay, keepalive, and attempts that are close together."""
    idle, interval, count = keepalive(dead_after)
    low, high = RTO_MAX_MS
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count)
    with contextlib.suppress(OSError):  # an older kernel: its attempts are further apart, see above
        longest = min(high, max(low, int(dead_after * 1000 / LOOKS)))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, longest)
