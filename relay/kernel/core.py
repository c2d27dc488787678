"""The typed face of the C core (pump.h, duplex.h). The only importer of the compiled module.

A struct made here belongs to the Python object that keeps it: C borrows it while it is wired to an engine.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from typing import Any, Final, TypeAlias

from relay.errors import KernelError

try:
    from relay.kernel import _pump
except ImportError as error:
    raise KernelError(
        f"loading the C core relay.kernel._pump: {error}",
        hint="install relay with pip (a C compiler is needed), or run python relay/kernel/build.py in a checkout",
    ) from error

ffi: Final[Any] = _pump.ffi
lib: Final[Any] = _pump.lib

# A pointer to a C struct. cffi's objects carry no static types: their fields are those of pump.h and duplex.h.
Struct: TypeAlias = Any

POLLED: Final = int(lib.RELAY_POLLED)
INSTANT: Final = int(lib.RELAY_INSTANT)
FERRY: Final = int(lib.RELAY_FERRY)
WATCH: Final = int(lib.RELAY_WATCH)
ANSWER: Final = int(lib.RELAY_ANSWER)
SIDE: Final = int(lib.RELAY_SIDE)

SPLICE: Final = int(lib.RELAY_SPLICE)
COPY: Final = int(lib.RELAY_COPY)
SENDFILE: Final = int(lib.RELAY_SENDFILE)
VMSPLICE: Final = int(lib.RELAY_VMSPLICE)

WATCHED: Final = int(lib.RELAY_WATCHED)
SOURCE_ENDED: Final = int(lib.RELAY_SOURCE_ENDED)
SOURCE_FAILED: Final = int(lib.RELAY_SOURCE_FAILED)
SINK_DRAINED: Final = int(lib.RELAY_SINK_DRAINED)
SINK_FAILED: Final = int(lib.RELAY_SINK_FAILED)
PEER_ENDED: Final = int(lib.RELAY_PEER_ENDED)
WANTS_COPY: Final = int(lib.RELAY_WANTS_COPY)
SOURCE_COPIES: Final = int(lib.RELAY_SOURCE_COPIES)
SLOW: Final = int(lib.RELAY_SLOW)
CAUGHT_UP: Final = int(lib.RELAY_CAUGHT_UP)
IDLE: Final = int(lib.RELAY_IDLE)
DONE: Final = int(lib.RELAY_DONE)
BROKEN: Final = int(lib.RELAY_BROKEN)
SOURCE_DRY: Final = int(lib.RELAY_SOURCE_DRY)
SINK_BUSY: Final = int(lib.RELAY_SINK_BUSY)
NOT_CONNECTED: Final = int(lib.RELAY_NOT_CONNECTED)
OVER: Final = int(lib.RELAY_OVER)
WANTS_PIPE: Final = int(lib.RELAY_WANTS_PIPE)
STILL: Final = int(lib.RELAY_STILL)
GAUGED: Final = int(lib.RELAY_GAUGED)
CONNECTED: Final = int(lib.RELAY_CONNECTED)
PIECES: Final = int(lib.RELAY_PIECES)

# struct relay_event as (token, what, error, mask): read whole it costs a quarter of what its fields do one by one
EVENT: Final = struct.Struct("QiiI4x")

METHOD_NAMES: Final = {SPLICE: "splice", COPY: "copy", SENDFILE: "sendfile", VMSPLICE: "vmsplice"}


def new(kind: str, /, **fields: Any) -> Struct:
    """A zeroed `struct relay_<kind>` with the given fields set; it lives as long as what is returned."""
    struct = ffi.new(f"struct relay_{kind} *")
    for name, value in fields.items():
        setattr(struct, name, value)
    return struct


def new_end(fd: int = -1, kind: int = POLLED, method: int = SPLICE) -> Struct:
    """A `struct relay_end` without bounds: no offset of its own, as many bytes as there are."""
    return new("end", fd=fd, kind=kind, method=method, offset=-1, left=-1)


def buffer(size: int) -> Struct:
    """`size` bytes of zeroed memory for C to copy through."""
    return ffi.new("char[]", size)


def room(size: int) -> Struct:
    """As `buffer`, of memory that counts only where it was written to, and goes back to the system when let go."""
    try:
        return ffi.from_buffer("char[]", mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError:  # no mapping is left for this process
        return buffer(size)


def check(answer: int, operation: str, *, hint: str = "") -> int:
    """The answer of a call that gives -errno, or KernelError naming the operation."""
    if answer < 0:
        raise KernelError(
            f"{operation}: {os.strerror(-answer)} ({errno.errorcode.get(-answer, -answer)})",
            hint=hint,
            errno=-answer,
        )
    return answer
