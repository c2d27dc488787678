"""The path matrix: from every end to every other, by every way, shared or copied, how fast and at what CPU.

Theory of operation. A piece is moved from an origin to where they arrive. Then the origin is changed, and only
then is looked at what arrived: new bytes mean shared pages, old ones a copy. A refusal of the kernel or a sandbox is
denied. Where the origin's pages can be those of a memfd the same is done once more, and the references to them are
counted: both answers have to agree. Then the same is done over and over for a moment; only the way's own calls are
timed, not what fills and empties the ends.

Four rows answer one question: how do pages of memory get into another process without a copy? `vmsplice+vmsplice`
(lent to a pipe, taken out in the reverse direction), `vmsplice+read`, `vmsplice+splice` (into a memfd that the other
process has mapped), `passed` (the memory is a memfd, its descriptor is passed, the other process maps it). Whether
they are shared is seen by a child; how fast they are is timed within one process, which makes the same calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from relay.doctor.ability import who_refused
from relay.doctor.ends import AFTER, BEFORE, Arrival, Channel, Kind, Pages, Stored, arrival, piece
from relay.doctor.other import MAP, READ, VMSPLICE, Landing, Other
from relay.errors import KernelError
from relay.kernel import core
from relay.kernel.pipe import Pipe

Result = Literal["shared", "copied", "denied"]

FIRST: Final = ("memory", "file", "memfd", "pipe", "unix", "tcp")
LAST: Final = ("pipe", "unix", "tcp", "file", "memfd")
LEAST: Final = 8  # rounds that are timed
STUCK: Final = 1000  # answers that a queue is full or empty, one after the other
REFUSED: Final = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}

TO_PROCESS: Final[dict[Kind, tuple[str, ...]]] = {
    "memory": ("vmsplice+vmsplice", "vmsplice+read", "vmsplice+splice", "passed"),
    "file": ("passed", "read"),
    "memfd": ("passed", "read"),
    "pipe": ("vmsplice", "read"),
    "unix": ("read",),
    "tcp": ("read",),
}


@dataclass(frozen=True)
class Found:
    """One row: from where to where by which way, and what was found; 10^9 bytes a second, and CPU for as many."""

    source: Kind
    to: Kind
    way: str
    result: Result
    gb_s: float | None = None
    cpu_s_per_gb: float | None = None
    why: str = ""
    references: Literal["held", "none"] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"from": self.source, "to": self.to, "way": self.way, "result": self.result}
        found["gb_s"] = None if self.gb_s is None else round(self.gb_s, 3)
        found["cpu_s_per_gb"] = None if self.cpu_s_per_gb is None else round(self.cpu_s_per_gb, 4)
        found["references"] = self.references
        return {**found, "why": self.why} if self.why else found

    def agreeing(self, held: bool | None) -> Found:
        """With what the count of references says. KernelError where that is something else."""
        if held is not None and self.result != "denied" and held != (self.result == "shared"):
            count = "there are references to the origin's pages" if held else "nobody has the origin's pages"
            raise KernelError(f"the bytes say {self.result}, but {count}")
        return self if held is None else replace(self, references="held" if held else "none")


def ways(source: Kind, to: Kind) -> tuple[str, ...]:
    """How bytes can go from one to the other."""
    if to == "process":
        return TO_PROCESS[source]
    if source == "memory":
        return ("vmsplice", "write")
    if source in ("file", "memfd"):
        return ("splice", "sendfile", "read")
    return ("splice", "tee", "read") if (source, to) == ("pipe", "pipe") else ("splice", "read")


def cells() -> Iterator[tuple[Kind, Kind, str]]:
    """Every row of the matrix, before anything is tried."""
    for source in FIRST:
        for to in (*LAST, "process"):
            for way in ways(source, to):
                yield source, to, way
    yield "process", "process", "process_vm_readv"


def examine(source: Kind, to: Kind, way: str, directory: Path, seconds: float) -> Found:
    """Tries one row. Raises OSError and KernelError for what is neither a result nor a refusal."""
    try:
        with contextlib.ExitStack() as undo:
            if source == "process":
                return _from_process(way, seconds)
            if to == "process":
                return _to_process(source, way, directory, seconds, undo)
            bench = _Bench(source, to, directory, undo)
            bench.fill()
            bench.move(way)
            bench.pages.change()
            result = _seen(bench.arrived.look())
            gb_s, cpu = _timed(seconds, bench.again, lambda: bench.move(way), bench.arrived.look)
            return Found(source, to, way, result, gb_s, cpu)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return Found(source, to, way, "denied", why=who_refused(error.errno or 0))


def references(found: Found, directory: Path) -> Found:
    """The row with the second evidence: whether there are references to the origin's pages when they have arrived.

    Takes some 150 ms where there are. Rows from files and into other processes stay as they are. Raises as `examine`.
    """
    if found.result == "denied" or found.to == "process" or found.source == "file":
        return found
    held = _held(found, directory)
    for _ in range(2):
        if not held or found.result == "shared":
            break
        held = _held(found, directory)  # on a busy machine the kernel lets go of a packet late
    return found.agreeing(held)


def _held(found: Found, directory: Path) -> bool | None:
    with contextlib.ExitStack() as undo:
        bench = _Bench(found.source, found.to, directory, undo, sealed=True)
        bench.fill()
        bench.move(found.way)
        return bench.held()


def _from_process(way: str, seconds: float) -> Found:
    """Out of another process's memory, by its address."""
    landed = bytearray(piece())
    into = core.ffi.from_buffer("char[]", landed)
    with Other() as other:
        address = other.address()

        def take() -> None:
            other.read(address, into, piece())

        take()
        other.change()
        result = _seen(bytes(landed))
        gb_s, cpu = _timed(seconds, lambda: None, take, lambda: None)
    return Found("process", "process", way, result, gb_s, cpu)


