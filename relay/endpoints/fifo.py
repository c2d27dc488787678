"""Named pipes: `fifo:///path`, as source and as sink.

Facts (man 7 fifo, 2 open; fs/pipe.c):
- Opened for reading with O_NONBLOCK a fifo opens at once and reads as ended until a writer comes; epoll stays
  silent until the first writer has come, so it tells when to read.
- Opened for writing with O_NONBLOCK it is ENXIO until there is a reader.

What this means here: a source waits in epoll; a sink tries again until somebody reads. A fifo that is given is
enlarged to 1 MiB where that is allowed, and made if it does not exist.
"""

from __future__ import annotations

import errno
import os
import select
import stat

from relay.endpoints.base import Sink, Source
from relay.engine import Engine, Timer
from relay.kernel.pipe import LARGEST_CAPACITY, enlarge

RETRY = 0.05  # seconds between two looks for a reader


def _open(path: str, flags: int) -> int:
    """Opens the fifo, made first if nothing is there; OSError EINVAL when the path is something else."""
    try:
        os.mkfifo(path)
    except FileExistsError:
        if not stat.S_ISFIFO(os.stat(path).st_mode):  # noqa: PTH116 - a plain call, as open beside it
            raise OSError(errno.EINVAL, "the path exists and is not a fifo") from None
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    enlarge(fd, LARGEST_CAPACITY)
    return fd


class FifoSource(Source):
    """Reads a fifo until its last writer closes; owns the descriptor."""

    def __init__(self, engine: Engine, path: str) -> None:
        super().__init__(engine, f"fifo://{path}")
        self._path = path
        self.peer = path
        self.scheme = "fifo"

    def open(self) -> None:
        """Opens it; reading begins when a writer comes."""
        try:
            fd = _open(self._path, os.O_RDONLY)
        except OSError as error:
            reason = error.strerror if error.errno == errno.EINVAL else ""
            self.on_fail(self.error("opening", error.errno or 0, reason=reason or ""))
            return
        if self.attach(fd, select.EPOLLIN):
            self.on_open()


class FifoSink(Sink):
    """Writes to a fifo once somebody reads it; owns the descriptor."""

    def __init__(self, engine: Engine, path: str) -> None:
        super().__init__(engine, f"fifo://{path}")
        self._path = path
        self._timer: Timer | None = None
        self._finish_asked = False

    def open(self) -> None:
        """Opens it, or looks again for a reader a little later."""
        self._timer = None
        if self.state != "opening":
            return
        try:
            fd = _open(self._path, os.O_WRONLY)
        except OSError as error:
            if error.errno == errno.ENXIO:
                self._timer = self.engine.later(RETRY, self.open)
                return
            reason = error.strerror if error.errno == errno.EINVAL else ""
            self.fail(self.error("opening", error.errno or 0, reason=reason or ""))
            return
        if not self.attach(fd, select.EPOLLOUT):
            return
        self.opened()
        if self._finish_asked:
            self.finished()

    def finish(self) -> None:
        """Closes the write end; an empty stream waits for its reader too, who then sees the end."""
        if self.state == "opening":
            self._finish_asked = True
        else:
            self.finished()

    def close(self) -> None:
        """Stops looking for a reader, closes the descriptor."""
        if self._timer is not None:
            self._timer.cancel()
        super().close()
