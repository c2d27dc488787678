"""Who appends to a file, one after another: streams that take turns stand in it one after another, too.

A route that was changed goes on with the stream that is under way while the one that replaces it takes the next. Both
append to the same file, whose promise is that of the turns: no stream inside another. So the new route's pipeline
waits here until the old one's has closed the file. Routes of other names, and whoever else appends, do so whenever
they like.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
import threading
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger("relay.endpoints")

LOOK = 0.2  # seconds between two looks whether somebody who waits has given up

_File = tuple[str, int, int]  # a route's name, a file's device and inode


class Lines:
    """The lines at all files to which the routes of one relay append. From any thread."""

    def __init__(self) -> None:
        self.moved = threading.Condition()
        self.waiting: dict[_File, list[Place]] = {}
        self._numbers = itertools.count(1)

    def writer(self, route: str) -> Writer:
        """A pipeline that appends for the route of that name; it does not wait for itself."""
        return Writer(self, route, next(self._numbers))


class Writer(NamedTuple):
    """A pipeline that appends in turn, for a route; `number` is like no other's."""

    lines: Lines
    route: str
    number: int


class Place:
    """A writer's place in the line at the file that `fd` is open to, from now on until `leave`. Used on one thread."""

    def __init__(self, fd: int, writer: Writer) -> None:
        self._lines = writer.lines
        self._number = writer.number
        self._file: _File | None = None
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            self._file = (writer.route, status.st_dev, status.st_ino)
            with self._lines.moved:
                self._lines.waiting.setdefault(self._file, []).append(self)

    def _first(self) -> bool:
        """Whether nobody of another pipeline is before it. Called with the lines held still."""
        if self._file is None:
            return True
        line = self._lines.waiting[self._file]
        return all(other._number == self._number for other in line[: line.index(self)])

    def wait(self, name: str, given_up: Callable[[], bool]) -> bool:
        """Waits until whoever came before has left; False when `given_up` says so before. `name` is the file's."""
        moved = self._lines.moved
        with moved:
            if not moved.wait_for(lambda: self._first() or given_up(), LOOK):
                log.info(
                    "%s: the stream before the reload goes on; the next one waits until it has ended", name
                )
            while not self._first():
                if given_up():
                    return False
                moved.wait(LOOK)
        return True

    def leave(self) -> None:
        """The file is closed. Safe to call again."""
        if self._file is None:
            return
        with self._lines.moved:
            line = self._lines.waiting[self._file]
            line.remove(self)
            if not line:
                del self._lines.waiting[self._file]
            self._file = None
            self._lines.moved.notify_all()
