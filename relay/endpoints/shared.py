"""Shared memory as sink and as source: `shared:///path`, or `shared://@name` in the abstract namespace.

The sink. relay connects to the unix socket that a consumer listens on, and hands it the stream in blocks of shared
memory (relay.sharing): slots that the consumer maps once, reads where they are, and gives back. The bytes are copied
once, out of the pipe into the slot, on a ferry's thread, which waits there while every slot is out: that is the
back-pressure. Delivered means given back; what a consumer that went away had not given back is lost.

There is no ferry before there is a consumer: what is meant for it waits in the pipeline meanwhile, and is not lost
when nobody comes.

The source. relay listens, a producer connects and sends with a ShareSink. Facts: nothing tells when the last reader of
a page that was lent is done with it, and a producer writes to its slots again. So the bytes of a slot are copied, once,
straight into the pipe, and the slot is given back when the last of them is there. Memory that is final (a Shared) is
never written again, which its seals prove: its pages go into the pipe by reference.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from relay.endpoints.address import Address
from relay.endpoints.base import Sink, Source
from relay.endpoints.connecting import Connecting
from relay.endpoints.ferry import Ferry
from relay.engine import Engine, Timer, Watch
from relay.errors import EndpointError, KernelError, ShareError
from relay.kernel import core
from relay.kernel.pipe import Pipe
from relay.sharing.sink import ShareSink
from relay.sharing.source import Block, ShareSource

SLOTS: Final = 4
SLOT: Final = 1 << 20  # bytes of a block at most
PATIENCE: Final = 2.0  # seconds that a thread has to end which nothing holds any more
COPIES: Final = "into memory that the consumer maps"
AT_ONCE: Final = 16  # messages that announce something and have no bytes, before others have their turn


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
        self._sock: socket.socket | None = None
        self._ferry: Ferry | None = None
        self._moved = 0
        self._out = 0  # bytes from the first on that the consumer has not given back

    @property
    def moved(self) -> int:
        """Bytes handed over."""
        return self._moved

    @property
    def method(self) -> str:
        """How bytes reach the memory."""
        return "copy"

    def under_way(self) -> int:
        """Bytes handed over and not given back; all before them were."""
        return self._out

    def unread(self) -> int:
        """The same."""
        return self._out

    def open(self) -> None:
        """Connects; tries again while there is patience left."""
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
                self._timer = self.engine.later(0.1, self.open)
            else:
                self.fail(self.error("connecting to", code))
            return
        try:
            self._ferry = Ferry(self.engine, self.c, SLOT, partial(self._carry, sock), self._carried)
            self._ferry.start()
        except (OSError, KernelError) as error:
            self._ferry = None
            sock.close()
            code = error.errno or 0 if isinstance(error, OSError) else 0
            self.fail(self.error("opening", code, reason="" if code else str(error)))
            return
        self._sock, self._at_work = sock, True
        self.opened_at = time.monotonic()
        self.opened()
        if self._finish_asked:
            self.finish()

    def unwire(self) -> None:
        """The pipeline is going away; the thread may still be at work."""
        super().unwire()
        if self._ferry is not None:
            self._ferry.release()

    # -- on the ferry's thread

    def _carry(self, sock: socket.socket) -> bool:
        """Whole pipes into slots; True when the consumer has given everything back."""
        ferry = self._ferry
        assert ferry is not None
        sink = ShareSink(sock, slots=SLOTS, slot_size=SLOT)
        sizes: deque[int] = deque()

        def note(count: int = 0) -> None:
            """`count` bytes more were handed over, and some may have come back."""
            if count:
                sizes.append(count)
            while len(sizes) > sink.behind:
                sizes.popleft()
            self._out = sum(sizes)  # first: what is handed over and not under way counts as delivered
            self._moved += count

        try:
            while True:
                pipe, load = _wait(ferry, sink, note)
                if not load:
                    break
                while load:
                    count = sink.fill(min(load, SLOT), partial(_read, pipe.read_fd))
                    note(count)
                    load -= count
                ferry.give_back()
            if self.state != "finishing":
                return False
            sink.flush()
            note()
            if not sink.receivers:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            sink.close()
            return True
        finally:
            note()
            sink.part()

    # -- on the engine's thread again

    def _carried(self, whole: Any, failed: BaseException | None) -> None:
        self._sock, self._at_work = None, False
        if self.state == "failed":
            return
        if failed is not None:
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
        if self.state in ("failed", "finished"):
            return
        if self._at_work and self._ferry is not None:
            self._at_work = False
            self.state = "cutting"
            self._let_go(self._ferry)
            self._ferry.join(PATIENCE)
        taken = int(self.c.moved) if self._ferry is not None else 0
        self.lost = self._out + taken - self._moved
        self._moved = taken  # what the thread had and did not get rid of was on its way as well
        self.c.failed = 1
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
        ferry.end()
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)


def _wait(ferry: Ferry, sink: ShareSink, note: Callable[[], None]) -> tuple[Pipe, int]:
    """The next loaded pipe; what the consumer gives back meanwhile is taken back at once."""
    while True:
        taken = ferry.wait_until(None, beside=sink.fileno())
        if taken is not None:
            return taken
        sink.collect()
        note()


def _read(fd: int, room: memoryview) -> int:
    return os.readv(fd, [room])


class SharedSource(Source):
    """Blocks from one producer; owns its connection. `spliced`: the pages of final memory may go by reference."""

    def __init__(
        self, engine: Engine, address: str, sock: socket.socket, peer: str, *, spliced: bool = True
    ) -> None:
        super().__init__(engine, address)
        self.peer = peer
        self.scheme = "shared"
        self.c.kind = core.INSTANT
        self.c.waits = 1
        self.c.left = self.c.offset = 0
        self.c.readable = 1  # the first sweep looks
        self._by_reference = core.SPLICE if spliced else core.COPY
        self._blocks = ShareSource(sock)
        self._watch: Watch | None = None
        self._block: Block | None = None
        self._pointer: core.Struct = None
        self._why = ""

    @property
    def method_now(self) -> str:
        """How the last block entered the chain."""
        return "copy" if self.c.method == core.COPY else "splice"

    def open(self) -> None:
        """Hears of what comes from now on."""
        try:
            edges = select.EPOLLIN | select.EPOLLET
            self._watch = self.engine.watch(self._blocks.fileno(), edges, lambda _mask: self._came())
        except KernelError as error:
            self.refused(self.error("watching", 0, reason=str(error)))
            return
        self.opened_at = time.monotonic()
        self.on_open()

    def _came(self) -> None:
        """There may be a message. While a block is on its way, or its turn has not come, it waits in the socket."""
        if self.c.reads and self.refill():
            self.engine.ready(self.c.reads)

    def refill(self) -> bool:
        """The next block, once all of the last one is gone; True when there is one, or the end."""
        if self.closed or self.c.left or not self.c.waits:
            return False
        self._give_back()
        try:
            for _ in range(AT_ONCE):
                block = self._blocks.step()
                if self._blocks.ended:
                    return self._over("")
                if block is not None and self._begin(block):
                    return True
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return self._over("the producer went away before the end of the stream")
        except (ShareError, KernelError) as error:
            return self._over(error.message)
        except OSError as error:
            return self._over(str(error.strerror))
        self.engine.post(self._came)
        return False

    def _begin(self, block: Block) -> bool:
        """Whether it has bytes, which the pump may have then."""
        if not len(block):
            block.release()
            return False
        self._block = block
        final = block.final
        if final is not None:
            self.c.method, self.c.fd = self._by_reference, final.fileno()
        else:
            self._pointer = core.ffi.from_buffer("char[]", block.view())
            self.c.method, self.c.memory = core.COPY, self._pointer
        self.c.offset, self.c.left, self.c.readable = 0, len(block), 1
        return True

    def _give_back(self) -> None:
        """The pump has all of the block, or will have no more of it."""
        if self._block is None:
            return
        if self.c.fd >= 0 and self.c.method == core.COPY:
            self._by_reference = core.COPY  # the kernel refused, and would again
        self.c.fd, self.c.memory, self.c.left = -1, core.ffi.NULL, 0
        if self._pointer is not None:
            core.ffi.release(self._pointer)
            self._pointer = None
        self._block.release()
        self._block = None

    def _over(self, why: str) -> bool:
        self._why = why
        self.c.waits, self.c.readable = 0, 1
        return True

    def broke_off(self) -> str:
        """What a producer did instead of ending its stream."""
        return self._why

    def close(self, *, reset: bool = False) -> None:
        """Closes the connection: the producer cannot send any more."""
        if self.closed:
            return
        self.closed = True
        self._give_back()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._blocks.close()
        self.on_close()