def _seen(content: bytes) -> Result:
    if content == AFTER * piece():
        return "shared"
    if content == BEFORE * piece():
        return "copied"
    raise KernelError("what arrived is neither what was sent nor what it was changed to")


def _timed(
    seconds: float, before: Callable[[], object], way: Callable[[], object], after: Callable[[], object]
) -> tuple[float, float]:
    """10^9 bytes a second and CPU seconds for as many of `way` alone; `before` and `after` are not timed."""
    spent = cpu = rounds = 0
    until = time.monotonic() + seconds
    while rounds < LEAST or time.monotonic() < until:
        before()
        began, began_cpu = time.perf_counter_ns(), time.thread_time_ns()
        way()
        cpu += time.thread_time_ns() - began_cpu
        spent += time.perf_counter_ns() - began
        after()
        rounds += 1
    moved = rounds * piece()
    return moved / max(1, spent), cpu / moved


def _to_process(source: Kind, way: str, directory: Path, seconds: float, undo: contextlib.ExitStack) -> Found:
    """Into another process's memory."""
    held_as: Kind = "memfd" if (source, way) == ("memory", "passed") else source
    bench = _Bench(held_as, "pipe", directory, undo)
    target = Stored("memfd" if way == "vmsplice+splice" else "file", directory)
    undo.callback(target.close)
    os.ftruncate(target.write_fd, piece())

    def into(take: Callable[[bytes, int], None], bench: _Bench = bench) -> None:
        pipe = bench.arrived
        assert isinstance(pipe, Channel)
        if way == "passed":
            take(MAP, bench.pages.fd)
        elif way == "vmsplice+splice":
            bench.move("vmsplice")
            _exactly(lambda left: core.lib.relay_splice(pipe.read_fd, -1, target.write_fd, left, 0))
        elif way.startswith("vmsplice+"):
            bench.move("vmsplice")
            take(VMSPLICE if way.endswith("+vmsplice") else READ, pipe.read_fd)
        else:
            take(VMSPLICE if way == "vmsplice" else READ, bench.origin_fd)

    landing = Landing()
    undo.callback(landing.close)
    bench.fill()
    with Other() as other:
        if way == "vmsplice+splice":
            other.take(MAP, target.write_fd)
        into(other.take)
        bench.pages.change()
        result = _seen(other.look())
        held = bench.pages.held() if held_as == "memfd" else None
        if held_as == "memory":
            counted = _Bench("memory", "pipe", directory, undo, sealed=True)
            target.look()
            into(other.take, counted)
            held = counted.held()
    if way == "vmsplice+splice":
        landing.take(MAP, target.write_fd)

    def once() -> None:
        into(landing.take)
        if way == "passed":
            landing.touch()
            landing.release()

    def again() -> None:
        target.look()
        bench.again()

    gb_s, cpu = _timed(seconds, again, once, lambda: None)
    return Found(source, "process", way, result, gb_s, cpu).agreeing(held)


