"""Memory from process to process: relay beside sockets, multiprocessing, pyzmq and shared memory by hand.

    python -m benchmarks.memory [--runs 5] [--only array] [--json FILE]

`array`   a 64 MiB array, one at a time, to a process that reads a value of each page. Ways that say "in place" have it
          computed where it is handed over, the others find it on the heap; the computing is not in the figures
`made`    the same with the computing in the figures
`blocks`  a steady stream of 1 MiB blocks
`pipe`    pipe to pipe, without looking at the bytes: lending, with huge pages or small ones and with busy or
          waiting ends, beside write and read, and beside this machine's memcpy

Each way has a sender and a receiver, two processes. All ways of a cell run in turn, round after round; the table has
medians, and the CPU of both processes together. Every array's sum is checked. pyzmq is left out where it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import numpy

import relay

from . import machine

MIB = 1 << 20
ARRAY = 64 * MIB
BLOCK = MIB
PAGE_STEP = 512  # float64 in a page

Give = Callable[[Any], None]  # sends one array
Take = Callable[[], Any]  # receives one; what it returns is looked at and dropped


@dataclass
class Way:
    """One way across: `sender(sock, size)` gives what sends an array, `receiver(sock, size)` what takes one.

    `place(size)`, for `made`, is asked of the sender for memory to compute into. `ours`: it is relay's.
    """

    name: str
    sender: Callable[[socket.socket, int], Any]
    receiver: Callable[[socket.socket, int], Any]
    ours: bool = False


@dataclass
class Result:
    """Seconds and CPU seconds for each array, or for each GB, one number a round."""

    name: str
    ours: bool
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


# -- senders and receivers. A sender has `send(array)` and perhaps `place()`; a receiver `receive(look)`


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
    """relay.share, or a relay.Draft where the array is made in place: memory that is final, a new one each time."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self.sock, self.size = sock, size

    def place(self) -> Any:
        self.draft = relay.Draft(self.size // 8, "<f8")
        return self.draft.array()

    def send(self, array: Any) -> None:
        with relay.share(array) as shared:
            shared.send(self.sock)

    def send_placed(self) -> None:
        with self.draft.share() as shared:
            shared.send(self.sock)

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
        yield "relay.Draft, in place", True, over(Sharing)
    else:
        with contextlib.suppress(ImportError):
            import zmq as found  # noqa: F401 - a peer, if it is there

            yield "pyzmq ipc", False, zmq(True)
            yield "pyzmq ipc, copy=False, in place", False, zmq(False)
    yield "relay.ShareSink.send", True, over(Sink)
    yield "relay.ShareSink.slot, in place", True, over(Sink)
    if cell == "array":
        yield "relay.Shared.send, shared before", True, over(Shared)


# -- running them


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run(
    name: str, make: Callable[[], tuple[Any, Any]], cell: str, size: int, count: int
) -> tuple[float, float]:
    """Seconds and CPU seconds for each of `count` arrays, after one that is not counted."""
    near, far = make()
    answers, answer = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sums: list[float] = []
            for _ in range(count + 1):
                far.receive(lambda array: sums.append(float(array[::PAGE_STEP].sum())))
                if cell != "blocks" or len(sums) == 1:
                    answer.send(struct.pack("d", sums[-1]))
            if cell == "blocks":
                answer.sendall(struct.pack(f"{count}d", *sums[1:]))
            answer.recv(1)
            code = 0
        finally:
            os._exit(code)
    source = numpy.ones(size // 8)
    made = numpy.empty(size // 8)
    in_place = name.endswith("in place")
    expected: list[float] = []

    def one(number: int) -> None:
        number = 1 if name.endswith("before") else number
        expected.append(number * (size // 8 / PAGE_STEP))
        if in_place:
            place = near.place()
            numpy.multiply(source, number, out=place)
            del place
            if cell == "array":
                begun[0] = time.perf_counter()
            near.send_placed()
        elif cell == "array":
            source[:] = number
            begun[0] = time.perf_counter()
            near.send(source)
        else:
            # what leaves later, on a queue's thread, needs memory of its own
            target = numpy.empty(size // 8) if "Queue" in name else made
            numpy.multiply(source, number, out=target)
            near.send(target)

    def answered() -> None:
        got = struct.unpack("d", answers.recv(8, socket.MSG_WAITALL))[0]
        if got != (wanted := expected.pop(0)):
            raise SystemExit(f"{name}: an array's sum is {got}, not {wanted}")

    begun = [0.0]
    one(1)
    answered()
    seconds = 0.0
    start, used = time.perf_counter(), cpu()
    for number in range(count):
        begun[0] = time.perf_counter()
        one(2 + number % 100)
        if cell != "blocks":
            answered()
            seconds += time.perf_counter() - begun[0]
    while expected:
        answered()
    if cell == "blocks":
        seconds = time.perf_counter() - start
    answers.send(b"x")
    os.waitpid(pid, 0)
    used = cpu() - used
    if hasattr(near, "close"):
        near.close()
    answers.close()
    answer.close()
    return seconds / count, used / count


def measure(cell: str, runs: int, size: int, count: int) -> list[Result]:
    """All ways of `cell` in turn, `runs` rounds, after one that is not counted."""
    found: dict[str, Result] = {}
    for number in range(runs + 1):
        for name, ours, make in ways(cell, size):
            result = found.setdefault(name, Result(name, ours))
            seconds, used = run(name, make, cell, size, count if number else 1)
            if number:
                result.seconds.append(seconds)
                result.cpu.append(used)
        print(f"{cell}: round {number} of {runs}", file=sys.stderr)
    return list(found.values())


# -- pipe to pipe


def lent(total: int, *, huge: bool, busy: bool, lend: bool, piece: int = 256 << 10) -> float:
    """GB/s through one pipe: a process that lends (or writes), one that splices on to /dev/null (or reads)."""
    start, done = os.pipe(), os.pipe()
    pipe = relay.Pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            nowhere, left = os.open(os.devnull, os.O_WRONLY), total
            buffer = bytearray(piece)
            os.read(start[0], 1)
            while left:
                try:
                    if lend:
                        left -= pipe.splice_to(nowhere, left) if busy else relay.splice(pipe, nowhere, left)
                    else:
                        left -= os.readv(pipe.read_fd, [buffer])
                except BlockingIOError:
                    if not busy:
                        raise
            os.write(done[1], b"x")
            code = 0
        finally:
            os._exit(code)
    content = bytes(4 * MIB)
    arena = relay.Arena(content, huge=huge)
    os.write(start[1], b"x")
    begun, left = time.perf_counter(), total
    view = memoryview(content)[:piece]
    while left:
        try:
            if not lend:
                left -= os.write(pipe.write_fd, view[:left])
            elif busy:
                left -= arena.lend(pipe)
            else:
                left -= relay.vmsplice(arena, pipe)
            if lend and not arena.waiting:
                arena.rewind()
        except BlockingIOError:
            if not busy:
                raise
    os.read(done[0], 1)
    seconds = time.perf_counter() - begun
    os.waitpid(pid, 0)
    arena.close()
    pipe.close()
    for fd in (*start, *done):
        os.close(fd)
    return total / seconds / 1e9


def alone(total: int) -> float:
    """GB/s of one thread that lends huge pages to a pipe and splices them on to /dev/null: nobody waits."""
    nowhere, moved = os.open(os.devnull, os.O_WRONLY), 0
    with relay.Arena(bytes(4 * MIB), huge=True) as arena, relay.Pipe() as pipe:
        begun = time.perf_counter()
        while moved < total:
            count = arena.lend(pipe)
            moved += count
            while count:
                count -= pipe.splice_to(nowhere, count)
            if not arena.waiting:
                arena.rewind()
        seconds = time.perf_counter() - begun
    os.close(nowhere)
    return moved / seconds / 1e9


def memcpy(size: int, total: int) -> float:
    """GB/s of copying `size` bytes from one array into another, both warm, again and again."""
    one, two = numpy.ones(size, "u1"), numpy.ones(size, "u1")
    begun = time.perf_counter()
    for _ in range(total // size):
        two[:] = one
    return total // size * size / (time.perf_counter() - begun) / 1e9


def pipes(runs: int) -> dict[str, list[float]]:
    """GB/s of every way through a pipe, and of memcpy, in turn."""
    total = 4 << 30
    found: dict[str, list[float]] = {}
    kinds: dict[str, Callable[[], float]] = {
        "memcpy, 1 GiB arrays": lambda: memcpy(1 << 30, 2 << 30),
        "memcpy, 64 MiB arrays": lambda: memcpy(64 * MIB, 2 << 30),
        "memcpy, 1 MiB arrays": lambda: memcpy(MIB, 2 << 30),
        "write and read, busy ends": lambda: lent(total // 2, huge=False, busy=True, lend=False),
        "lent, small pages, waiting ends": lambda: lent(total, huge=False, busy=False, lend=True),
        "lent, small pages, busy ends": lambda: lent(2 * total, huge=False, busy=True, lend=True),
        "lent, huge pages, waiting ends": lambda: lent(2 * total, huge=True, busy=False, lend=True),
        "lent, huge pages, both ends on one thread": lambda: alone(4 * total),
        "lent, huge pages, busy ends": lambda: lent(4 * total, huge=True, busy=True, lend=True),
    }
    for number in range(runs):
        for name, kind in kinds.items():
            found.setdefault(name, []).append(kind())
        print(f"pipe: round {number + 1} of {runs}", file=sys.stderr)
    return found


# -- the report


TITLES = {
    "array": "A 64 MiB array, one at a time, the making not included",
    "made": "A 64 MiB array made anew each time, the making included",
    "blocks": "A stream of 1 MiB blocks, each computed and sent",
}


def table(cell: str, results: list[Result], size: int) -> str:
    """Markdown: milliseconds, GB/s and CPU of each way, and how many times faster the best of relay's is."""
    best = min((one.median for one in results if one.ours), default=0.0)
    lines = [
        f"### {TITLES[cell]} (`{cell}`)\n",
        "| way | ms (min to max) | GB/s | CPU ms, both processes | relay's best is faster by |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in results:
        name = f"**{one.name}**" if one.ours else one.name
        ms = [1e3 * value for value in (one.median, min(one.seconds), max(one.seconds))]
        used = 1e3 * statistics.median(one.cpu)
        by = "" if one.ours else f"{one.median / best:.1f}"
        lines.append(
            f"| {name} | {ms[0]:.3f} ({ms[1]:.3f} to {ms[2]:.3f}) | {size / one.median / 1e9:.2f} | {used:.3f} | {by} |"
        )
    return "\n".join(lines) + "\n"


def pipe_table(found: dict[str, list[float]]) -> str:
    """Markdown: GB/s of each way."""
    lines = ["### Pipe to pipe, one pipe of 1 MiB (`pipe`)\n", "| way | GB/s (min to max) |", "|---|---:|"]
    for name, rates in found.items():
        lines.append(f"| {name} | {statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds that count")
    parser.add_argument("--only", choices=[*TITLES, "pipe"], action="append", help="a cell; may be repeated")
    parser.add_argument("--json", type=Path, help="every round's figures go here as well")
    given = parser.parse_args()
    cells = given.only or [*TITLES, "pipe"]
    here = machine.description(Path(tempfile.gettempdir()))
    print(f"Machine: {machine.line(here)}\n")
    figures: dict[str, Any] = {"machine": here}
    for cell in cells:
        if cell == "pipe":
            found = pipes(given.runs)
            figures[cell] = found
            print(pipe_table(found))
            continue
        size, count = (BLOCK, 1000) if cell == "blocks" else (ARRAY, 5)
        results = measure(cell, given.runs, size, count)
        figures[cell] = {one.name: {"seconds": one.seconds, "cpu": one.cpu} for one in results}
        print(table(cell, results, size))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
