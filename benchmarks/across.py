"""Ways for an array to get to another process: a sender and a receiver of each.

A sender has `send(array)`, or `place()` and `send_placed()` where the array is made where it is handed over; a receiver
has `receive(look)`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import numpy

import relay

MIB = 1 << 20


class Socket:
    """A unix socket; `fresh`: the receiver has no array to receive into, and makes one each time."""

    def __init__(self, sock: socket.socket, size: int, *, fresh: bool = False) -> None:
        self.sock, self.size, self.fresh = sock, size, fresh
        self.array = numpy.ones(size // 8)

    def send(self, array: Any) -> None:
        self.sock.sendall(memoryview(array).cast("B"))

    def receive(self, look: Callable[[Any], None]) -> None:
        array = numpy.empty(self.size // 8) if self.fresh else self.array
        view, at = memoryview(array).cast("B"), 0
        while at < self.size:
            at += self.sock.recv_into(view[at:])
        look(array)


class Connection:
    """multiprocessing's Pipe, both ends of which are made before the fork."""

    def __init__(self, one: Any, two: Any) -> None:
        self.one, self.two = one, two

    def send(self, array: Any) -> None:
        self.one.send(array)

    def receive(self, look: Callable[[Any], None]) -> None:
        look(self.two.recv())


class Queue:
    """multiprocessing's Queue."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def send(self, array: Any) -> None:
        self.queue.put(array)

    def receive(self, look: Callable[[Any], None]) -> None:
        look(self.queue.get())


class ByHand:
    """multiprocessing.shared_memory: a segment for each array, its name over a socket; who reads it unlinks it."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self.sock, self.size = sock, size

    def place(self) -> Any:
        self.memory = shared_memory.SharedMemory(create=True, size=self.size)
        resource_tracker.unregister(self.memory._name, "shared_memory")  # the receiver unlinks
        return numpy.ndarray(self.size // 8, "f8", buffer=self.memory.buf)

    def send(self, array: Any) -> None:
        self.place()[:] = array
        self.send_placed()

    def send_placed(self) -> None:
        self.sock.send(self.memory.name.encode().ljust(64))
        self.memory.close()

    def receive(self, look: Callable[[Any], None]) -> None:
        memory = shared_memory.SharedMemory(name=self.sock.recv(64).decode().strip())
        array = numpy.ndarray(self.size // 8, "f8", buffer=memory.buf)
        look(array)
        del array
        memory.close()
        memory.unlink()


class HandReused:
    """One segment of shared_memory, mapped once by both, written again and again; a byte says that it is full."""

    def __init__(self, sock: socket.socket, size: int, memory: Any) -> None:
        self.sock, self.size, self.memory = sock, size, memory
        self.array = numpy.ndarray(size // 8, "f8", buffer=memory.buf)

    def place(self) -> Any:
        return self.array

    def send(self, array: Any) -> None:
        self.array[:] = array
        self.send_placed()

    def send_placed(self) -> None:
        self.sock.send(b"x")

    def receive(self, look: Callable[[Any], None]) -> None:
        self.sock.recv(1)
        look(self.array)


class Sharing:
    """relay.share of an array of the heap, or in place of one by relay.empty: memory that is final, new each time."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self.sock, self.size = sock, size

    def place(self) -> Any:
        self.array = relay.empty(self.size // 8, "<f8")
        return self.array

    def send(self, array: Any) -> None:
        with relay.share(array) as shared:
            shared.send(self.sock)

    def send_placed(self) -> None:
        with relay.share(self.array) as shared:
            shared.send(self.sock)
        del self.array

    def receive(self, look: Callable[[Any], None]) -> None:
        with relay.Shared.receive(self.sock) as shared:  # type: ignore[union-attr]
            look(shared.array())


class Shared(Sharing):
    """An array that was shared before, handed to one receiver more."""

    def send(self, array: Any) -> None:
        if not hasattr(self, "shared"):
            self.shared = relay.share(array)
        self.shared.send(self.sock)


class Sink:
    """relay.ShareSink and ShareSource: slots that come back."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self.sock, self.size = sock, size
        self.sink: relay.ShareSink | None = None
        self.source: relay.ShareSource | None = None

    def send(self, array: Any) -> None:
        self.sink = self.sink or relay.ShareSink(
            self.sock, slots=2 if self.size > MIB else 4, slot_size=self.size
        )
        self.sink.send(array)

    def place(self) -> Any:
        self.sink = self.sink or relay.ShareSink(
            self.sock, slots=2 if self.size > MIB else 4, slot_size=self.size
        )
        self.slot = self.sink.slot(self.size // 8, "<f8")
        return self.slot.__enter__()

    def send_placed(self) -> None:
        self.slot.__exit__(None, None, None)

    def receive(self, look: Callable[[Any], None]) -> None:
        self.source = self.source or relay.ShareSource(self.sock)
        with self.source.receive() as block:  # type: ignore[union-attr]
            look(block.array())

    def close(self) -> None:
        if self.sink:
            self.sink.flush()
            self.sink.close()


class Zmq:
    """pyzmq PUSH to PULL over ipc; without the copies that pyzmq can leave out unless `copy`, out of a few arrays
    that are used again as pyzmq lets go of them."""

    def __init__(self, address: str, size: int, *, copy: bool) -> None:
        self.address, self.copy = address, copy
        self.socket: Any = None
        self.pool: list[tuple[Any, Any]] = [(numpy.empty(size // 8), None) for _ in range(8)]

    def place(self) -> Any:
        self.array, tracker = self.pool.pop(0)
        if tracker is not None:
            tracker.wait()
        return self.array

    def send_placed(self) -> None:
        self.pool.append((self.array, self.send(self.array)))

    def send(self, array: Any) -> Any:
        import zmq

        if self.socket is None:
            self.socket = zmq.Context().socket(zmq.PUSH)
            self.socket.set_hwm(8)
            self.socket.bind(self.address)
        return self.socket.send(array, copy=self.copy, track=not self.copy)

    def receive(self, look: Callable[[Any], None]) -> None:
        import zmq

        if self.socket is None:
            self.socket = zmq.Context().socket(zmq.PULL)
            self.socket.set_hwm(8)
            self.socket.connect(self.address)
        message = self.socket.recv(copy=self.copy)
        look(numpy.frombuffer(message if self.copy else message.buffer))


def ways(cell: str, size: int) -> Iterator[tuple[str, bool, Callable[[], tuple[Any, Any]]]]:
    """Name, whether relay's, and what makes the two ends (each used in one process) of every way of `cell`."""

    def over(kind: Callable[..., Any], **options: Any) -> Callable[[], tuple[Any, Any]]:
        def make() -> tuple[Any, Any]:
            near, far = socket.socketpair()
            return kind(near, size, **options), kind(far, size, **options)

        return make

    def pipe() -> tuple[Any, Any]:
        one, two = multiprocessing.Pipe()
        return Connection(one, two), Connection(one, two)

    def queue() -> tuple[Any, Any]:
        made = Queue(multiprocessing.get_context("fork").Queue(4))
        return made, made

    def reused() -> tuple[Any, Any]:
        memory = shared_memory.SharedMemory(create=True, size=size)
        near, far = socket.socketpair()
        ends = HandReused(near, size, memory), HandReused(far, size, memory)
        memory.unlink()
        return ends

    def zmq(copy: bool) -> Callable[[], tuple[Any, Any]]:
        def make() -> tuple[Any, Any]:
            address = f"ipc://{tempfile.mkdtemp()}/socket"
            return Zmq(address, size, copy=copy), Zmq(address, size, copy=copy)

        return make

    yield "unix socket, into one array", False, over(Socket)
    yield "unix socket, a new array each time", False, over(Socket, fresh=True)
    if cell != "blocks":
        yield "multiprocessing.Pipe", False, pipe
        yield "multiprocessing.Queue", False, queue
        yield "shared_memory by hand, a segment each", False, over(ByHand)
        yield "shared_memory by hand, a segment each, in place", False, over(ByHand)
        yield "shared_memory by hand, one segment rewritten", False, reused
        yield "shared_memory by hand, one segment rewritten in place", False, reused
        yield "relay.share", True, over(Sharing)
        yield "relay.share, in place", True, over(Sharing)
    else:
        with contextlib.suppress(ImportError):
            import zmq as found  # noqa: F401 - a peer, if it is there

            yield "pyzmq ipc", False, zmq(True)
            yield "pyzmq ipc, copy=False, in place", False, zmq(False)
    yield "relay.ShareSink.send", True, over(Sink)
    yield "relay.ShareSink.slot, in place", True, over(Sink)
    if cell == "array":
        yield "relay.Shared.send, shared before", True, over(Shared)
