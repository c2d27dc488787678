"""vmsplice, tee and splice for programs: one call each, with the loop around it that the system calls need.

Facts (man 2 splice, tee, vmsplice; docs/kernel-facts.md):
- Every one of them may come short, at any count. 0 is the end of the stream; EAGAIN means that one of the two
  sides is not ready and does not say which.
- SPLICE_F_NONBLOCK covers pipes only. A splice that blocks on a socket holds the pipe locked meanwhile.
- With a length beyond what the pipe holds the kernel may hold the last bytes back for 200 ms.
- tee always starts at the head of a pipe: what it gave has to be drained before it gives anything new.

So: each call is made without waiting, the waiting is done by poll on the side that is not ready, the length
out of a pipe is never more than what it holds, and tee is one call whose count the caller must look at.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import termios
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from relay.kernel import core
from relay.kernel.arena import Arena, write_now
from relay.kernel.pipe import Pipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

LARGEST_CALL: Final = 1 << 30


class HasFileno(Protocol):
    """A socket, an open file: what has a descriptor."""

    def fileno(self) -> int:
        """The descriptor's number."""
        ...


End: TypeAlias = "Pipe | HasFileno | int"
"""Where bytes come from or go to: a Pipe (its proper end is taken), a descriptor, or what has one."""


def vmsplice(
    source: Arena | Buffer,
    to: Pipe | int,
    *,
    copy: bool = True,
    timeout: float | None = None,
    busy: float = 0.0,
) -> int:
    """Puts all of `source` into the pipe `to`; returns the bytes.

    An Arena lends what waits in it: the pipe gets references to its pages, nothing is copied. Every other
    buffer (bytes, a NumPy array on the heap, an mmap) stays its owner's to change, so it is copied into the
    pipe; with `copy` False it is refused with BufferError, and an Arena with OSError where the kernel
    refuses to lend. `timeout` is in seconds, None waits for as long as it takes, 0 not at all. Returns less
    than all when the time is up, raises BlockingIOError when it was up before the first byte, and
    BrokenPipeError when nobody can read the pipe. `busy` is for how many seconds of each wait the CPU is kept:
    two ends that have one each are faster with it. The rest of an Arena is lent by the next call; a view of
    the rest of another buffer is `memoryview(source).cast("B")[count:]`.
    """
    fd = to if isinstance(to, int) else to.write_fd
    if isinstance(source, Arena):
        arena = source
        wanted = arena.waiting

        def some(_left: int) -> int:
            return arena.lend(fd, copy=copy)

        return _loop(some, wanted, lambda: (fd, select.POLLOUT), timeout, busy=busy)
    if not copy:
        raise BufferError(
            f"{type(source).__name__} is not lent: its owner may change it while somebody reads it; "
            "put it into a relay.Arena, or let it be copied"
        )
    flat = memoryview(source).cast("B")

    return _loop(
        lambda left: write_now(fd, flat[len(flat) - left :]),
        len(flat),
        lambda: (fd, select.POLLOUT),
        timeout,
        busy=busy,
    )


def tee(source: Pipe | int, to: Pipe | int, size: int, *, timeout: float | None = None) -> int:
    """References to the first `size` bytes of the pipe `source` go to the pipe `to` as well; returns how many.

    One call: it may come short. It always starts at the head of `source`, so drain exactly as many bytes as
    it says before you call it again, or the same bytes go twice. 0 is the end of the stream. `timeout` in
    seconds, None waits; BlockingIOError when it is up.
    """
    one = source if isinstance(source, int) else source.read_fd
    two = to if isinstance(to, int) else to.write_fd
    if size <= 0:
        raise ValueError(f"tee of {size} bytes: there is nothing to do")

    def wait() -> tuple[int, int]:
        # readable first: a pipe without bytes has nothing to give whatever room there is
        return (one, select.POLLIN) if not _poll(one, select.POLLIN, 0) else (two, select.POLLOUT)

    def once(left: int) -> int:
        return _answer(core.lib.relay_tee(one, two, min(left, LARGEST_CALL)), "tee", one, two)

    return _loop(once, size, wait, timeout, once=True)


