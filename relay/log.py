"""A log: a row of append-only segments in the page cache, with a cursor for each reader.

Facts (man 2 splice, 2 sendfile, 2 fallocate, 2 memfd_create; measured, see docs/kernel-facts.md):
- sendfile lends page-cache pages to the socket: what is in flight points at them. Punching, partly truncating or
  overwriting a segment changes those bytes; unlinking it whole does not.
- A write that returned is in the page cache and survives SIGKILL of the writer (not a power cut, unless synced).
- A store to a MAP_SHARED page survives SIGKILL as well, and costs no system call.

What this means here: a segment is written once, at its end, and unlinked when every cursor has passed it. Its
name is the position of its first byte, its size says how much was written, so a log needs no index and opens in a
time that does not grow with its bytes. A byte stream has no frames: whatever of the last write reached the file
is a whole prefix of it, and a torn tail heals by itself. A reader's position is a mapped word on disk.

    directory/
      lock                          held by the one relay that uses the directory
      ROUTE.SINK.ID/                one log
        00000000000000000000        segments by the position of their first byte
        00000000000016777216
        cursor                      acknowledged position, and where the stream ended
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from relay.errors import KernelError, SinkError
from relay.kernel import core

SEGMENT = 16 << 20  # bytes after which the next segment begins
RESERVE = 16 << 20  # bytes left free on the filesystem: a log must not be what fills a disk

_NAME = re.compile(r"[0-9]{20}")
_MAGIC = b"relaylog"
_CURSOR = struct.Struct("<8sQQ")  # magic, acknowledged position, end of the stream + 1 (0: it goes on)


class _Segment:
    """One file of the row. `fd` is -1 while nobody needs it open (disk only)."""

    __slots__ = ("fd", "path", "size", "start")

    def __init__(self, start: int, path: Path | None, fd: int = -1, size: int = 0) -> None:
        self.start = start
        self.path = path
        self.fd = fd
        self.size = size

    @property
    def end(self) -> int:
        return self.start + self.size


class Cursor:
    """Where one reader stands: everything before `position` is done with. Made by Log.cursor."""

    __slots__ = ("_log", "position")

    def __init__(self, log: Log, position: int) -> None:
        self._log = log
        self.position = position

    def advance(self, position: int) -> None:
        """Everything before `position` is done with; segments that every cursor has passed go."""
        if position > self.position:
            self.position = position
            self._log._passed(self)

    def close(self) -> None:
        """The reader is gone; it holds no segment any more."""
        self._log._leave(self)


class Log:
    """Owns its segments, and on disk its directory. One writer; readers have cursors.

    Written by one thread, read by another: what both see is under a lock, and the bytes themselves never change.
    With `directory` None the segments are memfds and go with the process. `largest` bounds the bytes kept (0: no
    bound); `room` says how much may be written now. Raises SinkError when the directory cannot be used.
    """

    def __init__(self, directory: Path | None = None, *, largest: int = 0, segment: int = SEGMENT) -> None:
        self.directory = directory
        self.largest = largest
        self._segment_size = segment
        self._lock = threading.Lock()
        self._space = threading.Condition(self._lock)
        self._segments: list[_Segment] = []
        self._cursors: list[Cursor] = []
        self._map: mmap.mmap | None = None
        self.closed = threading.Event()  # nothing of it is open any more
        self._closing = False
        self._word: core.Struct = core.ffi.new("int64_t *")
        self.on_append: Callable[[], None] = lambda: None
        if directory is not None:
            self._open_directory(directory)
        if not self._segments:
            self._begin_segment(0)

    # -- opening

    def _open_directory(self, directory: Path) -> None:
        try:
            directory.mkdir(exist_ok=True)
            names = sorted(path.name for path in directory.iterdir() if _NAME.fullmatch(path.name))
            for name in names:
                path = directory / name
                self._segments.append(_Segment(int(name), path, size=path.stat().st_size))
            fd = os.open(directory / "cursor", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SinkError(
                str(directory), "opening the log in", error.errno or 0, "check the spill directory"
            ) from error
        try:
            if os.fstat(fd).st_size < mmap.PAGESIZE:
                os.ftruncate(fd, mmap.PAGESIZE)
            self._map = mmap.mmap(fd, mmap.PAGESIZE)
        finally:
            os.close(fd)
        magic, _acknowledged, _end = _CURSOR.unpack_from(self._map)
        if magic != _MAGIC:
            _CURSOR.pack_into(self._map, 0, _MAGIC, self._segments[0].start if self._segments else 0, 0)
        # the buffer is released before the map is closed
        self._page = core.ffi.from_buffer("char[]", self._map, require_writable=True)
        self._word = core.ffi.cast("int64_t *", self._page + 8)
        for before, after in zip(self._segments, self._segments[1:], strict=False):
            if before.end != after.start:
                raise SinkError(
                    str(directory),
                    "opening the log in",
                    0,
                    "a segment is missing or was changed by somebody else: move the directory away",
                    reason=f"segment {before.start} ends at {before.end}, the next begins at {after.start}",
                )

    def _begin_segment(self, start: int) -> None:
        if self.directory is None:
            fd = os.memfd_create("relay-log", os.MFD_CLOEXEC)
            self._segments.append(_Segment(start, None, fd))
            return
        path = self.directory / f"{start:020d}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._segments.append(_Segment(start, path, fd))

    # -- what it holds

    @property
    def start(self) -> int:
        """The position of the first byte that is still kept."""
        return self._segments[0].start

    @property
    def end(self) -> int:
        """The position after the last byte written."""
        return self._segments[-1].end

    @property
    def acknowledged(self) -> int:
        """Up to where its reader had everything, when it was last noted; the start for a log in memory."""
        if self._map is None:
            return self.start
        return int(self._word[0])

    @property
    def ended_at(self) -> int | None:
        """Where the stream ended, once it has; None while more may come."""
        if self._map is None:
            return None
        end = int(_CURSOR.unpack_from(self._map)[2])
        return end - 1 if end else None

    def backlog(self) -> int:
        """Bytes written that the slowest reader has not done with."""
        with self._lock:
            slowest = min((cursor.position for cursor in self._cursors), default=self.end)
            return self.end - slowest

    # -- writing

    def tail(self) -> int:
        """The descriptor to append to, borrowed until the next `appended`; its offset is at the end."""
        segment = self._segments[-1]
        if segment.fd < 0:
            assert segment.path is not None
            segment.fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
            os.lseek(segment.fd, 0, os.SEEK_END)
        return segment.fd

    def appended(self, count: int) -> None:
        """`count` bytes were written to `tail`: readers may have them; a full segment is followed by the next."""
        with self._lock:
            segment = self._segments[-1]
            segment.size += count
            if segment.size >= self._segment_size:
                self._begin_segment(segment.end)
                if segment.path is not None:  # whoever reads it opens it; a memfd lives by its descriptor
                    os.close(segment.fd)
                    segment.fd = -1
        self.on_append()

    def room(self) -> int:
        """Bytes that may be written now: what `largest` and the free space of the filesystem leave."""
        left = 1 << 62
        if self.largest:
            left = self.largest - self.backlog()
        if self.directory is not None:
            space = os.statvfs(self.directory)
            left = min(left, space.f_bavail * space.f_frsize - RESERVE)
        return max(left, 0)

    def wait_for_room(self, count: int, stopped: Callable[[], bool], timeout: float = 0.2) -> bool:
        """Blocks the writer until `count` bytes fit, or, if the log is empty, whatever comes; False when stopped.

        Free space that others make is noticed after `timeout` seconds at the latest.
        """
        while not stopped():
            if self.room() >= count or (self.largest and not self.backlog() and self.directory is None):
                return True
            with self._space:
                self._space.wait(timeout)
        return False

    def end_stream(self) -> None:
        """Nothing more will be appended: what is here is the whole stream."""
        if self._map is not None:
            acknowledged = self.acknowledged
            _CURSOR.pack_into(self._map, 0, _MAGIC, acknowledged, self.end + 1)

    def wake_writer(self) -> None:
        """Lets a writer that waits for room look again."""
        with self._space:
            self._space.notify_all()

    # -- reading

    def cursor(self, position: int | None = None) -> Cursor:
        """A reader at `position` (None: where the last one had acknowledged), moved into what is kept."""
        with self._lock:
            wanted = self.acknowledged if position is None else position
            cursor = Cursor(self, min(max(wanted, self.start), self.end))
            self._cursors.append(cursor)
            return cursor

    def at(self, position: int) -> tuple[int, int, int]:
        """Where the bytes from `position` on are: a descriptor of the reader's own, the offset in it, and how many.

        0 bytes means that nothing is there yet. The caller closes the descriptor.
        """
        with self._lock:
            index = bisect_right(self._segments, position, key=lambda segment: segment.start) - 1
            if index < 0:
                raise KernelError(f"position {position} of a log is gone; it begins at {self.start}")
            segment = self._segments[index]
            if position == segment.end and index + 1 < len(self._segments):
                segment = self._segments[index + 1]
            if segment.fd >= 0:
                fd = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDONLY | os.O_CLOEXEC)
            else:
                assert segment.path is not None
                fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
            return fd, position - segment.start, segment.end - position

    def acknowledged_word(self) -> core.Struct:
        """An `int64_t *` for the pump to note the acknowledged position in: on disk a word of the mapped page, which
        survives SIGKILL. Valid until the log is closed."""
        return self._word

    def _passed(self, _cursor: Cursor) -> None:
        with self._space:
            slowest = min(cursor.position for cursor in self._cursors)
            while len(self._segments) > 1 and self._segments[0].end <= slowest:
                self._remove(self._segments.pop(0))
            self._space.notify_all()

    def _leave(self, cursor: Cursor) -> None:
        with self._space:
            if cursor in self._cursors:
                self._cursors.remove(cursor)
            self._space.notify_all()

    def _remove(self, segment: _Segment) -> None:
        if segment.fd >= 0:
            os.close(segment.fd)
            segment.fd = -1
        if segment.path is not None:
            segment.path.unlink(missing_ok=True)

    # -- ending

    def close(self, *, keep: bool = False) -> None:
        """Closes every descriptor; unless `keep`, a log on disk is removed with its directory. Safe to call again."""
        if self._closing:
            return
        self._closing = True
        try:
            self._close(keep=keep)
        finally:
            self.closed.set()

    def _close(self, *, keep: bool) -> None:
        with self._space:
            for segment in self._segments:
                if segment.fd >= 0:
                    os.close(segment.fd)
                    segment.fd = -1
            self._space.notify_all()
        if self._map is not None:
            self._word = core.ffi.new("int64_t *", self._word[0])
            core.ffi.release(self._page)
            self._map.close()
            self._map = None
        if self.directory is not None and not keep:
            for segment in self._segments:
                if segment.path is not None:
                    segment.path.unlink(missing_ok=True)
            (self.directory / "cursor").unlink(missing_ok=True)
            try:
                self.directory.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise


class SpillDirectory:
    """A directory that holds logs, locked by one relay; owns the lock.

    Created if its parent exists. Raises SinkError when it cannot be made, or another relay holds it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._fd = -1
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            taken = isinstance(error, BlockingIOError)
            raise SinkError(
                path,
                "locking the spill directory",
                error.errno or 0,
                "give each relay a directory of its own"
                if taken
                else "its parent must exist and be writable",
                reason="another relay uses it" if taken else "",
            ) from error

    def found(self) -> list[str]:
        """The names of the logs in it."""
        return sorted(
            entry.name
            for entry in os.scandir(self.path)
            if entry.is_dir() and (Path(entry.path) / "cursor").exists()
        )

    def log(self, name: str, *, largest: int = 0) -> Log:
        """The log of that name, opened where it was left or made."""
        return Log(self.path / name, largest=largest)

    def close(self) -> None:
        """Gives the lock up. Safe to call again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
