"""Regular files, as source and as sink.

Facts (man 2 splice, 2 sendfile, 7 epoll; mm/filemap.c):
- epoll refuses regular files. Reading one may wait for the disk, writing one for writeback.
- splice and sendfile from a file lend its page-cache pages: a later write to the file by anybody shows
  through to a reader that has not read yet. Size and mtime tell that it happened, not what.
- splice to a file opened with O_APPEND is EINVAL.
- rename(2) replaces atomically; link(2) refuses to replace.

What this means here: a file that is read belongs to a pipeline that waits for nothing else meanwhile; one that
is written gets a ferry. A file is written as `.part` and renamed when whole. What a failed or cut-short stream
left behind stays as `.part`, and is named.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from relay.endpoints.base import Source
from relay.endpoints.ferried import FerriedSink
from relay.endpoints.ferry import Ferry
from relay.endpoints.written import Writing, WrittenFile
from relay.engine import Engine
from relay.kernel import core
from relay.ways import APPENDING, DIRECT

Identity = tuple[int, int, int, int]


def identity(status: os.stat_result) -> Identity:
    """What tells one state of one file from another: device, inode, size, time of the last write."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class FileSource(Source):
    """A file that is read from `offset` for at most `length` bytes (None: to its end); owns the descriptor.

    Raises nothing: on_fail gets a SourceError. `size` is what will be read (None: not known) and
    `identity` which state of which file it is, both known from open on.
    """

    def __init__(self, engine: Engine, path: str, *, offset: int = 0, length: int | None = None) -> None:
        super().__init__(engine, path)
        self.name = Path(path).name
        self.scheme = "file"
        self._offset = offset
        self._length = length
        self.size: int | None = 0
        self.identity: Identity = (0, 0, 0, 0)
        self._seen: tuple[int, int] | None = None

    def open(self) -> None:
        """Opens the file; a directory, or anything that is not a regular file, is refused."""
        try:
            fd = os.open(self.address, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            self.on_fail(self.error("opening", error.errno or 0))
            return
        self.take(fd)

    def take(self, fd: int) -> None:
        """Reads from the descriptor `fd`, which it owns from here on."""
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            self._refuse(fd, errno.EISDIR)
            return
        if not stat.S_ISREG(status.st_mode):
            self._refuse(fd, 0, "it is not a regular file", "use fifo:///path for a named pipe, - for stdin")
            return
        if self._offset > status.st_size > 0:
            beyond = f"it has {status.st_size} bytes, offset {self._offset} is beyond its end"
            self._refuse(fd, 0, beyond, "check --offset")
            return
        rest = max(0, status.st_size - self._offset)
        if self._length is not None and self._length > rest:
            short = f"it has {rest} bytes from offset {self._offset}, not {self._length}"
            self._refuse(fd, 0, short, "check --offset and --length")
            return
        # a file of /proc says size 0 and has bytes all the same: it is read to its end
        unsized = status.st_size == 0 and self._length is None
        size = rest if self._length is None else self._length
        self.size = None if unsized else size
        self._seen = (status.st_size, status.st_mtime_ns)
        self.identity = identity(status)
        self.c.kind = core.INSTANT
        self.c.readable = 1
        self.c.fd = fd
        self.c.offset = self._offset
        self.c.left = -1 if unsized else size
        os.posix_fadvise(fd, self._offset, 0, os.POSIX_FADV_SEQUENTIAL)
        self.on_open()

    def _refuse(self, fd: int, code: int, reason: str = "", advice: str = "") -> None:
        os.close(fd)
        self.on_fail(self.error("opening", code, reason=reason, advice=advice))

    def changed(self) -> str:
        """What is different now from when it was opened: it shrank, grew, or was written to."""
        if self._seen is None or self.c.fd < 0:
            return ""
        status = os.fstat(self.c.fd)
        size, mtime = self._seen
        if status.st_size < size:
            return f"it shrank from {size} to {status.st_size} bytes while it was read"
        if status.st_size > size:
            return f"it grew from {size} to {status.st_size} bytes while it was read"
        if status.st_mtime_ns != mtime:
            return "it was written to while it was read"
        return ""


class FileSink(FerriedSink):
    """Writes one stream to a file, or to a row of them, on a thread of its own; owns the file.

    `path` is asked for a name whenever a file begins. `sidecar_line` is set before `finish`.
    """

    def __init__(self, engine: Engine, path: Callable[[], str], how: Writing) -> None:
        first = path()
        super().__init__(engine, first)
        self._how = how
        self._name = path
        self._file = WrittenFile(Path(first), how)
        self._reopen_asked = False
        self._aborted = False
        self._sealed = False
        self._cut_reason = ""
        self.copies = APPENDING if how.append else DIRECT if how.direct else ""
        self.sidecar_line = ""

    @property
    def moved(self) -> int:
        """Bytes that reached the file."""
        return int(self._ferry.c.moved) - self._file.unwritten if self._ferry is not None else 0

    @property
    def calls(self) -> int:
        """Of its thread, where that writes in C: a file that rotates or syncs is written load by load from Python."""
        return int(self._ferry.c.calls) if self._ferry is not None else 0

    @property
    def result_path(self) -> str:
        """The file's name, or its `.part` while it is not whole."""
        return self._file.shown

    def open(self) -> None:
        """Starts the thread, which opens the file."""
        self.embark(self._how.capacity, self._write, self._written)

    def go_straight(self, why: str) -> bool:
        """Whether the source may be read into memory that the thread writes from, and is from now on."""
        if self._ferry is not None and self._how.plain and self._ferry.have_memory():
            self._straight = True
            self.copies = self.copies or why
        return self._straight

    def takes_spans(self, why: str) -> Ferry | None:
        """Its ferry, unless something has to be looked at between two loads."""
        if self._ferry is None or not self._how.plain:
            return None
        self.copies = self.copies or why
        return self._ferry

    def took_pipes(self, why: str) -> None:
        """After all most of the stream was handed to its thread in pipes: `why`, if that was told, does not hold."""
        if self.copies == why:
            self.copies = ""

    def cut(self, reason: str) -> None:
        """Writes what is left; the file stays `.part`."""
        if self.state in ("opening", "open") and self._ferry is not None:
            self.state = "cutting"
            self._aborted = True
            self._cut_reason = reason
            self._ferry.end()
        else:
            self.abort(reason)

    def close(self) -> None:
        """Lets the thread end; what is written stays as `.part`."""
        if not self.closed and self.state == "failed":
            self._aborted = True
        super().close()

    # -- on the ferry's thread

    def _write(self) -> None:
        assert self._ferry is not None
        fd = self._file.open()
        try:
            if not self._file.wait(lambda: self.closed):
                return
            self.engine.post(self.opened)
            if self._how.plain or not stat.S_ISREG(os.fstat(fd).st_mode):
                self._carry(self._ferry, fd)
            else:
                self._pour(self._ferry)
            if not self._aborted and not self._sealed:
                self._file.seal(self.sidecar_line)
        finally:
            self._file.close()

    def _carry(self, ferry: Ferry, fd: int) -> None:
        """All of it in the C core, but for a file that was moved away meanwhile."""
        while True:
            ferry.c.ahead, ferry.c.reserved = self._file.ahead, 0
            try:
                if ferry.carry(fd, copy=self._file.copies):
                    return
            finally:
                self._file.trim(ferry.c.reserved)
            self._reopen_asked = False
            fd = self._file.reopen()

    def _pour(self, ferry: Ferry) -> None:
        """Load by load, with a look at the clock between: for files that rotate, sync or are direct."""
        while True:
            taken = ferry.wait_until(None if self._sealed else self._file.next_look())
            if taken is not None and not taken[1]:
                return
            if self._reopen_asked:
                self._reopen_asked = False
                self._file.reopen()
            if not self._sealed and self._file.due():
                self._end_file()
            if taken is None:
                continue
            pipe, load = taken
            while load:
                self._begin_file()
                before = self._file.written
                try:
                    self._file.take(pipe, load)
                finally:
                    count = self._file.written - before
                    load -= count
                    ferry.c.moved += count
                ferry.c.method = core.COPY if self._file.copies else core.SPLICE
                if self._file.full():
                    self._end_file()
            ferry.give_back()

    def _end_file(self) -> None:
        """The file is whole; the next one begins with the next byte, so that none is empty."""
        self._file.seal("")
        self._file.close()
        self._sealed = True

    def _begin_file(self) -> None:
        if self._sealed:
            self._file = WrittenFile(Path(self._name()), self._how)
            self._sealed = False
            self._file.open()

    def reopen(self) -> None:
        """The file was moved away (log rotation): what comes from now on goes to a new one of its name."""
        if self._ferry is not None and (self._how.append or self._how.in_place):
            self._reopen_asked = True
            self._ferry.nudge()

    # -- on the engine's thread again

    def _written(self, _result: object, failed: BaseException | None) -> None:
        if failed is None:
            if self._cut_reason:
                self.fail(self.error("ending", 0, reason=self._cut_reason))
            elif not self._aborted:
                self.finished()
            return
        if isinstance(failed, OSError):
            text = failed.strerror if failed.errno in (errno.EBUSY, errno.EEXIST) else ""
            self.fail(self.error(self._file.doing, failed.errno or 0, reason=text or ""))
        else:
            self.fail(self.error("writing", 0, reason=f"{type(failed).__name__}: {failed}"))
