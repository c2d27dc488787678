"""What this kernel and sandbox allow, found by doing it once on real pipes.

Sandboxes answer EPERM (Podman's profile for vmsplice) or ENOSYS (gVisor for splice, tee and vmsplice), so
version numbers tell nothing. Limits come from /proc/sys/fs and getrlimit.
"""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from relay.kernel.arena import Arena
from relay.kernel.pipe import Pipe


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of the machine: which calls work (or the errno that refused them), and limits.

    Sizes are in bytes, `pipe_pages` in pages of 4 KiB; 0 means no limit.
    """

    splice: int = 0
    tee: int = 0
    vmsplice: int = 0
    sendfile: int = 0
    pipe_max: int = 1 << 20
    pipe_pages: int = 16384
    files: int = 1024
    privileged: bool = False

    def refused(self, call: str) -> str:
        """Why `call` does not work here, in a few words; empty when it does."""
        code = int(getattr(self, call))
        return f"{call} is refused here ({errno.errorcode.get(code, code)})" if code else ""


def _try(action: object) -> int:
    try:
        action()  # type: ignore[operator] # a lambda; object keeps the call sites short
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _read_int(path: str, otherwise: int) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return otherwise


@cache
def machine() -> Machine:
    """Tries each call once in this process and reads the limits; later calls return the same answer."""
    content = b"relay" * 100
    with Pipe(65536) as one, Pipe(65536) as two, tempfile.TemporaryFile() as file:
        arena = Arena(content)
        vmsplice = _try(lambda: arena.lend(one))
        if vmsplice:
            os.write(one.write_fd, content)
        arena.close()
        tee = _try(lambda: one.tee_to(two, 100))
        splice = _try(lambda: one.splice_to(two.write_fd, 100))
        file.write(content)
        file.flush()
        sendfile = _try(lambda: os.sendfile(two.write_fd, file.fileno(), 0, 100))
    privileged = _can_exceed_pipe_limits()
    soft = _read_int("/proc/sys/fs/pipe-user-pages-soft", 16384)
    return Machine(
        splice=splice,
        tee=tee,
        vmsplice=vmsplice,
        sendfile=sendfile,
        pipe_max=_read_int("/proc/sys/fs/pipe-max-size", 1 << 20),
        pipe_pages=0 if privileged else soft,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        privileged=privileged,
    )


def _can_exceed_pipe_limits() -> bool:
    """CAP_SYS_RESOURCE (24) or CAP_SYS_ADMIN (21) in the effective set (fs/pipe.c, pipe_is_unprivileged_user)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & (1 << 24 | 1 << 21))
    return False
