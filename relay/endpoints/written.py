"""One file being written: how it gets its bytes, and how it gets its name.

Facts (man 2 open, 2 rename, 2 link, 2 flock, 2 fsync):
- rename(2) replaces atomically; link(2) refuses to replace.
- splice to a file opened with O_APPEND is EINVAL.
- O_DIRECT wants addresses, offsets and lengths aligned to the device's blocks: what comes out of sockets is not.
- A name is on disk for sure when its directory was synced as well.
- ext4 starts to write a file back when it is closed after it was cut to nothing, even if it was empty already.
- flock(2) locks belong to the open file: two opens of one file exclude each other within one process, too.

What this means here: a file is written as `.part` and renamed when whole; a path with placeholders never replaces
what exists. With O_DIRECT, bytes are gathered in an aligned buffer; a tail that must not wait for more goes through
the page cache, and is written over when the buffer is full. A file written in place has one writer: the next one
waits. All of this may wait for the disk and runs on a ferry's thread.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relay.endpoints.line import Place, Writer
from relay.kernel import core
from relay.kernel.pipe import Pipe

log = logging.getLogger("relay.endpoints")

MOST_SUFFIXES = 10000
PIECE = 256 * 1024
DIRECT_PIECE = 1 << 20
RESERVED = 4 << 20  # bytes; larger steps gain little, and this much too much is on disk while a file grows
DIRECT_WAIT = 1.0  # seconds that gathered bytes wait for more before they go through the page cache


@dataclass(frozen=True)
class Writing:
    """How a file is written. `in_place` writes to the path itself instead of a `.part` beside it;
    `keep` never replaces what exists (a number is added to the name); `sidecar` names a checksum algorithm.
    `rotate_size` (bytes), `rotate_every` and `fsync_every` (seconds) are 0 for never. `writer` is who appends for
    streams that take turns."""

    append: bool = False
    writer: Writer | None = None
    in_place: bool = False
    keep: bool = False
    fsync_at_close: bool = False
    fsync_every: float = 0.0
    rotate_size: int = 0
    rotate_every: float = 0.0
    direct: bool = False
    copy: bool = False
    sidecar: str = ""
    capacity: int = 1 << 20

    @property
    def plain(self) -> bool:
        """Whether nothing needs a look between two loads."""
        return not (self.rotate_size or self.rotate_every or self.fsync_every or self.direct)


class WrittenFile:
    """One file from its first byte to its name; owns the descriptor. Used on one thread."""

    def __init__(self, path: Path, how: Writing) -> None:
        self._how = how
        self._final = path
        self._part: Path | None = None
        self._fd = -1
        self._place: Place | None = None
        self.written = 0
        self._dirty = False
        self._began = self._synced = 0.0
        self._block: mmap.mmap | None = None
        self._block_at = 0  # the offset in the file of the gathered block
        self._gathered = 0
        self._flushed = 0  # of the gathered bytes, how many are in the file already
        self.copies = False
        self.ahead = 0  # how far blocks are to be reserved ahead of what is written
        self.doing = "opening"

    @property
    def shown(self) -> str:
        """The file's name, or its `.part` while it is not whole."""
        return str(self._part) if self._part is not None else str(self._final)

    @property
    def unwritten(self) -> int:
        """Of the bytes taken, how many wait in memory for a full block."""
        return self._gathered - self._flushed

    def open(self) -> int:
        """Opens what will be written: the path itself, or a `.part` that no other writer has. Raises OSError."""
        self._fd = self._opened()
        self._take_place()
        if self._how.in_place and not self._how.append and stat.S_ISREG(os.fstat(self._fd).st_mode):
            self._have_alone(self._fd)
            _empty(self._fd)
        self._began = self._synced = time.monotonic()
        self.copies = self._how.copy or self._how.append
        self._go_direct()
        # of a file that others may append to, nothing is cut off
        if self._part is not None and core.lib.relay_reserving_pays(self._fd):
            self.ahead = RESERVED
        self.doing = "writing"
        return self._fd

    def _take_place(self) -> None:
        before = self._place
        self._place = Place(self._fd, self._how.writer) if self._how.append and self._how.writer else None
        if before is not None:
            before.leave()

    def wait(self, given_up: Callable[[], bool]) -> bool:
        """Of streams that take turns: waits until the one before has closed the file; False when `given_up` first."""
        return self._place is None or self._place.wait(str(self._final), given_up)

    def _have_alone(self, fd: int) -> None:
        """Waits until no other stream writes the file; where files cannot be locked it goes ahead."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another stream writes it; this one waits until it has ended", self._final)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("%s: it cannot be locked (%s)", self._final, error.strerror)

    def _opened(self) -> int:
        how = self._how
        path = Path(os.path.realpath(self._final)) if self._final.is_symlink() else self._final
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            kind = 0
        if not path.parent.exists():
            try:
                path.parent.mkdir()
            except FileExistsError:
                pass  # another stream made it just now
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY
        if how.append:
            return os.open(path, flags | os.O_CREAT | os.O_APPEND, 0o666)
        if how.in_place or (kind and not stat.S_ISREG(kind)):
            return os.open(path, flags | os.O_CREAT, 0o666)
        if how.keep:
            return self._reserve(path, flags)
        self._final = path
        part = path.with_name(path.name + ".part")
        fd = os.open(part, flags | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _empty(fd)
        except BlockingIOError:
            os.close(fd)
            raise OSError(errno.EBUSY, f"another stream is writing {part}") from None
        self._part = part  # only now: a part that could not be opened is not what this stream left behind
        return fd

    def _reserve(self, path: Path, flags: int) -> int:
        """The first free name of `path`, `-2` added before the suffix, `-3` and so on."""
        for count in range(1, MOST_SUFFIXES):
            name = path if count == 1 else path.with_name(f"{path.stem}-{count}{path.suffix}")
            if name.exists():
                continue
            part = name.with_name(name.name + ".part")
            try:
                fd = os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                continue
            self._final, self._part = name, part
            return fd
        raise OSError(errno.EEXIST, f"{MOST_SUFFIXES} files of that name exist already")

    def _give_name(self, sidecar_line: str) -> None:
        """Renames the whole file, and writes its sidecar first so that the two appear together."""
        if self._part is None:
            self._write_sidecar(self._final, sidecar_line)
            return
        if self._how.keep:
            self._link_free_name(sidecar_line)
        else:
            self._write_sidecar(self._final, sidecar_line)
            self._part.rename(self._final)
        self._part = None

    def _link_free_name(self, sidecar_line: str) -> None:
        """Takes a name that nobody took meanwhile: link(2) refuses to replace."""
        assert self._part is not None
        base = self._final
        for count in range(1, MOST_SUFFIXES):
            name = base if count == 1 else base.with_name(f"{base.stem}-{count}{base.suffix}")
            try:
                os.link(self._part, name)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if name.exists():
                    continue
                self._part.rename(name)  # a filesystem without hard links
            else:
                self._part.unlink()
            self._final = name
            self._write_sidecar(name, sidecar_line)
            return
        raise OSError(errno.EEXIST, f"{MOST_SUFFIXES} files of that name exist already")

    def _write_sidecar(self, name: Path, line: str) -> None:
        if not self._how.sidecar or not line:
            return
        beside = name.with_name(f"{name.name}.{self._how.sidecar}")
        beside.write_text(line.format(name=name.name))

    def _go_direct(self) -> None:
        """O_DIRECT where it is asked for and the file takes it; elsewhere the page cache does, which is said."""
        self._block = None
        if not self._how.direct or not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return
        at = os.lseek(self._fd, 0, os.SEEK_CUR)
        refused = ""
        if at % DIRECT_PIECE:
            refused = f"it goes on at {at}, which is no multiple of {DIRECT_PIECE}"
        else:
            try:
                self._set_direct(on=True)
            except OSError as error:
                refused = f"O_DIRECT is refused: {error.strerror}"
        if refused:
            log.warning("%s: it is written through the page cache (%s)", self.shown, refused)
            return
        self._block = mmap.mmap(-1, DIRECT_PIECE)
        self._block_at, self._gathered, self._flushed = at, 0, 0
        self.copies = True

    def _set_direct(self, *, on: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def reopen(self) -> int:
        """Opens the path anew without cutting it, if the file there is another one by now: it was moved away.

        Returns the descriptor to write to.

        Where that fails the file at hand is written on, which is said.
        """
        try:
            there = self._final.stat() if self._final.exists() else None
            here = os.fstat(self._fd)
            if there is not None and (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return self._fd
            fresh = self._opened()
            if not self._how.append:
                self._have_alone(fresh)
                os.lseek(fresh, 0, os.SEEK_END)
        except OSError as error:
            log.warning(
                "opening %s anew: %s; the file that was moved away is written on", self._final, error.strerror
            )
            return self._fd
        self._end_block()
        self._sync(asked=bool(self._how.fsync_at_close or self._how.fsync_every))
        os.close(self._fd)
        self._fd = fresh
        self._take_place()
        self._go_direct()
        return fresh

    def take(self, pipe: Pipe, load: int) -> None:
        """Writes up to `load` bytes out of `pipe`, not beyond where the file must rotate; `written` says how many.

        Raises OSError with what the write answered; what was written stays.
        """
        if self._how.rotate_size:
            load = min(load, self._how.rotate_size - self.written)
        self._dirty = True
        if self._block is not None:
            self._gather(pipe, load, self._block)
        elif self.copies:
            view = memoryview(os.read(pipe.read_fd, min(load, PIECE)))
            while view:
                count = os.write(self._fd, view)
                self.written += count
                view = view[count:]
        else:
            try:
                self.written += pipe.splice_to(self._fd, load)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                self.copies = True
                self.take(pipe, load)

    def _gather(self, pipe: Pipe, load: int, block: mmap.mmap) -> None:
        with memoryview(block) as whole, whole[self._gathered : self._gathered + load] as free:
            count = os.readv(pipe.read_fd, [free])
        self._gathered += count
        self.written += count
        if self._gathered < DIRECT_PIECE:
            return
        with memoryview(block) as view:
            self._flushed = 0
            while self._flushed < DIRECT_PIECE:
                self._flushed += os.pwrite(self._fd, view[self._flushed :], self._block_at + self._flushed)
        self._block_at += DIRECT_PIECE
        self._gathered = self._flushed = 0

    def _flush_gathered(self) -> None:
        """Gathered bytes that are no full block go through the page cache; they stay in the block as well."""
        if self._block is None or not self.unwritten:
            return
        self._set_direct(on=False)
        try:
            with memoryview(self._block) as view:
                while self.unwritten:
                    at = self._block_at + self._flushed
                    self._flushed += os.pwrite(self._fd, view[self._flushed : self._gathered], at)
        finally:
            self._set_direct(on=True)

    def _end_block(self) -> None:
        self._flush_gathered()
        self._gathered = self._flushed = 0

    def next_look(self) -> float | None:
        """Seconds until the file wants attention without new bytes; None: it never does."""
        now = time.monotonic()
        waits = []
        if self._how.rotate_every and self.written:
            waits.append(self._began + self._how.rotate_every - now)
        if self._how.fsync_every and self._dirty:
            waits.append(self._synced + self._how.fsync_every - now)
        elif self.unwritten:
            waits.append(self._synced + DIRECT_WAIT - now)
        return max(0.0, min(waits)) if waits else None

    def due(self) -> bool:
        """Syncs if it is time to; whether it is time for the next file."""
        now = time.monotonic()
        if self._dirty and now - self._synced >= (self._how.fsync_every or DIRECT_WAIT):
            self._flush_gathered()
            self._sync(asked=bool(self._how.fsync_every))
            self._synced = now
        return bool(self._how.rotate_every and self.written and now - self._began >= self._how.rotate_every)

    def full(self) -> bool:
        """Whether the file has the size at which it rotates."""
        return bool(self._how.rotate_size) and self.written >= self._how.rotate_size

    def trim(self, reserved: int) -> None:
        """Gives back the blocks behind the end of the file, up to `reserved`, that were never written."""
        size = os.fstat(self._fd).st_size
        if reserved <= size:
            return
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            log.debug("%s: blocks behind its end stay reserved (%s)", self.shown, error.strerror)

    def _sync(self, *, asked: bool) -> None:
        self._dirty = False
        if asked and stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.doing = "syncing"
            os.fsync(self._fd)
            self.doing = "writing"

    def seal(self, sidecar_line: str) -> None:
        """The file is whole: synced if asked, then it gets its name."""
        asked = bool(self._how.fsync_at_close or self._how.fsync_every)
        self._end_block()
        self._sync(asked=asked)
        named = self._part is not None
        self.doing = "naming"
        self._give_name(sidecar_line)
        if asked and named:
            self.doing = "syncing"
            folder = os.open(self._final.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Closes the descriptor; a file that was not sealed stays `.part`, with all that came. Safe to call again."""
        if self._fd >= 0:
            try:
                self._flush_gathered()
            finally:
                os.close(self._fd)
                self._fd = -1
                if self._place is not None:
                    self._place.leave()


def _empty(fd: int) -> None:
    """Cuts the file to nothing, unless it is empty: ext4 writes back at close whatever was cut (auto_da_alloc)."""
    if os.fstat(fd).st_size:
        os.ftruncate(fd, 0)
