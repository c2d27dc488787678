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
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from relay.endpoints.base import Sink, Source
from relay.endpoints.ferry import Ferry
from relay.engine import Engine
from relay.kernel import core
from relay.ways import APPENDING

MOST_SUFFIXES = 10000

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
            os.close(fd)
            self.on_fail(self.error("opening", errno.EISDIR))
            return
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            self.on_fail(
                self.error(
                    "opening",
                    0,
                    reason="it is not a regular file",
                    advice="use fifo:///path for a named pipe, - for stdin",
                )
            )
            return
        if self._offset > status.st_size > 0:
            os.close(fd)
            self.on_fail(
                self.error(
                    "opening",
                    0,
                    reason=f"it has {status.st_size} bytes, offset {self._offset} is beyond its end",
                    advice="check --offset",
                )
            )
            return
        rest = max(0, status.st_size - self._offset)
        if self._length is not None and self._length > rest:
            os.close(fd)
            self.on_fail(
                self.error(
                    "opening",
                    0,
                    reason=f"it has {rest} bytes from offset {self._offset}, not {self._length}",
                    advice="check --offset and --length",
                )
            )
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


@dataclass(frozen=True)
class Writing:
    """How a file is written. `in_place` writes to the path itself instead of a `.part` beside it;
    `keep` never replaces what exists (a number is added to the name); `sidecar` names a checksum algorithm."""

    append: bool = False
    in_place: bool = False
    keep: bool = False
    fsync_at_close: bool = False
    copy: bool = False
    sidecar: str = ""
    capacity: int = 1 << 20


class FileSink(Sink):
    """Writes one stream to one file, on a thread of its own; owns the descriptor and the ferry.

    `checksum`, a hook, gives the hexadecimal digest for the sidecar once the stream is complete.
    """

    def __init__(self, engine: Engine, path: str, how: Writing) -> None:
        super().__init__(engine, path)
        self._how = how
        self._ferry: Ferry | None = None
        self._final = Path(path)
        self._part: Path | None = None
        self._fd = -1
        self._aborted = False
        self._cut_reason = ""
        self.copies = APPENDING if how.append else ""
        self.sidecar_line = ""
        self.c.kind = core.FERRY

    @property
    def method(self) -> str:
        """How bytes reach the file."""
        return core.METHOD_NAMES[self._ferry.c.method] if self._ferry is not None else "splice"

    @property
    def moved(self) -> int:
        """Bytes that reached the file."""
        return int(self._ferry.c.moved) if self._ferry is not None else 0

    @property
    def result_path(self) -> str:
        """The file's name, or its `.part` while it is not whole."""
        return str(self._part) if self._part is not None else str(self._final)

    def open(self) -> None:
        """Starts the thread, which opens the file."""
        self._ferry = Ferry(self.engine, self.c, self._how.capacity, self._write, self._written)
        self._ferry.start()

    def finish(self) -> None:
        """Hands over what is left; on_finish comes when the file is whole and has its name."""
        if self.state in ("opening", "open") and self._ferry is not None:
            self.state = "finishing"
            self._ferry.end()

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
        if self.closed:
            return
        self.closed = True
        if self.state == "failed":
            self._aborted = True
        if self._ferry is not None and self.state != "finished":
            self._ferry.end()

    def unwire(self) -> None:
        """The pipeline is going away; the thread may still be at work."""
        super().unwire()
        if self._ferry is not None:
            self._ferry.release()

    # -- on the ferry's thread

    def _write(self) -> None:
        self._fd = self._open_file()
        try:
            self.engine.post(self.opened)
            status = os.fstat(self._fd)
            append = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_APPEND
            assert self._ferry is not None
            self._ferry.carry(self._fd, copy=self._how.copy or bool(append))
            if self._aborted:
                return
            if self._how.fsync_at_close and stat.S_ISREG(status.st_mode):
                os.fsync(self._fd)
            self._give_name()
        finally:
            os.close(self._fd)
            self._fd = -1

    def _open_file(self) -> int:
        """Opens what will be written: the path itself, or a `.part` that no other writer has."""
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
            return os.open(path, flags | os.O_CREAT | os.O_TRUNC, 0o666)
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

    def _give_name(self) -> None:
        """Renames the whole file, and writes its sidecar first so that the two appear together."""
        if self._part is None:
            self._write_sidecar(self._final)
            return
        if self._how.keep:
            self._link_free_name()
        else:
            self._write_sidecar(self._final)
            self._part.rename(self._final)
        self._part = None

    def _link_free_name(self) -> None:
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
            self._write_sidecar(name)
            return
        raise OSError(errno.EEXIST, f"{MOST_SUFFIXES} files of that name exist already")

    def _write_sidecar(self, name: Path) -> None:
        if not self._how.sidecar or not self.sidecar_line:
            return
        beside = name.with_name(f"{name.name}.{self._how.sidecar}")
        beside.write_text(self.sidecar_line.format(name=name.name))

    # -- on the engine's thread again

    def _written(self, _result: object, failed: BaseException | None) -> None:
        if failed is None:
            if self._cut_reason:
                self.fail(self.error("ending", 0, reason=self._cut_reason))
            elif not self._aborted:
                self.finished()
            return
        if isinstance(failed, OSError):
            operation = "opening" if self.state == "opening" else "writing"
            text = failed.strerror if failed.errno in (errno.EBUSY, errno.EEXIST) else ""
            self.fail(self.error(operation, failed.errno or 0, reason=text or ""))
        else:
            self.fail(self.error("writing", 0, reason=f"{type(failed).__name__}: {failed}"))
