"""A log written and read as its writer and its readers do it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from relay.log.log import Log

SEGMENT = 4096


def fill(log: Log, data: bytes) -> None:
    """Appends all of `data`, as the writer does; fails where there is no room."""
    view = memoryview(data)
    while view:
        room = log.room()
        assert room, "there is no room"
        count = os.write(log.tail(), view[:room])
        log.appended(count)
        view = view[count:]


def read(log: Log, position: int, most: int = 1 << 30) -> bytes:
    """What the log has from `position` on, up to `most` bytes, as a reader finds it."""
    got = bytearray()
    while len(got) < most:
        start, available = log.extent(position + len(got))
        if not available:
            break
        fd = log.open_segment(start)
        got += os.pread(fd, min(available, most - len(got)), position + len(got) - start)
        os.close(fd)
    return bytes(got)


@contextlib.contextmanager
def closed_at_the_end() -> Iterator[list[Log]]:
    """Logs that are closed, and kept."""
    made: list[Log] = []
    yield made
    for log in made:
        log.close(keep=True)


def segments(directory: Path) -> list[str]:
    """The names of the segments in a log's directory."""
    return sorted(path.name for path in directory.iterdir() if path.name.isdigit())
