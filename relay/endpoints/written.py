"""One file being written: how it gets its bytes, and how it gets its name.

Facts (man 2 open, 2 rename, 2 link, 2 flock, 2 fsync):
- rename(2) replaces atomically; link(2) refuses to replace.
- splice to a file opened with O_APPEND is EINVAL.
- O_DIRECT wants addresses, offsets and lengths aligned to the device's blocks: what comes out of sockets is not, so
  it is gathered in an aligned buffer, and the unaligned tail is written through the page cache.

What this means here: a file is written as `.part` and renamed when whole; a path with placeholders never replaces
what exists. All of this may wait for the disk and runs on a ferry's thread.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from relay.kernel.pipe import Pipe

MOST_SUFFIXES = 10000
PIECE = 256 * 1024
DIRECT_PIECE = 1 << 20


@dataclass(frozen=True)
class Writing:
    """How a file is written. `in_place` writes to the path itself instead of a `.part` beside it;
    `keep` never replaces what exists (a number is added to the name); `sidecar` names a checksum algorithm.
    `rotate_size` (bytes), `rotate_every` and `fsync_every` (seconds) are 0 for never."""

    append: bool = False
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
        return not (
            self.append
            or self.in_place
            or self.rotate_size
            or self.rotate_every
            or self.fsync_every
            or self.direct
        )


class WrittenFile:
    """One file from its first byte to its name; owns the descriptor. Used on one thread."""

    def __init__(self, path: Path, how: Writing) -> None:
        self._how = how
        self._final = path
        self._part: Path | None = None
        self._fd = -1
        self._written = 0
        self._dirty = False
        self._began = self._synced = 0.0
        self._block: mmap.mmap | None = None
        self._gathered = 0
        self.copies = False
        self.why_not_direct = ""

    @property
    def shown(self) -> str:
        """The file's name, or its `.part` while it is not whole."""
        return str(self._part) if self._part is not None else str(self._final)

    def open(self) -> int:
        """Opens what will be written: the path itself, or a `.part` that no other writer has. Raises OSError."""
        self._fd = self._opened(os.O_TRUNC)
        self._written = 0
        self._began = self._synced = time.monotonic()
        self.copies = self._how.copy or self._how.append
        if self._how.direct and stat.S_ISREG(os.fstat(self._fd).st_mode):
            self._go_direct()
        return self._fd

    def _opened(self, truncate: int) -> int:
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
            return os.open(path, flags | os.O_CREAT | truncate, 0o666)
        if how.keep:
            return self._reserve(path, flags)
        self._final = path
        part = path.with_name(path.name + ".part")
        fd = os.open(part, flags | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
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
        """O_DIRECT where the filesystem knows it; elsewhere the page cache does."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            self.why_not_direct = f"O_DIRECT is refused here ({error.strerror})"
            return
        self._block = mmap.mmap(-1, DIRECT_PIECE)
        self._gathered = 0
        self.copies = True

    def reopen(self) -> None:
        """Opens the path anew without cutting it: for a file that was moved away by somebody else."""
        fresh = self._opened(0)
        if not self._how.append:
            os.lseek(fresh, 0, os.SEEK_END)
        os.close(self._fd)
        self._fd = fresh

    def take(self, pipe: Pipe, load: int) -> int:
        """Writes up to `load` bytes out of `pipe`, not beyond where the file must rotate; returns how many.

        Raises OSError with what the write answered; what was written stays.
        """
        if self._how.rotate_size:
            load = min(load, self._how.rotate_size - self._written)
        if self._block is not None:
            count = self._gather(pipe, load, self._block)
        elif self.copies:
            data = os.read(pipe.read_fd, min(load, PIECE))
            count = len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        else:
            try:
                count = pipe.splice_to(self._fd, load)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                self.copies = True
                return self.take(pipe, load)
        self._written += count
        self._dirty = True
        return count

    def _gather(self, pipe: Pipe, load: int, block: mmap.mmap) -> int:
        count = os.readv(pipe.read_fd, [memoryview(block)[self._gathered : self._gathered + load]])
        self._gathered += count
        if self._gathered == DIRECT_PIECE:
            view = memoryview(block)
            done = 0
            while done < DIRECT_PIECE:
                done += os.write(self._fd, view[done:])
            self._gathered = 0
        return count

    def _flush_gathered(self) -> None:
        """The unaligned tail goes through the page cache."""
        if self._block is None or not self._gathered:
            return
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        view = memoryview(self._block)[: self._gathered]
        while view:
            view = view[os.write(self._fd, view) :]
        self._gathered = 0

    def next_look(self) -> float | None:
        """Seconds until the file wants attention without new bytes; None: it never does."""
        now = time.monotonic()
        waits = []
        if self._how.rotate_every and self._written:
            waits.append(self._began + self._how.rotate_every - now)
        if self._how.fsync_every and self._dirty:
            waits.append(self._synced + self._how.fsync_every - now)
        return max(0.0, min(waits)) if waits else None

    def due(self) -> bool:
        """Syncs if it is time to; whether it is time for the next file."""
        now = time.monotonic()
        if self._how.fsync_every and self._dirty and now - self._synced >= self._how.fsync_every:
            os.fsync(self._fd)
            self._dirty = False
            self._synced = now
        return bool(self._how.rotate_every and self._written and now - self._began >= self._how.rotate_every)

    def full(self) -> bool:
        """Whether the file has the size at which it rotates."""
        return bool(self._how.rotate_size) and self._written >= self._how.rotate_size

    def seal(self, sidecar_line: str) -> None:
        """The file is whole: synced if asked, then it gets its name."""
        self._flush_gathered()
        if (self._how.fsync_at_close or self._how.fsync_every) and stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.fsync(self._fd)
        self._give_name(sidecar_line)

    def close(self) -> None:
        """Closes the descriptor; a file that was not sealed stays `.part`, with all that came. Safe to call again."""
        if self._fd >= 0:
            try:
                self._flush_gathered()
            finally:
                os.close(self._fd)
                self._fd = -1
        if self._block is not None:
            self._block = None