def splice(
    source: End, to: End, size: int | None = None, *, timeout: float | None = None, busy: float = 0.0
) -> int:
    """Moves `size` bytes (None: up to the end of the stream) from `source` to `to`; returns how many.

    One of the two must be a pipe; the bytes do not pass through user memory. Returns less than `size` at the
    end of the stream or when `timeout` (seconds; None waits) is up, 0 only at the end; raises
    BlockingIOError when the time was up before the first byte. `busy` as for vmsplice. A file is read and
    written at its own position and may wait for the disk. Put sockets into nonblocking mode (or give them a
    timeout): the kernel waits for a blocking one inside the call, where `timeout` cannot reach it, so that is
    a ValueError unless `timeout` is None. OSError with EINVAL says that an end cannot be spliced (a terminal,
    a file opened with O_APPEND): read and write copy there.
    """
    one, two = _in(source), _out(to)
    if size is not None and size < 0:
        raise ValueError(f"splice of {size} bytes: the size cannot be negative")
    if size == 0:
        return 0
    if timeout is not None:
        _refuse_blocking(one, two)
    from_pipe = stat.S_ISFIFO(os.fstat(one).st_mode)

    def some(left: int) -> int:
        if from_pipe:
            held = _held(one)
            if not held and not _poll(one, select.POLLIN, 0):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            left = min(left, held or _held(one) or left)  # empty and ready: it is at its end
        return _answer(core.lib.relay_splice(one, -1, two, min(left, LARGEST_CALL), 0), "splice", one, two)

    def wait() -> tuple[int, int]:
        # EAGAIN does not say which side is not ready: poll does
        return (one, select.POLLIN) if not _poll(one, select.POLLIN, 0) else (two, select.POLLOUT)

    return _loop(some, LARGEST_CALL if size is None else size, wait, timeout, endless=size is None, busy=busy)


def _loop(
    call: Callable[[int], int],
    size: int,
    wait: Callable[[], tuple[int, int]],
    timeout: float | None,
    *,
    once: bool = False,
    endless: bool = False,
    busy: float = 0.0,
) -> int:
    """Calls until `size` bytes are done (never, if `endless`), the stream ends, or the time is up."""
    until = None if timeout is None else time.monotonic() + timeout
    moved = 0
    while endless or moved < size:
        try:
            count = call(size if endless else size - moved)
        except BlockingIOError:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                if moved:
                    return moved
                raise
            fd, events = wait()
            spin = int(1e9 * (busy if left is None else min(busy, left)))
            if spin <= 0 or not core.lib.relay_spin(fd, events, spin):
                _poll(fd, events, left)
            continue
        if not count:
            return moved
        moved += count
        if once:
            return moved
    return moved


def _poll(fd: int, events: int, timeout: float | None) -> bool:
    """Whether `fd` is ready, failed or at its end within `timeout` seconds."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if timeout is None else max(0, timeout) * 1000))


def _answer(count: int, call: str, one: int, two: int) -> int:
    if count >= 0:
        return count
    code = -count
    why = f"{call} from descriptor {one} to {two}: {os.strerror(code)}"
    if code == errno.EINVAL:
        why += "; one end must be a pipe and the other one that can be spliced: read and write copy otherwise"
    raise OSError(code, why)


def _in(end: End) -> int:
    if isinstance(end, Pipe):
        return end.read_fd
    return end if isinstance(end, int) else end.fileno()


def _out(end: End) -> int:
    if isinstance(end, Pipe):
        return end.write_fd
    return end if isinstance(end, int) else end.fileno()


def _held(fd: int) -> int:
    """Bytes in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])


def _refuse_blocking(*fds: int) -> None:
    for fd in fds:
        if stat.S_ISSOCK(os.fstat(fd).st_mode) and os.get_blocking(fd):
            raise ValueError(
                f"descriptor {fd} is a blocking socket, where no timeout holds: setblocking(False)"
            )
