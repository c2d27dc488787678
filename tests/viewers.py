"""A broadcast, its source, and the viewers that come and go, who compare what they get with the stream."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable

from peers import PATIENCE, assert_same, connected
from relays import Process

MIB = 1 << 20


def live(options: str = "") -> str:
    """A route from a listening source to a broadcast."""
    return (
        'routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, '
        f'sink: {{listen: "tcp://127.0.0.1:0"{options}}}}}}}'
    )


class Viewer:
    """A subscriber that compares what it gets with the stream as it comes; `start` is where its run begins."""

    def __init__(self, sock: socket.socket, data: bytes, start: int | None = None) -> None:
        self.sock = sock
        self.data = data
        self.start = start
        self.head = b""
        self.at = start or 0
        self.ended = False
        sock.setblocking(False)

    def read(self, most: int = MIB) -> int:
        """Reads once; fails at the first byte that does not continue its run. Bytes read."""
        try:
            piece = self.sock.recv(most)
        except BlockingIOError:
            return 0
        if not piece:
            self.ended = True
            return 0
        if self.start is None:
            self.head += piece
            if len(self.head) < 64:
                return len(piece)
            self.start = self.at = self.data.find(self.head)
            assert self.start >= 0, "the beginning is no run of the stream"
            self.at += len(self.head)
            return len(piece)
        if piece != self.data[self.at : self.at + len(piece)]:
            assert_same(piece, self.data[self.at : self.at + len(piece)])
        self.at += len(piece)
        return len(piece)


class Stage:
    """relay with a source connected to it, the stream as far as it was sent, and the viewers that there are."""

    def __init__(self, served: Process, data: bytes) -> None:
        self.served = served
        self.data = data
        self.live, source = served.addresses(2)
        self.sock = socket.create_connection(("127.0.0.1", int(source.rpartition(":")[2])))
        self.sock.setblocking(False)
        self.sent = 0
        self.viewers: list[Viewer] = []
        self.joined = 0

    def join(self, *, known: bool = False, wait: bool = True) -> Viewer:
        """A viewer that relay has taken on; `known`: before the stream began."""
        self.viewers.append(Viewer(connected(self.live), self.data, 0 if known else None))
        self.joined += 1
        if wait:
            self.wait_joined()
        return self.viewers[-1]

    def wait_joined(self) -> None:
        """Until relay has taken everybody on."""
        self.served.until(
            lambda: sum("joined" in line["message"] for line in self.served.lines) >= self.joined
        )

    def leave(self, viewer: Viewer, *, reset: bool) -> None:
        """It closes, or breaks the connection off."""
        self.viewers.remove(viewer)
        if reset:
            viewer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        viewer.sock.close()

    def send(self, upto: int, *, wait: bool = True) -> None:
        """Sends the stream up to there while everybody reads; with `wait` until everybody has it."""
        upto = min(upto, len(self.data))

        def all_there() -> bool:
            return all(v.at == upto for v in self.viewers if v.start is not None) and all(
                v.start is not None for v in self.viewers
            )

        self.work(lambda: self.sent == upto and (not wait or all_there()), upto)

    def work(self, done: Callable[[], bool], upto: int) -> None:
        """Sends and reads until `done`."""
        poll = select.epoll()
        by_fd = {viewer.sock.fileno(): viewer for viewer in self.viewers}
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        if self.sent < upto:
            poll.register(self.sock.fileno(), select.EPOLLOUT)
        deadline = time.monotonic() + 3 * PATIENCE
        while not done():
            assert time.monotonic() < deadline, f"stuck: {self.sent} sent, {[v.at for v in self.viewers][:9]}"
            for fd, _ in poll.poll(0.05):
                if fd in by_fd:
                    by_fd[fd].read()
                elif self.sent < upto:
                    piece = self.data[self.sent : min(upto, self.sent + MIB)]
                    self.sent += self.sock.send(piece)
                    if self.sent == upto:
                        poll.unregister(self.sock.fileno())
        poll.close()

    def close(self) -> None:
        """Everybody goes, the source too."""
        for viewer in self.viewers:
            viewer.sock.close()
        self.viewers.clear()
        self.sock.close()


def stalled_viewer(stage: Stage) -> socket.socket:
    """A viewer that relay has taken on and that reads nothing."""
    sock = connected(stage.live, 4096)
    stage.joined += 1
    stage.wait_joined()
    return sock
