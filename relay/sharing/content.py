"""What shared bytes are: the dtype and shape of an array, told in words that can be checked without NumPy.

A dtype is spelled as NumPy does (`<f4`, `|u1`, `<M8[ns]`). Python objects have no place here: an address means
nothing in another process, and one made up by a hostile peer would be followed.
"""

from __future__ import annotations

import mmap
import re
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

from relay.errors import ShareError

if TYPE_CHECKING:
    from typing_extensions import Buffer

LARGEST: Final = 1 << 62  # bytes that an array may span, as far as NumPy can count
MOST_DIMENSIONS: Final = 32
LONGEST_DTYPE: Final = 32

_DTYPE = re.compile(r"([<>|=])([biufcSUVmM])(\d{1,10})(\[\d{0,9}[a-zA-Z]{1,2}\])?", re.ASCII)
_SIZES: Final = {
    "b": {1}, "i": {1, 2, 4, 8}, "u": {1, 2, 4, 8}, "f": {2, 4, 8, 12, 16}, "c": {8, 16, 24, 32}, "m": {8}, "M": {8},
}  # fmt: skip
_NATIVE: Final = "<" if sys.byteorder == "little" else ">"
_KINDS: Final = {
    **dict.fromkeys("bhilqn", "i"), **dict.fromkeys("BHILQN", "u"), **dict.fromkeys("efdg", "f"),
    "?": "b", "c": "S", "Zf": "c", "Zd": "c", "Zg": "c",
}  # fmt: skip


@dataclass(frozen=True)
class Content:
    """An array's `dtype` and `shape`, C-ordered. ShareError when the two make no sense together.

    `size` is what it takes in bytes. Plain bytes are `|u1` with one dimension.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        item = itemsize(self.dtype)
        if len(self.shape) > MOST_DIMENSIONS:
            raise ShareError(f"an array of {len(self.shape)} dimensions: the most are {MOST_DIMENSIONS}")
        span = item
        for side in self.shape:
            if side < 0:
                raise ShareError(f"a negative side in the shape {self.shape}")
            span *= max(1, side)
            if span > LARGEST:
                raise ShareError(f"an array larger than any memory: {self.dtype} of shape {self.shape}")

    @cached_property
    def size(self) -> int:
        """Bytes."""
        size = itemsize(self.dtype)
        for side in self.shape:
            size *= side
        return size

    def array(self, memory: mmap.mmap | memoryview, *, final: bool) -> Any:
        """A NumPy array over `memory`, which must be of this size.

        NumPy relies on booleans being 0 or 1 when it counts them: they are looked at first, and copied before
        that if the memory is not `final`. ShareError when they are not.
        """
        import numpy

        if not self.size:
            return numpy.empty(self.shape, self.dtype)
        if self.dtype[1] == "b":
            raw = numpy.frombuffer(memory, "u1")
            raw = raw if final else raw.copy()
            if raw.max() > 1:
                raise ShareError("an array of booleans holds bytes other than 0 and 1")
            return raw.view(self.dtype).reshape(self.shape)
        return numpy.frombuffer(memory, self.dtype).reshape(self.shape)


class Described:
    """What has a `content`."""

    __slots__ = ()
    content: Content

    @property
    def dtype(self) -> str:
        """The dtype as NumPy spells it, `|u1` for plain bytes."""
        return self.content.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The sides of the array, C-ordered."""
        return self.content.shape

    def __repr__(self) -> str:
        return f"<relay.{type(self).__name__} {self.dtype} {self.shape}>"


@lru_cache(64)
def itemsize(dtype: str) -> int:
    """Bytes of one element; ShareError for a dtype that cannot be shared."""
    found = _DTYPE.fullmatch(dtype)
    if found is not None:
        _order, kind, digits, unit = found.groups()
        size = int(digits) * (4 if kind == "U" else 1)
        if 0 < size < 1 << 31 and size in _SIZES.get(kind, (size,)) and (not unit or kind in "mM"):
            return size
    raise ShareError(f"unknown dtype {dtype[:LONGEST_DTYPE]!r}")


def content_of(shape: int | tuple[int, ...], dtype: Any) -> Content:
    """What an array of NumPy's `shape` and `dtype` is; NumPy is loaded unless `dtype` is spelled as here."""
    if not isinstance(dtype, str) or _DTYPE.fullmatch(dtype) is None:
        import numpy

        kind = numpy.dtype(dtype)
        _refuse(numpy, kind)
        dtype = kind.str
    return Content(dtype, (shape,) if isinstance(shape, int) else tuple(shape))


def describe(buffer: Buffer) -> tuple[Content, memoryview]:
    """What `buffer` is, and its bytes, flat, in C order: copied only if they are not in that order.

    TypeError for what cannot be told in a dtype: Python objects, structures, masked arrays.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(buffer, numpy.ndarray):
        return _of_array(numpy, buffer)
    view = memoryview(buffer)
    content = Content(_dtype_of(view), view.shape or ())
    if not view.c_contiguous:
        view = memoryview(view.tobytes())
    # cast refuses an empty side
    return content, view.cast("B") if view.nbytes else memoryview(b"")


def _of_array(numpy: Any, array: Any) -> tuple[Content, memoryview]:
    _refuse(numpy, array.dtype)
    if isinstance(array, numpy.ma.MaskedArray):
        raise TypeError("a masked array would lose its mask: share array.data and array.mask")
    plain = numpy.asarray(array, order="C")
    return Content(plain.dtype.str, plain.shape), memoryview(plain.reshape(-1).view("u1"))


def _refuse(numpy: Any, dtype: Any) -> None:
    if dtype.hasobject:
        raise TypeError(f"an array of {dtype} holds Python objects, which cannot be shared")
    if dtype.names or dtype.subdtype or (dtype.kind == "V" and dtype.type is not numpy.void):
        raise TypeError(
            f"the dtype {dtype} is not told across: share array.view('V{dtype.itemsize}') and view it back"
        )


def _dtype_of(view: memoryview) -> str:
    code = view.format
    order = _NATIVE
    if code[:1] in "@=<>!":
        order = {"<": "<", ">": ">", "!": ">"}.get(code[:1], _NATIVE)
        code = code[1:]
    kind = _KINDS.get(code)
    if kind is None:
        raise TypeError(
            f"a buffer of format {view.format!r} cannot be told in a dtype: share memoryview(buffer).cast('B')"
        )
    return f"{'|' if view.itemsize == 1 else order}{kind}{view.itemsize}"
