"""What owns one descriptor."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self


class Held:
    """Owns the descriptor `_fd` until `close`, the end of a `with` block, or its own end; -1 when it has none."""

    _fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._drop()

    def fileno(self) -> int:
        """The memfd, still owned by this object; ValueError when it is closed, or was given away."""
        if self._fd < 0:
            raise ValueError(f"the {type(self).__name__} is closed, or was shared")
        return self._fd

    def close(self) -> None:
        """Gives it back. Safe to call again."""
        self._drop()

    def _take(self) -> int:
        """The descriptor, the caller's from here on."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def _drop(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