class _Bench:
    """An origin, an arrival, a pipe between where one is needed; all closed by `undo`."""

    def __init__(
        self, source: Kind, to: Kind, directory: Path, undo: contextlib.ExitStack, *, sealed: bool = False
    ) -> None:
        self._source = source
        self._undo = undo
        self.arrived: Arrival = arrival(to, directory)
        undo.callback(self.arrived.close)
        self._to_pipe = to == "pipe"
        kind: Kind = source if source in ("memory", "file", "memfd") else "file"
        if sealed:
            kind = "mapped" if source == "memory" else "memfd"
        self.pages = Pages(kind, directory)
        undo.callback(self.pages.close)
        self._channel: Channel | None = None
        if source in ("pipe", "unix", "tcp"):
            self._channel = Channel(source)
            undo.callback(self._channel.close)
        self._between = Pipe()
        undo.callback(self._between.close)
        self._buffer = bytearray(piece())
        self._left_behind = False
        self._view = memoryview(self.pages.map) if self.pages.map is not None else None
        if self._view is not None:
            undo.callback(self._view.release)

    def held(self) -> bool | None:
        """Whether anybody has references to the pages of a bench that is `sealed`. The last thing that is asked."""
        if self._view is not None:
            self._view.release()
        return self.pages.held()

    @property
    def origin_fd(self) -> int:
        """What the bytes can be read from; a file from its beginning."""
        if self._channel is not None:
            return self._channel.read_fd
        os.lseek(self.pages.fd, 0, os.SEEK_SET)
        return self.pages.fd

    def fill(self) -> None:
        """The origin has a piece to give, which are pages of `pages`; a copy of them where splice is refused."""
        if self._channel is None:
            return
        try:
            self._spliced(self.pages.fd, self._channel.write_fd, to_pipe=self._source == "pipe")
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            _written(self._channel.write_fd, memoryview(BEFORE * piece()))

    def again(self) -> None:
        """For the next round; what tee left in its pipe is there already."""
        if not self._left_behind:
            self.fill()
        self._left_behind = False

    def move(self, way: str) -> None:
        """All of it, by that way."""
        to = self.arrived.write_fd
        if way == "write":
            assert self._view is not None
            _written(to, self._view)
        elif way == "vmsplice":
            self._lent(to)
        elif way == "sendfile":
            at = 0
            while at < piece():
                at += os.sendfile(to, self.pages.fd, at, piece() - at)
        elif self._channel is None:
            if way == "splice":
                self._spliced(self.pages.fd, to, to_pipe=self._to_pipe)
            else:
                os.preadv(self.pages.fd, [self._buffer], 0)
                _written(to, memoryview(self._buffer))
        elif way == "tee":
            origin = self._channel.read_fd
            _exactly(lambda left: core.lib.relay_tee(origin, to, left), whole=True)
            self._left_behind = True
        elif way == "splice":
            self._spliced_from_channel(self._channel, to)
        else:
            _received(self._channel, memoryview(self._buffer))
            _written(to, memoryview(self._buffer))

    def _lent(self, to: int) -> None:
        pointer = self.pages.pointer
        into = to if self._to_pipe else self._between.write_fd
        at = 0

        def lend(left: int) -> int:
            nonlocal at
            got = int(core.lib.relay_lend(into, pointer + at, left))
            at += max(0, got)
            return got

        try:
            _exactly(lend)
        finally:
            core.ffi.release(pointer)
        if not self._to_pipe:
            _exactly(lambda left: core.lib.relay_splice(self._between.read_fd, -1, to, left, 0))

    def _spliced(self, file: int, to: int, *, to_pipe: bool) -> None:
        """From a file's beginning, through a pipe of relay's where the other end is none."""
        into = to if to_pipe else self._between.write_fd
        _exactly(lambda left: core.lib.relay_splice(file, piece() - left, into, left, 0))
        if not to_pipe:
            _exactly(lambda left: core.lib.relay_splice(self._between.read_fd, -1, to, left, 0))

    def _spliced_from_channel(self, channel: Channel, to: int) -> None:
        straight = self._to_pipe or self._source == "pipe"
        into = to if straight else self._between.write_fd
        _exactly(lambda left: core.lib.relay_splice(channel.read_fd, -1, into, left, 0), wait=channel.wait)
        if not straight:
            _exactly(lambda left: core.lib.relay_splice(self._between.read_fd, -1, to, left, 0))


def _exactly(
    call: Callable[[int], int], *, wait: Callable[[], None] | None = None, whole: bool = False
) -> None:
    """`call(left)` until the piece has gone. Raises OSError with what it answered."""
    left, stuck = piece(), 0
    while left:
        got = int(call(left))
        if got == -errno.EAGAIN and stuck < STUCK:
            stuck += 1
            if wait is not None:
                wait()
            continue
        if got <= 0:
            code = -got or errno.EIO
            raise OSError(code, os.strerror(code))
        left -= got
        if whole and left:  # tee begins at the head again: what it did not double now it never will
            raise OSError(errno.ENOBUFS, "tee came short")


def _written(fd: int, content: memoryview) -> None:
    left, stuck = content, 0
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            stuck += 1
            if stuck > STUCK:
                raise


def _received(channel: Channel, into: memoryview) -> None:
    at = 0
    while at < piece():
        try:
            at += os.readv(channel.read_fd, [into[at:]])
        except BlockingIOError:
            channel.wait()
