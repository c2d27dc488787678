"""The row of a log: append-only segments in the page cache, with a cursor for each reader.

Facts (man 2 splice, 2 sendfile, 2 fallocate, 2 memfd_create; measured, see docs/kernel-facts.md):
- sendfile lends page-cache pages to the socket: what is in flight points at them. Punching, partly truncating or
  overwriting a segment changes those bytes; unlinking it whole does not.
- A write that returned is in the page cache and survives SIGKILL of the writer (not a power cut, unless synced).
- A store to a MAP_SHARED page survives SIGKILL as well, and costs no system call.
- A dup(2) shares the file offset; sendfile and splice with an offset of their own do not look at it.

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

import contextlib
import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from relay.errors import KernelError, SinkError
from relay.kernel import core
from relay.log.page import Page, damaged
from relay.log.segment import SEGMENT_NAME, Segment, segment_size

RESERVE = 16 << 20  # bytes left free on the filesystem: a log must not be what fills a disk

FULL = (errno.ENOSPC, errno.EDQUOT)

TRIAL = "trial"  # a file in a log's directory, there for the moment of a trial


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
            self._log._passed()

    def close(self) -> None:
        """The reader is gone; it holds no segment any more. Safe to call again."""
        self._log._leave(self)


class Log:
    """Owns its segments, and on disk its directory. One writer; readers have cursors.

    Written by one thread, read by another: what both see is under a lock, and the bytes themselves never change.
    With `directory` None the segments are memfds and go with the process. `largest` bounds the bytes kept, those
    of passed segments' rest included (0: no bound). Raises SinkError when the directory cannot be used.
    """

    def __init__(self, directory: Path | None = None, *, largest: int = 0, segment: int = 0) -> None:
        self.directory = directory
        self.largest = largest
        self._segment_size = segment or segment_size(largest, in_memory=directory is None)
        self._lock = threading.Lock()
        self._space = threading.Condition(self._lock)
        self._segments: list[Segment] = []
        self._cursors: list[Cursor] = []
        self._page = Page()
        self.closed = threading.Event()  # nothing of it is open any more
        self._closed = False
        self._was_full = False
        self.on_append: Callable[[], None] = lambda: None
        try:
            if directory is not None:
                self._open_directory(directory)
            if not self._segments or self._segments[-1].size >= self._segment_size:
                self._begin_segment(self._segments[-1].end if self._segments else self.acknowledged)
        except OSError as error:
            self._let_go()
            where = str(directory) if directory else "a log in memory"
            raise SinkError(
                where,
                "opening the log in",
                error.errno or 0,
                "check the spill directory" if directory else "",
            ) from error
        except SinkError:
            self._let_go()
            raise

    # -- opening

    def _open_directory(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        with os.scandir(directory) as entries:
            names = sorted(
                entry.name for entry in entries if SEGMENT_NAME.fullmatch(entry.name) and entry.is_file()
            )
        for name in names:
            path = directory / name
            self._segments.append(Segment(int(name), path, size=path.stat().st_size))
        first = self._segments[0].start if self._segments else 0
        self._page.open(directory, first)
        for before, after in zip(self._segments, self._segments[1:], strict=False):
            if before.end != after.start:
                raise damaged(
                    directory,
                    f"segment {before.start} ends at {before.end}, the next begins at {after.start}",
                )
        if self._segments and self.acknowledged < first:
            raise damaged(
                directory, f"its reader had {self.acknowledged} bytes, the first segment begins at {first}"
            )

    def _begin_segment(self, start: int) -> None:
        if self.directory is None:
            fd = os.memfd_create("relay-log", os.MFD_CLOEXEC)
            self._segments.append(Segment(start, None, fd))
            return
        path = self.directory / f"{start:020d}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self._segments:  # whoever reads it opens it
            self._segments[-1].close()
        self._segments.append(Segment(start, path, fd))

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
        """Up to where its reader had everything, when it was last noted."""
        return int(self._page.word[0])

    @property
    def ended_at(self) -> int | None:
        """Where the stream ended, once it has; None while more may come."""
        return self._page.ended_at

    def backlog(self) -> int:
        """Bytes written that the slowest reader has not done with."""
        with self._lock:
            return self._backlog()

    def _backlog(self) -> int:
        end = self._segments[-1].end
        return end - min((cursor.position for cursor in self._cursors), default=end)

    # -- writing

    def tail(self) -> int:
        """The descriptor to append to, borrowed until the next `room`; its offset is at the end."""
        segment = self._segments[-1]
        if segment.fd < 0:
            assert segment.path is not None
            segment.fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
            os.lseek(segment.fd, 0, os.SEEK_END)
        return segment.fd

    def appended(self, count: int) -> None:
        """`count` bytes were written to `tail`: readers may have them."""
        with self._lock:
            self._segments[-1].size += count
        self.on_append()

    def room(self) -> int:
        """Bytes that may be written to `tail` now: what the segment, `largest` and the filesystem leave.

        Begins the next segment when the last is full. Raises OSError when that fails; no space left is no room.
        """
        with self._lock:
            return self._room()

    def _room(self, *, bounded: bool = True) -> int:
        if self._segments[-1].size >= self._segment_size:
            try:
                self._begin_segment(self._segments[-1].end)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                return 0
            self._trim()
        left = self._segment_size - self._segments[-1].size
        if self.largest and bounded:
            left = min(left, self.largest - (self._segments[-1].end - self._segments[0].start))
        if self.directory is not None:
            left = min(left, self._free())
            if left <= 0 and self._segments[-1].size and self._cursors and not self._backlog():
                # nobody needs the last segment any more, and nothing else would ever make room
                with contextlib.suppress(OSError):
                    self._begin_segment(self._segments[-1].end)
                    self._trim()
                    self.on_append()  # who reads it lets go of it
                    left = min(self._segment_size, self._free())
        return max(left, 0)

    def _free(self) -> int:
        """Bytes of the filesystem that are ours to take."""
        space = os.statvfs(self.directory or ".")
        return space.f_bavail * space.f_frsize - RESERVE

    def wait_for_room(self, stopped: Callable[[], bool], *, drain: bool = False, timeout: float = 0.2) -> int:
        """Blocks the writer until something fits; how many bytes do.

        Once stopped it waits no more: what the writer has in its hands may go beyond `largest`, as far as the
        filesystem lets it (0: not at all). `drain`: once full, it waits until readers have had all. Free space that
        others make is noticed after `timeout` seconds at the latest.
        """
        with self._space:
            while True:
                room = self._room()
                if room and not (self._was_full and drain and self._backlog() and not stopped()):
                    self._was_full = False
                    return room
                self._was_full = True
                if stopped():
                    return self._room(bounded=False)
                self._space.wait(timeout)

    def refused(self, timeout: float = 0.2) -> None:
        """The filesystem had no room for what `room` allowed: waits a moment, or until somebody wakes the writer."""
        with self._space:
            self._was_full = True
            self._space.wait(timeout)

    def try_disk(self, pause: float = 0.2) -> bool:
        """Whether a log on disk that could not be written can be again: tries it in a file that goes at once, where the
        next bytes will lie and their segment ends. A full disk is none that fails. Blocks; `refused` when it fails."""
        assert self.directory is not None
        with self._lock:
            start = self._segments[-1].size % self._segment_size
        try:
            fd = os.open(self.directory / TRIAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.unlink(self.directory / TRIAL)  # noqa: PTH108 - beside the open
                for at in (start, self._segment_size - 1):
                    os.pwrite(fd, b"\0", at)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in FULL:
                return True
            self.refused(pause)
            return False
        return True

    def end_stream(self) -> None:
        """Nothing more will be appended: what is here is the whole stream."""
        self._page.note_end(self.end)

    def go_on(self) -> None:
        """A log whose stream had ended gets another's bytes behind them."""
        self._page.note_end(None)

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

    def extent(self, position: int) -> tuple[int, int]:
        """Where the segment with the byte at `position` begins, and how many bytes it has from there on.

        0 bytes means that nothing is there yet. Raises KernelError when they are gone.
        """
        with self._lock:
            segment = self._at(position)
            return segment.start, segment.end - position

    def open_segment(self, start: int) -> int:
        """A descriptor, the caller's own, of the segment that begins at `start`; to be read with offsets."""
        with self._lock:
            segment = self._at(start)
            if segment.fd >= 0:
                return os.dup(segment.fd)
            assert segment.path is not None
            return os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)

    def _at(self, position: int) -> Segment:
        index = bisect_right(self._segments, position, key=lambda segment: segment.start) - 1
        if index < 0:
            raise KernelError(f"position {position} of a log is gone; it begins at {self.start}")
        return self._segments[index]

    def acknowledged_word(self) -> core.Struct:
        """An `int64_t *` for the pump to note the acknowledged position in: on disk a word of the mapped page, which
        survives SIGKILL. Valid until the log is closed."""
        return self._page.word

    def _passed(self) -> None:
        with self._space:
            self._trim()
            self._space.notify_all()

    def _trim(self) -> None:
        """Segments that every cursor has passed go, whole; the last one is still written."""
        if not self._cursors:
            return
        slowest = min(cursor.position for cursor in self._cursors)
        while len(self._segments) > 1 and self._segments[0].end <= slowest:
            segment = self._segments.pop(0)
            segment.close()
            segment.remove()

    def _leave(self, cursor: Cursor) -> None:
        with self._space:
            if cursor in self._cursors:
                self._cursors.remove(cursor)
            self._space.notify_all()

    # -- ending

    def _let_go(self) -> None:
        for segment in self._segments:
            segment.close()
        self._page.close()

    def close(self, *, keep: bool = False) -> None:
        """Closes every descriptor; unless `keep`, a log on disk is removed with its directory. Safe to call again."""
        with self._space:
            if self._closed:
                return
            self._closed = True
            self._let_go()
            self._space.notify_all()
        try:
            if self.directory is not None and not keep:
                self._remove(self.directory)
        finally:
            self.closed.set()

    def _remove(self, directory: Path) -> None:
        for segment in self._segments:
            segment.remove()
        (directory / TRIAL).unlink(missing_ok=True)
        # last: a relay that is killed before that leaves a log of which nothing is left
        (directory / "cursor").unlink(missing_ok=True)
        try:
            directory.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # somebody else's files stay
                raise
