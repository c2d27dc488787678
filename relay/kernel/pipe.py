"""One kernel pipe: two descriptors and the capacity that was granted.

Facts (man 7 pipe; fs/pipe.c):
- Capacity is slots, not bytes: 16 slots of one page by default. A slot holds one page or part of one, so
  many small writes fill a pipe that holds few bytes.
- F_SETPIPE_SZ above /proc/sys/fs/pipe-max-size is EPERM without CAP_SYS_RESOURCE. Each user has a budget of
  pages (/proc/sys/fs/pipe-user-pages-soft, 16384 by default): beyond it new pipes shrink, to two slots in
  the end, and enlarging is EPERM.
- A pipe that still holds bytes must not be used for another stream.

What this means here: the capacity is asked for in halving steps and read back; running out of pages makes
pipes small, never fails.
"""

from __future__ import annotations

import errno
import fcntl
import os
from types import TracebackType
from typing import Final

from relay.errors import KernelError
from relay.kernel import core

F_SETPIPE_SZ: Final = 1031
F_GETPIPE_SZ: Final = 1032

DEFAULT_CAPACITY: Final = 1024 * 1024
LARGEST_CAPACITY: Final = 1024 * 1024


def enlarge(fd: int, wanted: int) -> int:
    """Gives the pipe behind `fd` up to `wanted` bytes, as far as the kernel grants it; returns its capacity.

    Never makes a pipe smaller. Raises OSError when `fd` is no pipe.
    """
    have = fcntl.fcntl(fd, F_GETPIPE_SZ)
    size = wanted
    while size > have:
        try:
            return fcntl.fcntl(fd, F_SETPIPE_SZ, size)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EBUSY, errno.ENOMEM):
                raise
            size //= 2
    return have


class Pipe:
    """The only owner of both ends of a pipe: `read_fd`, `write_fd` (-1 once closed) and `capacity` in bytes.

    Both ends are nonblocking and close-on-exec. Raises KernelError when no descriptor is left.
    """

    __slots__ = ("capacity", "read_fd", "write_fd")

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.read_fd = self.write_fd = -1
        try:
            self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(
                f"pipe2: {error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})",
                hint="raise the limit of open files (ulimit -n) or run fewer streams at once",
            ) from error
        self.capacity = enlarge(self.write_fd, capacity)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close_write(self) -> None:
        """Closes the write end: who reads sees the end of the stream once the pipe is empty."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def close(self) -> None:
        """Closes both ends; what the pipe holds is gone. Safe to call again."""
        self.close_write()
        if self.read_fd >= 0:
            os.close(self.read_fd)
            self.read_fd = -1

    def tee_to(self, other: Pipe, size: int) -> int:
        """References to the first `size` bytes in here go to `other` too; returns how many (man 2 tee).

        Always starts at the head. Raises BlockingIOError when this pipe is empty or the other is full.
        """
        return _moved(core.lib.relay_tee(self.read_fd, other.write_fd, size), "tee")

    def splice_to(self, fd: int, size: int) -> int:
        """Moves `size` bytes from here to `fd`; returns how many went (man 2 splice).

        Raises BlockingIOError when this pipe is empty, or `fd` is nonblocking and takes nothing now.
        """
        return _moved(core.lib.relay_splice(self.read_fd, -1, fd, size, 0), "splice")

    def splice_from(self, fd: int, size: int, offset: int = -1) -> int:
        """Moves up to `size` bytes from `fd` (at `offset`, if not -1) into here; 0 is the end of `fd`."""
        return _moved(core.lib.relay_splice(fd, offset, self.write_fd, size, 0), "splice")


def _moved(answer: int, operation: str) -> int:
    if answer < 0:
        raise OSError(-answer, f"{operation}: {os.strerror(-answer)}")
    return answer
