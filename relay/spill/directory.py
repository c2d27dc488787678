"""A directory that holds logs, and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from pathlib import Path

from relay.errors import SinkError
from relay.log.log import Log
from relay.log.segment import SEGMENT_NAME


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
            self._sweep()
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

    def _sweep(self) -> None:
        """A relay that was killed while it made a log or removed one left an empty directory: it goes."""
        with os.scandir(self.path) as entries:
            left = [each.name for each in entries if "." in each.name and each.is_dir(follow_symlinks=False)]
        for name in left:
            with contextlib.suppress(OSError):  # it is not empty: a log, or somebody else's
                (self.path / name).rmdir()

    def found(self) -> list[str]:
        """The names of the logs in it: directories with a cursor or a segment."""
        with os.scandir(self.path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        return [name for name in names if is_log(self.path / name)]

    def log(self, name: str, *, largest: int = 0) -> Log:
        """The log of that name, opened where it was left or made."""
        return Log(self.path / name, largest=largest)

    def free_name(self, name: str) -> str:
        """`name`, or with a number added if an earlier run left a log of that name."""
        return next(
            free
            for count in itertools.count(1)
            if not (self.path / (free := name if count == 1 else f"{name}-{count}")).exists()
        )

    def close(self) -> None:
        """Gives the lock up. Safe to call again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_log(directory: Path) -> bool:
    """Whether relay keeps a log in it, or what is left of one; one that is delivered meanwhile goes."""
    try:
        with os.scandir(directory) as entries:
            return any(entry.name == "cursor" or SEGMENT_NAME.fullmatch(entry.name) for entry in entries)
    except FileNotFoundError:
        return False
