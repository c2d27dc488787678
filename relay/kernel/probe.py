"""What this kernel and sandbox allow, found by doing it once on real pipes.

Sandboxes answer EPERM (Podman's profile for vmsplice) or ENOSYS (gVisor for splice, tee and vmsplice), so
version numbers tell nothing. Limits come from /proc/sys/fs and getrlimit.
"""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from relay.kernel.arena import Arena
from relay.kernel.pipe import Pipe

CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24  # it or the one before lifts the limits on pipes (fs/pipe.c, pipe_is_unprivileged_user)


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of the machine: limits, and which calls work (0, or the errno that refused).

    Sizes are in bytes, `pipe_pages` in pages of 4 KiB; 0 means no limit. `files` is the soft limit of open
    files, `files_hard` how far a process may raise it itself; `first_port` is the first that everybody may
    listen on; `capabilities` are bits of man 7 capabilities.
    """

    splice: int = 0
    tee: int = 0
    vmsplice: int = 0
    sendfile: int = 0
    pipe_max: int = 1 << 20
    pipe_pages: int = 16384
    files: int = 1024
    privileged: bool = False
    files_hard: int = 4096
    first_port: int = 1024
    capabilities: int = 0
    cpus: int = 1

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
    with Pipe(65536) as one, Pipe(65536) as two, open(os.memfd_create("relay-probe"), "wb") as file:
        arena = Arena(content)
        vmsplice = _try(lambda: arena.lend(one, copy=False))
        if vmsplice:
            os.write(one.write_fd, content)
        arena.close()
        tee = _try(lambda: one.tee_to(two, 100))
        splice = _try(lambda: one.splice_to(two.write_fd, 100))
        file.write(content)
        file.flush()
        sendfile = _try(lambda: os.sendfile(two.write_fd, file.fileno(), 0, 100))
    capabilities = _capabilities()
    privileged = bool(capabilities & (1 << CAP_SYS_RESOURCE | 1 << CAP_SYS_ADMIN))
    files, files_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _read_int("/proc/sys/fs/pipe-user-pages-soft", 16384)
    return Machine(
        splice=splice,
        tee=tee,
        vmsplice=vmsplice,
        sendfile=sendfile,
        pipe_max=_read_int("/proc/sys/fs/pipe-max-size", 1 << 20),
        pipe_pages=0 if privileged else soft,
        files=files,
        privileged=privileged,
        files_hard=files_hard,
        first_port=_read_int("/proc/sys/net/ipv4/ip_unprivileged_port_start", 1024),
        capabilities=capabilities,
        cpus=len(os.sched_getaffinity(0)),
    )


def _capabilities() -> int:
    """The effective set of this process; none where /proc does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
