"""The sending end of a stream of blocks through shared memory.

Theory of operation. The sink has a ring of slots that its receivers have mapped once, read-only. A block is written
into a free slot, and a small message tells every receiver which. A slot is free when every receiver that was told
has given it back; until then the sink waits, which is the back-pressure. In a steady stream a block costs one
copy (none, if it is made in the slot), one message to each receiver, one back, and no mmap.

Memory is never rewritten under a reader's feet. Where it cannot be known whether a slot is still read, because its
reader went away without giving it back or because larger slots are needed, the whole ring is left to whoever still
has it mapped, and the sink goes on with another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from relay.errors import RelayBug, ShareError
from relay.kernel import memfd
from relay.kernel.arena import in_use, whole_pages
from relay.sharing import wire
from relay.sharing.content import Content, content_of, describe
from relay.sharing.shared import Shared
from relay.sharing.slots import Slots, slot_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("relay.sharing")

_ROOM = 4096  # bytes of a send buffer that one message takes at most, the kernel's own included


class _Reader:
    """One receiver: its socket, and the blocks it has. `held` is turn -> slot; -1 for memory of its own, and for a
    ring that was left."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held: dict[int, int] = {}
        self.rest = b""


class ShareSink:
    """Sends blocks to the receivers at the other ends of `sockets` (unix stream sockets), in order, to all alike.

    `slots` blocks, each of up to `slot_size` bytes, can be under way before `send` waits; the ring takes
    slots * slot_size bytes of memory, and larger slots when a larger block comes. The sockets belong to
    the sink from here on. Every receiver makes a `ShareSource` of its end. For one thread at a time, in the
    process that made it. `close`, or the end of a `with` block, ends the stream; receivers keep what they have.
    After an exception in the block they see a connection that broke instead.
    """

    def __init__(self, *sockets: socket.socket, slots: int = 4, slot_size: int = 1 << 20) -> None:
        if not 1 <= slots <= wire.MOST_SLOTS:
            raise ValueError(f"slots: between 1 and {wire.MOST_SLOTS}, not {slots}")
        if slot_size < 1:
            raise ValueError(f"slot_size: at least 1 byte, not {slot_size}")
        self._count = slots
        self._size = slot_bytes(slot_size)
        self._ring: Slots | None = None
        self._stale = False
        self._turn = 0
        self._holders = [0] * slots  # how many receivers have the slot
        self._drafts: set[int] = set()  # slots that are being filled
        self._readers: list[_Reader] = []
        self._gone_with: int | None = None  # the first turn that a receiver took along
        self._process = os.getpid()
        for sock in sockets:
            self.join(sock)

    def __enter__(self) -> ShareSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.part()  # no end that would look like a whole stream
        self.close()

    @property
    def receivers(self) -> int:
        """How many are there, as far as is known: one that went away is noticed at the next `send`."""
        return len(self._readers)

    @property
    def under_way(self) -> int:
        """Slots that some receiver has and has not given back."""
        return sum(1 for count in self._holders if count)

    @property
    def behind(self) -> int:
        """How many of the blocks sent last contain all that was not given back; every one before them was.

        What a receiver had that went away never is.
        """
        first = [next(iter(reader.held)) for reader in self._readers if reader.held]
        first += [self._gone_with] if self._gone_with is not None else []
        return max(((self._turn - turn & 0xFFFFFFFF) + 1 for turn in first), default=0)

    def collect(self) -> None:
        """Takes back what receivers gave back so far; BrokenPipeError when none is left. Never waits."""
        self._collect()
        if not self._readers:
            raise BrokenPipeError("no receiver is left")

    def join(self, sock: socket.socket) -> None:
        """Takes over `sock`: its receiver gets every block from the next one on."""
        self._own()
        wire.unix_only(sock)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, (2 * self._count + 2) * _ROOM)
        reader = _Reader(sock)
        self._readers.append(reader)
        if self._ring is not None and not self._stale:
            self._tell(reader, self._announcement(self._ring), self._ring.fd)

    def send(self, block: Buffer, *, timeout: float | None = None) -> None:
        """Copies `block` into a slot and hands that to every receiver, dtype and shape included.

        Waits for a free slot, `timeout` seconds at most (None: as long as it takes): TimeoutError, with
        nothing sent, when there is none. BrokenPipeError when no receiver is left. TypeError for what has no
        dtype to tell, as `share`. A `Shared` is not copied: its own pages are handed over, as many of them at
        once as there are slots.
        """
        if isinstance(block, Shared):
            self._own()
            self._wait(self._room_for_final, timeout)
            self._hand_over(-1, block.content, block.fileno())
            return
        content, flat = describe(block)
        number = self._free_slot(content.size, timeout)
        if flat:
            memfd.copy(self._slots().maps[number], flat)
        self._hand_over(number, content)

    def fill(self, size: int, read: Callable[[memoryview], int], *, timeout: float | None = None) -> int:
        """A block of bytes that `read` puts into a slot of `size` bytes, as readinto does; returns its count.

        Nothing is sent when it returns 0 or raises. Waits as `send` does.
        """
        number = self._free_slot(size, timeout)
        slots = self._slots()
        with memoryview(slots.maps[number]) as whole, whole[:size] as room:
            count = read(room)
        slots.settle(number)
        if count:
            self._hand_over(number, Content("|u1", (count,)))
        return count

    @contextlib.contextmanager
    def slot(
        self, shape: int | tuple[int, ...], dtype: Any = "|u1", *, timeout: float | None = None
    ) -> Iterator[Any]:
        """A block made in place: `with sink.slot((480, 640), "f4") as array: ...` sends it at the end.

        Gives a writable NumPy array with undefined content, or a memoryview of bytes for plain `|u1` where
        NumPy is missing. Nothing is sent when the body raises. Whatever still looks at the slot after the
        block, the name behind `as` included, is cut off: it sees zeros, and what it writes reaches nobody.
        That takes a mapping, so `del array` at the end of the body where every microsecond counts. Waits as
        `send` does.
        """
        content = content_of(shape, dtype)
        number = self._free_slot(content.size, timeout)
        slots = self._slots()
        self._drafts.add(number)
        try:
            made = [_array(memoryview(slots.maps[number])[: content.size], content)]
            yield made.pop()
            slots.settle(number)
        finally:
            self._drafts.discard(number)
        self._hand_over(number, content)

    def flush(self, *, timeout: float | None = None) -> None:
        """Waits until every receiver has given back every block; TimeoutError after `timeout` seconds."""
        self._wait(lambda: not any(reader.held for reader in self._readers), timeout)

    def fileno(self) -> int:
        """The socket of the only receiver, for a selector: readable when a slot may have come back."""
        if len(self._readers) != 1:
            raise ValueError(f"a sink with {len(self._readers)} receivers has not one descriptor")
        return self._readers[0].sock.fileno()

    def close(self) -> None:
        """Ends the stream and closes the sockets; receivers read on what they have. Safe to call again."""
        for reader in list(self._readers):
            self._tell(reader, wire.Header(wire.END, 0, wire.ANY))
        self.part()

    def part(self) -> None:
        """Closes the sockets without ending the stream: receivers see a connection that broke."""
        for reader in self._readers:
            reader.sock.close()
        self._readers.clear()
        self._drop_ring()

    # -- inside

    def _own(self) -> None:
        if os.getpid() != self._process:
            raise RelayBug("a ShareSink was used in a process forked from its own: make one there")

    def _slots(self) -> Slots:
        if self._ring is None:
            raise RelayBug("a sink has no ring")
        return self._ring

    def _announcement(self, ring: Slots) -> wire.Header:
        return wire.Header(wire.RING, ring.size, wire.ANY, self._count)

    def _free_slot(self, size: int, timeout: float | None) -> int:
        """The number of a slot of `size` bytes that nobody reads or fills."""
        self._own()
        self._collect()
        if size > self._size:
            self._size = 1 << (whole_pages(size) - 1).bit_length()
        ring = self._ring
        if ring is None or self._stale or ring.size < self._size:
            self._renew()
        found = [-1]

        def look() -> bool:
            if not self._readers:
                raise BrokenPipeError("no receiver is left")
            if self._stale:
                self._renew()
            maps = self._slots().maps
            # the lowest: its memory is likely to be in the cache still
            for number, holders in enumerate(self._holders):
                if not holders and number not in self._drafts and not in_use(maps[number]):
                    found[0] = number
                    return True
            return False

        self._wait(look, timeout)
        return found[0]

    def _renew(self) -> None:
        """Another ring; the old one is left to whoever has it mapped."""
        if self._drafts:
            raise BufferError("a slot of the sink is being filled: finish it first")
        self._drop_ring()
        self._ring = ring = Slots(self._count, self._size)
        self._stale = False
        for reader in self._readers:
            reader.held = dict.fromkeys(reader.held, -1)
        for reader in list(self._readers):
            self._tell(reader, self._announcement(ring), ring.fd)

    def _drop_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._holders = [0] * self._count

    def _room_for_final(self) -> bool:
        if not self._readers:
            raise BrokenPipeError("no receiver is left")
        return all(list(reader.held.values()).count(-1) < self._count for reader in self._readers)

    def _hand_over(self, number: int, content: Content, fd: int = -1) -> None:
        """A block in slot `number`, or in memory of its own with -1."""
        self._turn = (self._turn + 1) & 0xFFFFFFFF
        kind, slot = (wire.BLOCK, number) if number >= 0 else (wire.FINAL, wire.NO_SLOT)
        header = wire.Header(kind, content.size, content, slot, self._turn)
        for reader in list(self._readers):
            reader.held[self._turn] = number
            if number >= 0:
                self._holders[number] += 1
            self._tell(reader, header, fd)
        if not self._readers:
            raise BrokenPipeError("no receiver is left")

    def _tell(self, reader: _Reader, header: wire.Header, fd: int = -1) -> None:
        try:
            wire.send(reader.sock, header, fd)
        except (OSError, ShareError) as error:
            self._leave(reader, str(error))

    def _leave(self, reader: _Reader, why: str) -> None:
        """A receiver is gone. What it had is never written to again: it may still be mapped somewhere."""
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        reader.sock.close()
        log.debug("a receiver of shared blocks left: %s", why)
        if reader.held and self._gone_with is None:
            self._gone_with = next(iter(reader.held))
        if any(number >= 0 for number in reader.held.values()):
            self._stale = True

    def _collect(self) -> None:
        """Takes back what receivers gave back; notices those that left."""
        for reader in list(self._readers):
            try:
                while raw := reader.sock.recv(wire.RETURN.size * 64):
                    self._take_back(reader, raw)
                self._leave(reader, "it closed its end")
            except BlockingIOError:
                pass
            except (OSError, ShareError) as error:
                self._leave(reader, str(error))

    def _take_back(self, reader: _Reader, raw: bytes) -> None:
        raw = reader.rest + raw
        whole = len(raw) // wire.RETURN.size * wire.RETURN.size
        reader.rest = raw[whole:]
        for number, turn in wire.RETURN.iter_unpack(raw[:whole]):
            had = reader.held.pop(turn, None)
            if had is None or had not in (number, -1):
                if had is not None:
                    reader.held[turn] = had
                raise ShareError(
                    f"slot {number} was given back for turn {turn}, which the receiver does not have"
                )
            if had >= 0:
                self._holders[had] -= 1

    def _wait(self, done: Any, timeout: float | None) -> None:
        """Collects until `done()`; TimeoutError after `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while not done():
            poll = select.poll()
            for reader in self._readers:
                poll.register(reader.sock, select.POLLIN)
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not poll.poll(left) and left is not None and time.monotonic() >= (until or 0.0):
                raise TimeoutError(f"no slot was given back within {timeout:g} s")
            self._collect()


def _array(view: memoryview, content: Content) -> Any:
    """A writable array over `view`, without NumPy the view itself if it is of plain bytes."""
    try:
        import numpy
    except ImportError:
        if content.dtype == "|u1" and len(content.shape) == 1:
            return view
        raise
    if not content.size:
        return numpy.empty(content.shape, content.dtype)
    return numpy.frombuffer(view, content.dtype).reshape(content.shape)
