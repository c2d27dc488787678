"""Arrays that are made where they will be shared: `empty`, and `Draft`, which insists that nobody holds on to them."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

from relay.kernel.arena import in_use
from relay.sharing.content import content_of
from relay.sharing.pages import Pages
from relay.sharing.shared import Shared


def empty(shape: int | tuple[int, ...], dtype: Any = "u1") -> Any:
    """A zeroed NumPy array of `shape` and `dtype` that `relay.share` takes as it is, without a copy.

    It is an array like any other, and takes a descriptor while it lives and is not shared. Computing into it
    (`out=`) saves the copy. Needs NumPy. Raises what `Draft` does.
    """
    return Draft(shape, dtype).array()


class Draft:
    """Zeroed memory for one array, to be filled in place and then shared without a copy.

    `array` (NumPy) and `view` (a memoryview of bytes) write to it; drop them, and `share` makes it final. `relay.share`
    of the whole array does that as well, and leaves its owner an array that he can go on writing to, unseen by the
    receivers. `shape` and `dtype` are NumPy's. ValueError for an empty array; TypeError and KernelError as by
    `relay.share`. It owns a mapping and a descriptor until `share` or `close`; arrays keep both.
    """

    def __init__(self, shape: int | tuple[int, ...], dtype: Any = "|u1") -> None:
        self.content = content_of(shape, dtype)
        if not self.content.size:
            raise ValueError("an empty array cannot be shared: there is no page to map")
        self._pages = Pages(self.content.size)

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def array(self) -> Any:
        """A writable NumPy array over the memory. Needs NumPy; `view` does not."""
        import numpy

        return numpy.frombuffer(self.view(), self.content.dtype).reshape(self.content.shape)

    def view(self) -> memoryview:
        """The memory as writable bytes; ValueError once it is shared or closed."""
        return memoryview(self._open())

    def share(self) -> Shared:
        """Makes it final: from here on it is only read, by whoever is given it.

        BufferError while arrays or memoryviews of it exist; KernelError (EBUSY) where a process that was
        forked since still has the memory mapped and could write to it. The draft is as before after an error.
        """
        pages = self._open()
        if in_use(pages):
            raise BufferError("arrays or memoryviews of the draft exist: drop them before it is shared")
        fd = pages.settle()
        with contextlib.suppress(
            BufferError
        ):  # another thread looks at it again, which changes nothing any more
            pages.close()
        return Shared(fd, self.content)

    def close(self) -> None:
        """Gives the memory back unless it was shared. BufferError while views exist. Safe to call again."""
        self._pages.close()

    def _open(self) -> Pages:
        if self._pages.settled:
            raise ValueError("the draft is closed, or shared already")
        return self._pages
