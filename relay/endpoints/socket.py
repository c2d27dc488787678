"""Stream sockets as ends, for tcp and unix alike: connect, read from, write to, end well.

Facts (man 7 tcp, 7 unix, 2 close; net/ipv4/tcp.c):
- close() with unread inbound bytes resets the connection and destroys what is under way to the peer.
- SIOCOUTQ gives the bytes not yet acknowledged, and counts an unacknowledged FIN as one more; after a reset
  it still tells (tcp). On unix sockets it counts memory that the peer has not read yet.
- A unix peer that closes with bytes unread sets ECONNRESET first and then lets go of them, so SIOCOUTQ is 0.
- SO_LINGER with a time of 0 makes close() send a reset.

What this means here: what the peer of a one-way sink sends is read and discarded by the pump. A sink ends by
shutting its write side; it is delivered when nothing is unacknowledged; it closes at the peer's end of stream
or GRACE seconds later. A source is closed when its stream has been delivered, and reset when it has not.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable
from typing import Any

from relay.endpoints.base import Sink, Source
from relay.endpoints.liveness import Liveness
from relay.engine import Engine, Timer
from relay.units import show_size

GRACE = 2.0  # seconds a delivered sink waits for its peer to close first
READ_WRITE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP


def unacknowledged(fd: int) -> int:
    """SIOCOUTQ: bytes sent on `fd` that its peer has not acknowledged (tcp) or not read (unix, as memory)."""
    answer = fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])


def error_of(fd: int) -> int:
    """SO_ERROR: the errno that waits on a socket, or 0; taken off it."""
    return int(socket_of(fd, lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)))


def close_with_reset(fd: int) -> None:
    """Closes `fd` so that its peer sees a reset, not an end of stream."""
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # the connection is gone already
    sock.close()


class SocketSource(Source):
    """A connected stream socket as source; owns it. `peer` is where it comes from, `local` where it had connected to
    when that was somewhere else."""

    def __init__(
        self, engine: Engine, address: str, sock: socket.socket | None, peer: str, local: str = ""
    ) -> None:
        super().__init__(engine, address)
        self.peer = peer
        self.local = local
        self.c.is_socket = 1
        self._sock: socket.socket | None = sock
        if sock is not None:
            sock.setblocking(False)

    def open(self) -> None:
        """Registers the socket with the engine."""
        sock, self._sock = self._sock, None
        if sock is None or self.attach(sock.detach(), select.EPOLLIN | select.EPOLLRDHUP):
            self.on_open()

    def close(self, *, reset: bool = False) -> None:
        """Closes the connection; with `reset` its peer sees ECONNRESET."""
        if self.closed:
            return
        self.closed = True
        fd = self._sock.detach() if self._sock is not None else self.detach()
        self._sock = None
        if fd >= 0:
            close_with_reset(fd) if reset else socket.close(fd)
        self.on_close()


class SocketSink(Sink):
    """A connected stream socket as a one-way sink; subclasses connect it. Owns the socket once connected."""

    counts_fin = True  # tcp: SIOCOUTQ tells after a reset too, and an unacknowledged FIN is one more in it

    def __init__(
        self,
        engine: Engine,
        address: str,
        *,
        close_with_peer: bool = False,
        patience: float = 0.0,
        dead_after: float = 0.0,
    ) -> None:
        super().__init__(engine, address)
        self.c.is_socket = 1
        self.c.discard = 1
        self.dead_after = dead_after  # 0: the peer cannot vanish without the kernel's knowing
        self._liveness: Liveness | None = None
        self.close_with_peer = close_with_peer
        self._patient_until = engine.now + patience
        self._timer: Timer | None = None
        self.grace = GRACE
        self._delivered_at = 0.0
        self._wait = 0.001
        self._finish_asked = False
        self._cut_at = 0.0

    def adopt(self, sock: socket.socket) -> None:
        """Takes the connected socket over and is open."""
        if self.state != "opening":
            sock.close()
            return
        sock.setblocking(False)
        if not self.attach(sock.detach(), READ_WRITE):
            return
        if self.dead_after:
            self._liveness = Liveness(
                self.engine, self.c, self.dead_after, lambda: unacknowledged(self.c.fd), self._dead
            )
        self.opened()
        if self._finish_asked:
            self.finish()

    def not_connected(self, code: int, reason: str = "", advice: str = "") -> None:
        """For subclasses: a connect failed. Tries again while there is patience left."""
        if self.state != "opening":
            return
        if self.engine.now < self._patient_until:
            self._timer = self.engine.later(0.1, self.open)
            return
        self.fail(self.error("connecting to", code, reason=reason, advice=advice))

    def finish(self) -> None:
        """Shuts the write side, waits until the peer's kernel has everything, then for the peer to close."""
        if self.state == "opening":  # nothing came before it was connected: it still gets its end of stream
            self._finish_asked = True
            return
        if self.state != "open":
            return
        try:
            socket_of(self.c.fd, lambda sock: sock.shutdown(socket.SHUT_WR))
        except OSError as error:  # it was reset just now: no end was sent, and what was under way is lost
            self.lost = self._outstanding()
            self.fail(self.error("ending the stream to", error_of(self.c.fd) or error.errno or 0))
            return
        self.state = "finishing"
        self.busy()  # the end of a stream wants its answer, too
        self._await_delivery()

    def _await_delivery(self) -> None:
        if self.state != "finishing":
            return
        now = self.engine.now
        if not self._delivered_at and unacknowledged(self.c.fd) == 0:
            if not self.counts_fin and (code := error_of(self.c.fd)):
                self.broke(code)  # nothing is outstanding because the peer closed with bytes unread
                return
            self._delivered_at = now
        if self._delivered_at and (self.c.peer_ended or now - self._delivered_at >= self.grace):
            self.finished()
            return
        self._timer = self.engine.later(self._wait, self._await_delivery)
        self._wait = min(self._wait * 2, 0.05)

    def busy(self) -> None:
        """Bytes are under way: from now on the peer has to answer."""
        if self._liveness is not None:
            self._liveness.busy()

    def _dead(self, silent: float) -> None:
        self.lost = self._outstanding()
        what = show_size(self.lost) if self.lost else "the end of the stream"
        reason = f"silent for {silent:.3g} s with {what} unacknowledged"
        self.fail(self.error("writing to", errno.ETIMEDOUT, reason=reason))

    def peer_ended(self) -> None:
        """Notes the peer's half-close; while finishing it may settle that everything arrived."""
        if self.c.fd < 0:  # it failed in the same round
            return
        if self.state == "finishing":
            if self._timer is not None:
                self._timer.cancel()
            self._await_delivery()
        elif self._peer_is_gone():
            self.broke(errno.EPIPE)
        elif self.close_with_peer:
            self.fail(self.error("writing to", 0, reason="its peer closed", advice="peer_eof is close"))

    def broke(self, code: int, reason: str = "") -> None:
        """Counts what the peer had not acknowledged as lost. A reset after everything was is no failure."""
        if self.state == "finishing" and (self._delivered_at or self._acknowledged()):
            self.reason = "the peer reset the connection after it had everything"
            self.finished()
            return
        if self.state in ("open", "finishing", "cutting"):
            self.lost = self._outstanding()
        if code == errno.ETIMEDOUT and self.dead_after:
            reason = f"silent for {self.dead_after:.3g} s, keepalive included"
        super().broke(code, reason)

    def _peer_is_gone(self) -> bool:
        """Whether the peer has closed and not just ended its own stream: only unix sockets tell the difference."""
        waiter = select.poll()
        waiter.register(self.c.fd, 0)
        return any(mask & select.POLLHUP for _fd, mask in waiter.poll(0))

    def _acknowledged(self) -> bool:
        """Whether the dead connection's peer had acknowledged the end of the stream."""
        return self.counts_fin and unacknowledged(self.c.fd) == 0

    def _outstanding(self) -> int:
        if self._delivered_at:
            return 0
        try:
            waiting = unacknowledged(self.c.fd)
        except OSError:
            return 0
        if self.counts_fin and self.state == "finishing" and waiting:
            waiting -= 1
        return min(waiting, self.moved)

    @property
    def seconds(self) -> float:
        """Until everything was acknowledged: waiting for the peer to close moves no bytes."""
        return self._delivered_at - self.opened_at if self._delivered_at else super().seconds

    def under_way(self) -> int:
        """What the peer's kernel has not acknowledged (tcp); what a unix peer has taken is its own."""
        return self._outstanding() if self.counts_fin and self.c.fd >= 0 else 0

    def unread(self) -> int:
        """What SIOCOUTQ says, until it once was nothing."""
        return unacknowledged(self.c.fd) if self.c.fd >= 0 and not self._delivered_at else 0

    def cut(self, reason: str) -> None:
        """Waits up to GRACE seconds for the peer's kernel to have what was sent, then resets the connection."""
        if self.state != "open":
            self.abort(reason)
            return
        self.state = "cutting"
        self._cut_at = self.engine.now
        self._await_cut(reason)

    def _await_cut(self, reason: str) -> None:
        if self.state != "cutting":
            return
        if unacknowledged(self.c.fd) == 0 or self.engine.now - self._cut_at >= GRACE:
            self.abort(reason)
            return
        self._timer = self.engine.later(self._wait, lambda: self._await_cut(reason))
        self._wait = min(self._wait * 2, 0.05)

    def abort(self, reason: str) -> None:
        """Resets the connection: the receiver must not take what it has for the whole."""
        if self.state in ("open", "finishing", "cutting"):
            self.lost = self._outstanding()
        super().abort(reason)

    def close(self) -> None:
        """Closes the connection; with a reset if the stream was not delivered."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._liveness is not None:
            self._liveness.close()
        fd = self.detach()
        if fd >= 0:
            close_with_reset(fd) if self.state == "failed" else socket.close(fd)


def socket_of(fd: int, use: Callable[[socket.socket], Any]) -> Any:
    """`use` on a socket object that borrows `fd`."""
    sock = socket.socket(fileno=fd)
    try:
        return use(sock)
    finally:
        sock.detach()
