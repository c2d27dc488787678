"""One file of a log's row, and how large it is."""

from __future__ import annotations

import os
import re
from pathlib import Path

SEGMENT = 16 << 20  # bytes after which the next segment begins, on disk and where nothing bounds the log
SHARE = 8  # a bounded log has about so many segments: what is kept beyond the slowest reader is at most one

SEGMENT_NAME = re.compile(r"[0-9]{20}")


class Segment:
    """One file of the row. `fd` is -1 while nobody needs it open (disk only)."""

    __slots__ = ("fd", "path", "size", "start")

    def __init__(self, start: int, path: Path | None, fd: int = -1, size: int = 0) -> None:
        self.start = start
        self.path = path
        self.fd = fd
        self.size = size

    @property
    def end(self) -> int:
        """The position after its last byte."""
        return self.start + self.size

    def close(self) -> None:
        """Closes the descriptor; bytes in memory are gone with it. Safe to call again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> None:
        """Unlinks its file, if it has one that is still there."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def segment_size(largest: int, *, in_memory: bool) -> int:
    """Bytes in a segment of a log that keeps at most `largest` (0: no bound).

    In memory a segment is a descriptor, so they grow with the log; on disk they do not.
    """
    if not largest:
        return SEGMENT
    size = min(max(largest // SHARE, 64 << 10), max(largest // 2, 1))
    return size if in_memory else min(size, SEGMENT)
