"""What the process holds: descriptors, pipes and their pages, memory.

Facts (man 5 proc, 7 pipe): /proc/self/fd names every descriptor; a pipe's name has its inode, which both of its ends
share; F_GETPIPE_SZ tells its capacity. No file tells how many pages the pipes of a user have in all: only this
process's own are counted here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import threading
import time

from relay.admin.status import Resources
from relay.kernel.pipe import F_GETPIPE_SZ
from relay.kernel.probe import machine
from relay.needs import PAGE

FRESH = 1.0  # seconds for which the answer is good: there may be thousands of descriptors

_lock = threading.Lock()
_last: tuple[float, Resources] | None = None


def resources() -> Resources:
    """As it is now, or was a second ago."""
    global _last
    with _lock:
        now = time.monotonic()
        if _last is None or now - _last[0] >= FRESH:
            _last = (now, _look())
        return _last[1]


def _look() -> Resources:
    count = 0
    sizes: dict[str, int] = {}
    try:
        numbers = os.listdir("/proc/self/fd")  # noqa: PTH208 - there may be thousands
    except OSError:
        numbers = []
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile, as is the one that listed the folder
            name = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115 - see above
            count += 1
            if name.startswith("pipe:") and name not in sizes:
                sizes[name] = fcntl.fcntl(int(number), F_GETPIPE_SZ)
    here = machine()
    return Resources(
        fds=count,
        fds_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        pipes=len(sizes),
        pipe_pages=sum(sizes.values()) // PAGE,
        pipe_pages_limit=here.pipe_pages or None,
        memory=_memory(),
    )


def _memory() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0
