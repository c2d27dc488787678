"""The receiving end of a stream of blocks through shared memory (see relay.sharing.sink)."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from relay.errors import ShareError
from relay.kernel import memfd
from relay.kernel.arena import in_use
from relay.sharing import wire
from relay.sharing.content import Content, Described
from relay.sharing.shared import MAX_BYTES, Shared
from relay.sharing.slots import received


class Block(Described):
    """One block, in the sender's memory until it is given back: `release`, or the end of a `with` block.

    Most are in a slot that the sender writes again. `final` is there for one that came in memory of its own, which
    nobody can change: it may be kept when the block is given back.

    `view` and `array` look at it without a copy; nothing of them may be left when it is given back. A sender
    that does not keep to the rules could change the bytes meanwhile (but not their number): whoever must not
    trust it takes a copy, or has it use `share`.
    """

    __slots__ = ("_memory", "_number", "_source", "_turn", "content")

    def __init__(
        self, source: ShareSource, memory: mmap.mmap, number: int, turn: int, content: Content
    ) -> None:
        self.content = content
        self._source = source
        self._memory: mmap.mmap | None = memory
        self._number = number
        self._turn = turn

    def __enter__(self) -> Block:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.release()
        else:  # the traceback may hold views: the block is given back when they are gone
            self.abandon()

    def __del__(self) -> None:
        self.abandon()

    def __len__(self) -> int:
        return self.content.size

    @property
    def final(self) -> Shared | None:
        """The memory of its own that it came in; None for a slot, ValueError once it was given back."""
        if self._memory is None:
            raise ValueError("the block was given back")
        return self._memory if isinstance(self._memory, Shared) else None

    def view(self) -> memoryview:
        """The bytes, read-only; ValueError once it was given back."""
        if self._memory is None:
            raise ValueError("the block was given back")
        return memoryview(self._memory)[: self.content.size]

    def array(self) -> Any:
        """A read-only NumPy array over the bytes, without a copy (booleans are copied). Needs NumPy."""
        return self.content.array(self.view(), final=isinstance(self._memory, Shared))

    def release(self) -> None:
        """Gives it back: the sender will write the next block there. Safe to call again.

        BufferError while arrays or memoryviews of it exist; it is not given back then.
        """
        memory = self._memory
        if memory is None:
            return
        if in_use(memory):
            raise BufferError(
                "arrays or memoryviews of the block exist: drop them before it is given back, or copy it"
            )
        self._memory = None
        self._source.give_back(self._number, self._turn)

    def abandon(self) -> None:
        """Gives it back as soon as nobody looks at it any more."""
        memory = self._memory
        if memory is not None:
            self._memory = None
            self._source.give_back_later(memory, self._number, self._turn)


class ShareSource:
    """Blocks from a `ShareSink` at the other end of `sock`, in order, mapped read-only.

    `for block in source` gives each back before it takes the next; `receive` leaves that to the caller. A
    sender is not trusted: ShareError for whatever a ShareSink would not send, and for a ring of more than
    `max_bytes`. The socket belongs to the source from here on. For one thread at a time.
    """

    def __init__(self, sock: socket.socket, *, max_bytes: int = MAX_BYTES) -> None:
        wire.unix_only(sock)
        sock.setblocking(False)
        self._sock = sock
        self._max_bytes = max_bytes
        self._maps: list[mmap.mmap] = []
        self._out: dict[int, int] = {}  # turn -> slot of the present ring that was not given back
        self._waiting: list[tuple[mmap.mmap, int, int]] = []  # abandoned while somebody looked at them
        self._refused = ""
        self._ended = False

    def __enter__(self) -> ShareSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(BufferError):
                self.close()

    def __iter__(self) -> Iterator[Block]:
        """Block after block to the end of the stream; each is given back when the next is asked for.

        BufferError when something still looks at the one before.
        """
        while True:
            block = self.receive()
            if block is None:
                return
            yield block
            block.release()

    def receive(self, *, timeout: float | None = None) -> Block | None:
        """The next block, None at the end of the stream. TimeoutError after `timeout` seconds (None: waits).

        ConnectionResetError when the sender went away without having ended the stream.
        Blocks that were dropped without `release` are given back here, once nobody looks at them. Who keeps
        as many blocks as the sender has slots waits for ever: the sender waits for them.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                block = self.step()
            except BlockingIOError:
                self._await(until, timeout)
                continue
            if block is not None or self._ended:
                return block

    @property
    def ended(self) -> bool:
        """Whether the sender has ended the stream, and all of it was received."""
        return self._ended

    def step(self) -> Block | None:
        """One message, for who waits for many: a block, or None for what announces one, or the end (see `ended`).

        Never waits: BlockingIOError when none is there. Else raises what `receive` does.
        """
        self._sweep()
        if self._refused:
            raise ShareError(self._refused, hint="close the connection")
        if self._ended:
            return None
        try:
            message = wire.receive(self._sock)
            if message is None:
                raise ConnectionResetError("the sender of shared blocks went away before the stream's end")
            return self._take(*message)
        except ShareError as error:
            self._refused = error.message
            raise

    def fileno(self) -> int:
        """The socket's descriptor, for a selector: readable when a block has come."""
        return self._sock.fileno()

    def close(self) -> None:
        """Closes the connection, which gives everything back. Safe to call again.

        BufferError while arrays or memoryviews of a block exist: nothing is closed then.
        """
        if any(in_use(memory) for memory in [*self._maps, *(memory for memory, _, _ in self._waiting)]):
            raise BufferError("arrays or memoryviews of a block exist: drop them before the source is closed")
        self._maps.clear()
        self._waiting.clear()
        self._sock.close()

    def give_back(self, number: int, turn: int) -> None:
        """A block's own: the slot `number` is not looked at any more."""
        self._out.pop(turn, None)
        with contextlib.suppress(OSError):  # the sender went away: nobody wants it back
            self._sock.send(wire.RETURN.pack(number, turn), socket.MSG_NOSIGNAL)

    def give_back_later(self, memory: mmap.mmap, number: int, turn: int) -> None:
        """A block's own: as soon as nobody looks at it."""
        self._waiting.append((memory, number, turn))

    # -- inside

    def _sweep(self) -> None:
        for item in [item for item in self._waiting if not in_use(item[0])]:
            self._waiting.remove(item)
            self.give_back(item[1], item[2])

    def _await(self, until: float | None, timeout: float | None) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        left = None if until is None else max(0.0, until - time.monotonic()) * 1000
        if not poll.poll(left) and timeout is not None:
            raise TimeoutError(f"no block came within {timeout:g} s")

    def _take(self, header: wire.Header, fd: int) -> Block | None:
        """A block, or None for what only announces."""
        try:
            if header.kind == wire.KEEP:
                raise ShareError(
                    "shared memory came, and no stream", hint="receive it with relay.Shared.receive"
                )
            if header.kind == wire.END:
                self._ended = True
                return None
            if header.kind == wire.RING:
                # what is left of the ring before lives as long as its blocks
                self._maps = received(fd, header.slot, header.size, self._max_bytes)
                self._out.clear()
                return None
            if header.kind == wire.FINAL:
                taken, fd = fd, -1
                final = self._final(header, taken)
                return Block(self, final, wire.NO_SLOT, header.turn, header.content)
        finally:
            if fd >= 0:
                os.close(fd)
        if header.slot >= len(self._maps):
            raise ShareError(f"a block in slot {header.slot} of a ring of {len(self._maps)}")
        memory = self._maps[header.slot]
        if header.size > len(memory):
            raise ShareError(f"a block of {header.size} bytes in a slot of {len(memory)}")
        if header.slot in self._out.values() or header.turn in self._out:
            raise ShareError(f"a block in slot {header.slot}, which was not given back yet")
        self._out[header.turn] = header.slot
        return Block(self, memory, header.slot, header.turn, header.content)

    def _final(self, header: wire.Header, fd: int) -> Shared:
        """Takes `fd` over."""
        try:
            if (
                not 0 < header.size <= self._max_bytes
                or header.slot != wire.NO_SLOT
                or header.turn in self._out
            ):
                raise ShareError(
                    f"a block of {header.size} bytes in memory of its own, for slot {header.slot} and turn "
                    f"{header.turn}: between 1 and {self._max_bytes} bytes are taken, each turn once",
                    hint="raise max_bytes if that is right",
                )
            memfd.judge(fd, header.size, memfd.WRITE)
        except BaseException:
            os.close(fd)
            raise
        final = Shared(fd, header.content)
        self._out[header.turn] = -1
        return final
