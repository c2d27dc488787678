"""Facts about sockets: what close() destroys, what SIOCOUTQ tells, what MSG_TRUNC drops."""

from __future__ import annotations

import contextlib
import os
import select
import socket

import pytest
from descriptors import Descriptors
from peers import eventually, payload, receive_all, receive_exactly, received, wait_for
from syscalls import NONBLOCK, readable, tcp_info, unacknowledged

TCP_CLOSE = 7


def clog(sock: socket.socket, data: bytes) -> int:
    """Sends of `data` what the sockets hold; returns the bytes sent."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(data):
            sent += sock.send(data[sent:])
    assert sent < len(data), "the sockets hold more than the test's data"
    return sent


def test_close_with_unread_bytes_destroys(fds: Descriptors) -> None:
    """close() with unread inbound bytes resets the peer, which loses all it had not received yet."""
    near, far = fds.tcp_pair(receive_buffer=4096)
    sent = clog(near, payload(7, 16 << 20))
    far.send(b"unread")
    wait_for(near)
    near.close()
    pieces: list[bytes] = []
    with pytest.raises(ConnectionResetError):
        pieces.extend(received(far))
    assert sum(map(len, pieces)) < sent


def test_close_with_everything_read_delivers(fds: Descriptors) -> None:
    """close() after reading all that came in delivers every byte that was queued, and then the end."""
    near, far = fds.tcp_pair(receive_buffer=4096)
    data = payload(7, 16 << 20)
    far.send(b"read")
    assert receive_exactly(near, 4) == b"read"
    sent = clog(near, data)
    near.close()
    assert receive_all(far) == data[:sent]


def test_siocoutq_reaches_zero_unread(fds: Descriptors) -> None:
    """SIOCOUTQ is 0 once the peer's kernel has the bytes, although no process has read them."""
    near, far = fds.tcp_pair()
    near.send(b"x" * 1000)
    eventually(lambda: unacknowledged(near) == 0, "the acknowledgement of 1000 bytes")
    assert readable(far) == 1000


def test_siocoutq_counts_the_fin(fds: Descriptors) -> None:
    """A FIN that is not acknowledged counts as one byte, and SIOCOUTQ is 0 after the peer has taken all."""
    near, far = fds.tcp_pair(receive_buffer=4096)
    data = payload(8, 16 << 20)
    sent = clog(near, data)
    # Nothing is read, so after the last acknowledgement under way the number stands still.
    eventually(lambda: unacknowledged(near) <= sent - readable(far), "the window to shut")
    before = unacknowledged(near)
    near.shutdown(socket.SHUT_WR)
    assert unacknowledged(near) == before + 1
    assert receive_all(far) == data[:sent]
    eventually(lambda: unacknowledged(near) == 0, "the acknowledgement of the FIN")


def test_siocoutq_tells_the_cursor(fds: Descriptors) -> None:
    """Sent minus SIOCOUTQ is exactly what the peer's kernel holds: nothing before it is missing there."""
    near, far = fds.tcp_pair(receive_buffer=4096)
    sent = clog(near, payload(9, 16 << 20))
    eventually(lambda: sent - unacknowledged(near) == readable(far), "everything received to be acknowledged")
    assert 0 < readable(far) < sent


def test_siocoutq_survives_a_reset(fds: Descriptors) -> None:
    """After the peer's reset SIOCOUTQ still tells how many bytes nobody acknowledged."""
    near, far = fds.tcp_pair(receive_buffer=4096)
    sent = clog(near, payload(10, 16 << 20))
    eventually(lambda: sent - unacknowledged(near) == readable(far), "everything received to be acknowledged")
    stuck = unacknowledged(near)
    far.close()
    wait_for(near, select.POLLHUP)
    assert tcp_info(near).state == TCP_CLOSE
    assert unacknowledged(near) == stuck
    with pytest.raises(ConnectionResetError):
        near.recv(1)
    assert unacknowledged(near) == stuck


def test_siocoutq_counts_memory_on_unix(fds: Descriptors) -> None:
    """On a unix socket SIOCOUTQ is memory, not bytes: more than was sent, and 0 when all is read."""
    near, far = fds.unix_pair()
    near.send(b"x")
    assert unacknowledged(near) > 1
    assert far.recv(10) == b"x"
    assert unacknowledged(near) == 0


def test_trunc_discards_on_tcp(fds: Descriptors) -> None:
    """recv with MSG_TRUNC on tcp drops bytes, leaves the buffer alone, and the stream goes on behind them."""
    near, far = fds.tcp_pair()
    near.send(b"dropped|kept")
    eventually(lambda: readable(far) == 12, "the bytes")
    buffer = bytearray(b"Z" * 100)
    assert far.recv_into(buffer, 8, socket.MSG_TRUNC) == 8
    assert buffer == b"Z" * 100
    assert far.recv(100) == b"kept"


def test_trunc_takes_no_more_than_there_is(fds: Descriptors) -> None:
    """recv with MSG_TRUNC returns what waited, then EAGAIN, then 0 at the end of the stream."""
    near, far = fds.tcp_pair()
    near.send(b"12345")
    eventually(lambda: readable(far) == 5, "the bytes")
    buffer = bytearray(100)
    assert far.recv_into(buffer, 100, socket.MSG_TRUNC) == 5
    with pytest.raises(BlockingIOError):
        far.recv_into(buffer, 100, socket.MSG_TRUNC)
    near.shutdown(socket.SHUT_WR)
    wait_for(far, select.POLLRDHUP)
    assert far.recv_into(buffer, 100, socket.MSG_TRUNC) == 0


def test_dontwait_is_per_call(fds: Descriptors) -> None:
    """MSG_DONTWAIT makes one recv nonblocking on a socket whose flags are left alone."""
    _, far = fds.tcp_pair(blocking=True)
    with pytest.raises(BlockingIOError):
        far.recv(1, socket.MSG_DONTWAIT)
    assert os.get_blocking(far.fileno())


def test_half_close_leaves_the_way_back(fds: Descriptors) -> None:
    """After SHUT_WR the other direction goes on, by splice too."""
    near, far = fds.tcp_pair()
    pipe = fds.pipe()
    near.shutdown(socket.SHUT_WR)
    assert receive_all(far) == b""
    os.write(pipe.w, b"reply")
    assert os.splice(pipe.r, far.fileno(), 5, flags=NONBLOCK) == 5
    assert receive_exactly(near, 5) == b"reply"


def test_a_peers_half_close_is_rdhup(fds: Descriptors) -> None:
    """A peer's half-close is EPOLLRDHUP and no EPOLLHUP; EPOLLHUP comes when both ways are shut."""
    near, far = fds.tcp_pair()
    events = fds.epoll()
    events.register(far, select.EPOLLRDHUP | select.EPOLLET)
    near.shutdown(socket.SHUT_WR)
    assert events.poll(10) == [(far.fileno(), select.EPOLLRDHUP)]
    far.shutdown(socket.SHUT_WR)
    wait_for(far, select.POLLHUP)
