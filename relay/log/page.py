"""What is noted beside a log's segments: how far its reader is, and where the stream ended.

On disk that is a mapped page, the file `cursor`: a store to it survives SIGKILL and costs no system call.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from relay.errors import SinkError
from relay.kernel import core

_MAGIC = b"relaylog"
_NOTED = struct.Struct("<8sQQ")  # magic, acknowledged position, end of the stream + 1 (0: it goes on)


class Page:
    """In memory until it is opened on disk. `word` is an `int64_t *` to the acknowledged position, valid until the
    page is closed."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self.word: core.Struct = core.ffi.new("int64_t *")

    def open(self, directory: Path, first: int) -> None:
        """Maps the file in `directory`; a new one begins at `first`. Raises OSError, and SinkError where relay did not
        write it."""
        fd = os.open(directory / "cursor", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < mmap.PAGESIZE:
                # its blocks are there before it is mapped: a store to a hole of a full disk is SIGBUS
                os.pwrite(fd, bytes(mmap.PAGESIZE - os.fstat(fd).st_size), os.fstat(fd).st_size)
            self._map = mmap.mmap(fd, mmap.PAGESIZE)
        finally:
            os.close(fd)
        # the buffer is released before the map is closed
        self._buffer = core.ffi.from_buffer("char[]", self._map, require_writable=True)
        self.word = core.ffi.cast("int64_t *", self._buffer + 8)
        magic = bytes(self._map[:8])
        if not any(magic):  # new, or killed before it was begun: whatever is kept was acknowledged by nobody
            _NOTED.pack_into(self._map, 0, _MAGIC, first, 0)
        elif magic != _MAGIC:
            raise damaged(directory, "the file named cursor is none of relay's")

    @property
    def ended_at(self) -> int | None:
        """Where the stream ended, once it has; None while more may come, and in memory."""
        if self._map is None:
            return None
        end = int(_NOTED.unpack_from(self._map)[2])
        return end - 1 if end else None

    def note_end(self, position: int | None) -> None:
        """Where the stream ended; None: it goes on."""
        if self._map is not None:
            struct.pack_into("<Q", self._map, 16, 0 if position is None else position + 1)

    def close(self) -> None:
        """Unmaps it; what it said of the reader can still be read. Safe to call again."""
        if self._map is not None:
            self.word = core.ffi.new("int64_t *", self.word[0])
            core.ffi.release(self._buffer)
            self._map.close()
            self._map = None


def damaged(directory: Path, reason: str) -> SinkError:
    """A log's directory that cannot be used, with what to do."""
    return SinkError(
        str(directory),
        "opening the log in",
        0,
        "a part of it is missing or was changed by somebody else: move the directory away",
        reason=reason,
    )
