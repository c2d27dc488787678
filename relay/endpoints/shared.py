"""A consumer's memory as a sink: `shared:///path`, or `shared://@name` in the abstract namespace.

relay connects to the unix socket that a consumer listens on, and hands it the stream in blocks of shared memory
(relay.sharing): slots that the consumer maps once, reads where they are, and gives back. The bytes are copied
once, out of the pipe into the slot, on a ferry's thread, which waits there while every slot is out: that is the
back-pressure. Delivered means given back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections import deque
from functools import partial
from typing import Any, Final

from relay.endpoints.address import Address
from relay.endpoints.base import Sink
from relay.endpoints.connecting import Connecting
from relay.endpoints.ferry import Ferry
from relay.engine import Engine, Timer
from relay.errors import EndpointError
from relay.kernel import core
from relay.sharing.sink import ShareSink

SLOTS: Final = 4
SLOT: Final = 1 << 20  # bytes of a block at most
PATIENCE: Final = 2.0  # seconds that a thread has to end which nothing holds any more
COPIES: Final = "into memory that the consumer maps"


class SharedSink(Sink):
    """Owns the connection to a consumer, the ring that is shared with it, and a ferry."""

    def __init__(self, engine: Engine, address: Address, *, patience: float = 0.0) -> None:
        super().__init__(engine, str(address))
        self.copies = COPIES
        self.c.kind = core.FERRY
        self._to = address
        self._patient_until = engine.now + patience
        self._connecting: Connecting | None = None
        self._timer: Timer | None = None
        self._finish_asked = False
        self._at_work = False
        self._settled = threading.Event()  # there is a connection, or there will be none
        self._sock: socket.socket | None = None
        self._ferry: Ferry | None = None
        self._moved = 0
        self._unread = 0

    @property
    def moved(self) -> int:
        """Bytes handed over."""
        return self._moved

    @property
    def method(self) -> str:
        """How bytes reach the memory."""
        return "copy"

    def open(self) -> None:
        """Starts the thread and connects; tries again while there is patience left."""
        self._ferry = Ferry(self.engine, self.c, SLOT, self._carry, self._carried)
        self._ferry.start()
        self._at_work = True
        self._connect()

    def _connect(self) -> None:
        self._timer = None
        path = self._to.path
        place = "\0" + path[1:] if path.startswith("@") else path
        self._connecting = Connecting(self.engine, [(socket.AF_UNIX, place)], self._connected)
        if self.state != "opening" or self._sock is not None or self._timer is not None:
            self._connecting = None

    def _connected(self, sock: socket.socket | None, code: int) -> None:
        self._connecting = None
        if sock is None:
            if self.engine.now < self._patient_until:
                self._timer = self.engine.later(0.1, self._connect)
            else:
                self.fail(self.error("connecting to", code))
            return
        self._sock = sock
        self._settled.set()
        self.opened()
        if self._finish_asked:
            self.finish()

    def unwire(self) -> None:
        """The pipeline is going away; the thread may still be at work."""
        super().unwire()
        if self._ferry is not None:
            self._ferry.release()

    def _carry(self) -> bool:
        """On the ferry's thread: whole pipes into slots; True when the consumer has given everything back."""
        assert self._ferry is not None
        self._settled.wait()
        if self._sock is None:
            return False
        sizes: deque[int] = deque(maxlen=SLOTS)
        sink = ShareSink(self._sock, slots=SLOTS, slot_size=SLOT)
        try:
            while True:
                pipe, load = self._ferry.wait()
                if not load:
                    break
                while load:
                    count = sink.fill(min(load, SLOT), partial(_read, pipe.read_fd))
                    sizes.append(count)
                    self._moved += count
                    load -= count
                self._ferry.give_back()
            if self.state == "finishing":
                sink.flush()
                if not sink.receivers:
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                sink.close()
                return True
            return False
        finally:
            self._unread = sum(list(sizes)[-sink.under_way :]) if sink.under_way else 0
            sink.part()

    def _carried(self, whole: Any, failed: BaseException | None) -> None:
        self._sock, self._at_work = None, False
        if self.state == "failed":
            return
        if failed is not None:
            self.lost += self._unread
            code = getattr(failed, "errno", None) or (errno.EPIPE if isinstance(failed, OSError) else 0)
            self.fail(self.error("sharing with", code, reason="" if code else str(failed)))
        elif whole and self.state == "finishing":
            self.finished()

    def finish(self) -> None:
        """Hands over what is left, then on_finish when the consumer has given everything back."""
        if self.state == "opening":
            self._finish_asked = True
        elif self._ferry is not None and self.state == "open":
            self.state = "finishing"
            self._ferry.end()

    def fail(self, error: EndpointError) -> None:
        """It failed; the thread is let go first, which may be waiting for a slot and then ends at once."""
        if self._at_work and self._ferry is not None and self.state not in ("failed", "finished"):
            self._at_work = False
            self.state = "cutting"
            self._let_go(self._ferry)
            self._ferry.join(PATIENCE)
            self.lost += self._unread
        super().fail(error)

    def close(self) -> None:
        """Lets the thread end; a consumer that has not been given the end sees the connection break."""
        if self.closed:
            return
        self.closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ferry is not None and self.state != "finished":
            self._let_go(self._ferry)

    def _let_go(self, ferry: Ferry) -> None:
        self._settled.set()
        ferry.end()
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)


def _read(fd: int, room: memoryview) -> int:
    return os.readv(fd, [room])
