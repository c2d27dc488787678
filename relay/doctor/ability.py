"""What works here: every line is the answer of the kernel to something that was done a moment ago.

Facts: sandboxes answer EPERM (a seccomp filter, a sysctl) or ENOSYS (gVisor, an old kernel); version numbers tell
nothing. /proc/self/status says whether a filter is in force (Seccomp: 2), not which calls it denies.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from relay.errors import KernelError, name_of
from relay.kernel import memfd
from relay.kernel.arena import HUGE_PAGE, Arena
from relay.kernel.pipe import DEFAULT_CAPACITY, Pipe
from relay.units import show_size

PIPES: Final = 16  # made at once to see whether the user's budget has room
SEALS: Final = 0x0002 | 0x0004 | 0x0010  # F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE
F_ADD_SEALS: Final = 1033
TCP_ULP: Final = 31
IO_URING_SETUP: Final = 425
WITHOUT: Final = "relay copies instead"


@dataclass(frozen=True)
class Ability:
    """One line. `state` is yes, no, or less: it works, but not as well as it might. `needed`: not without it."""

    name: str
    state: str
    said: str
    needed: bool = False
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"name": self.name, "state": self.state, "said": self.said, "needed": self.needed}
        return {**found, "hint": self.hint} if self.hint else found


def sandbox() -> str:
    """What stands between this process and the kernel, as far as the kernel tells; empty if nothing does."""
    try:
        status = dict(
            line.split(":\t", 1)
            for line in Path("/proc/self/status").read_text().splitlines()
            if ":\t" in line
        )
    except OSError:
        return "/proc cannot be read"
    return {"1": "strict seccomp", "2": "a seccomp filter"}.get(status.get("Seccomp", "0").strip(), "")


def who_refused(code: int) -> str:
    """An errno in words, with who probably answered it."""
    name, filters = name_of(code), sandbox()
    if code == errno.EPERM and filters:
        return f"{name}, answered by {filters}"
    if code == errno.ENOSYS:
        return f"{name}: this kernel or sandbox does not have it"
    if code == errno.EAGAIN and filters:
        return f"{name}: {os.strerror(code)}, or answered by {filters}"
    return f"{name}: {os.strerror(code)}"


def abilities() -> list[Ability]:
    """Tries everything once; some tens of milliseconds."""
    return [
        _tried("pipe", _pipe, needed=True, hint="raise the limit of open files (ulimit -n)"),
        _tried("epoll", _epoll, needed=True),
        _tried("eventfd", _eventfd, needed=True),
        _tried("thread", _thread, needed=True, hint="raise the limit of processes (ulimit -u)"),
        _tried("unix socket", _unix, needed=True),
        _tried(
            "tcp on loopback", _tcp, needed=True, hint="bring the loopback interface up (ip link set lo up)"
        ),
        _tried("splice", _splice, hint=WITHOUT),
        _tried("tee", _tee, hint=WITHOUT),
        _tried("vmsplice", _vmsplice, hint=WITHOUT),
        _tried("sendfile", _sendfile, hint=WITHOUT),
        _sizes(),
        _budget(),
        _tried("memfd", _memfd, needed=True, hint="logs in memory are made of it"),
        _tried("seals", _seals, hint="memory that is passed to others cannot be trusted without"),
        _huge_memfd(),
        _tried("descriptors passed", _passed, hint="memory cannot be handed to another process without"),
        _tried("kernel tls", _tls, hint="modprobe tls; encrypted streams are not spliced without"),
        _tried("io_uring", _io_uring, hint="relay does not use it"),
    ]


def _tried(name: str, experiment: Callable[[], str], *, needed: bool = False, hint: str = "") -> Ability:
    try:
        return Ability(name, "yes", experiment(), needed)
    except (OSError, KernelError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        code = getattr(cause, "errno", None)
        return Ability(name, "no", who_refused(code) if code else str(error), needed, hint)


def _expect(found: object) -> None:
    if not found:
        raise KernelError("the call went well, but other bytes came out than went in")


def _pipe() -> str:
    with Pipe() as pipe:
        os.write(pipe.write_fd, b"relay")
        _expect(os.read(pipe.read_fd, 9) == b"relay")
    return "a byte written was read"


def _epoll() -> str:
    with Pipe() as pipe, contextlib.closing(select.epoll()) as epoll:
        epoll.register(pipe.read_fd, select.EPOLLIN | select.EPOLLET)
        os.write(pipe.write_fd, b"x")
        told = len(epoll.poll(1.0)), len(epoll.poll(0))
    if told != (1, 0):
        raise KernelError(f"an edge was told {told} times, not once")
    return "an edge is told once"


def _eventfd() -> str:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        os.eventfd_write(fd, 3)
        return f"{os.eventfd_read(fd)} written, as many read"
    finally:
        os.close(fd)


def _thread() -> str:
    ran = threading.Event()
    try:
        thread = threading.Thread(target=ran.set)
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
    thread.join()
    return "one was started"


def _unix() -> str:
    one, two = socket.socketpair()
    with one, two:
        one.sendall(b"relay")
        _expect(two.recv(9) == b"relay")
    return "a byte sent was received"


@contextlib.contextmanager
def _tcp_pair() -> Any:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(5.0)
        with socket.create_connection(listener.getsockname(), 5.0) as near:
            far, _peer = listener.accept()
            with far:
                yield near, far


def _tcp() -> str:
    with _tcp_pair() as (near, far):
        near.sendall(b"relay")
        far.settimeout(5.0)
        _expect(far.recv(9))
    return "a byte sent was received"


def _splice() -> str:
    one, two = socket.socketpair()
    with one, two, Pipe() as pipe:
        one.sendall(b"relay")
        two.setblocking(False)
        _expect(pipe.splice_from(two.fileno(), 5) == 5)
        _expect(pipe.splice_to(two.fileno(), 5) == 5)
        _expect(one.recv(9) == b"relay")
    return "socket to pipe and back"


def _tee() -> str:
    with Pipe() as one, Pipe() as two:
        os.write(one.write_fd, b"relay")
        _expect(one.tee_to(two, 5) == 5)
        _expect(os.read(one.read_fd, 9) == os.read(two.read_fd, 9) == b"relay")
    return "both pipes had the bytes"


def _vmsplice() -> str:
    arena = Arena(b"relay")
    try:
        with Pipe() as pipe:
            _expect(arena.lend(pipe, copy=False) == 5)
            _expect(os.read(pipe.read_fd, 9) == b"relay")
    finally:
        arena.close()
    return "a page was lent to a pipe"


def _sendfile() -> str:
    one, two = socket.socketpair()
    with one, two, tempfile.TemporaryFile() as file:
        file.write(b"relay")
        file.flush()
        _expect(os.sendfile(one.fileno(), file.fileno(), 0, 5) == 5)
        _expect(two.recv(9) == b"relay")
    return "file to socket"


def _sizes() -> Ability:
    """How large a pipe this user gets."""
    try:
        with Pipe() as pipe:
            granted = pipe.capacity
    except KernelError as error:
        return Ability("pipe size", "no", str(error), needed=True)
    state = "yes" if granted >= DEFAULT_CAPACITY else "less"
    hint = "raise fs.pipe-max-size or fs.pipe-user-pages-soft (sysctl), or run fewer relays as this user"
    return Ability("pipe size", state, f"{show_size(granted)} granted", hint="" if state == "yes" else hint)


def _budget() -> Ability:
    """Whether as many large pipes as a few streams need are granted at once."""
    with contextlib.ExitStack() as undo:
        granted = []
        for _ in range(PIPES):
            try:
                granted.append(undo.enter_context(Pipe()).capacity)
            except KernelError as error:
                return Ability("pipe budget", "less", f"{len(granted)} pipes, then {error}")
    large = sum(capacity >= DEFAULT_CAPACITY for capacity in granted)
    state = "yes" if large == PIPES else "less"
    hint = "pipes of others are smaller: raise fs.pipe-user-pages-soft (sysctl)" if state == "less" else ""
    least = show_size(min(granted))
    return Ability(
        "pipe budget", state, f"{large} of {PIPES} large pipes at once, the least {least}", hint=hint
    )


def _memfd() -> str:
    fd = os.memfd_create("relay-doctor", os.MFD_CLOEXEC)
    try:
        os.write(fd, b"relay")
        _expect(os.pread(fd, 9, 0) == b"relay")
    finally:
        os.close(fd)
    return "written and read"


def _seals() -> str:
    fd = os.memfd_create("relay-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, b"relay")
        fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
        for broken in (lambda: os.ftruncate(fd, 0), lambda: os.pwrite(fd, b"x", 0)):
            try:
                broken()
            except PermissionError:
                continue
            raise KernelError("a sealed memfd was changed")
    finally:
        os.close(fd)
    return "a sealed memfd can neither shrink nor be written to"


def _huge_memfd() -> Ability:
    """Whether memory that is shared is made of huge pages: looked up where the kernel says what is mapped how."""
    name, size = "huge pages in memfds", 2 * HUGE_PAGE
    try:
        fd = os.memfd_create("relay-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            with memfd.aligned(lambda: memfd.private(size)) as memory:
                memfd.place(memory, fd, writable=True)
                memfd.enlarge(memory, fd)
                memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
                found = _mapped_huge(fd)
        finally:
            os.close(fd)
    except (OSError, ValueError, KernelError) as error:
        return Ability(name, "less", f"could not be tried: {error}")
    switch = memfd.huge_pages()
    if found:
        how = "asked for by MADV_COLLAPSE, " if switch == "never" else ""
        said = (
            f"{show_size(found)} of {show_size(size)} mapped by huge pages ({how}shmem_enabled is {switch!r})"
        )
        return Ability(name, "yes", said)
    hint = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled: memory that is shared once is then cheaper"
    if switch not in ("never", "deny"):
        hint = "no memory in stretches of 2 MiB is free: memory that is shared once costs more until there is"
    return Ability(name, "less", f"small pages only (shmem_enabled is {switch!r})", hint=hint)


def _mapped_huge(fd: int) -> int:
    """Bytes of the memfd `fd` that this process maps by huge pages."""
    inode = str(os.fstat(fd).st_ino)
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = len(words) > 4 and words[4] == inode and "relay-doctor" in line
        elif inside and words[0] == "ShmemPmdMapped:":
            found += int(words[1]) * 1024
    return found


def _passed() -> str:
    one, two = socket.socketpair()
    with one, two, Pipe() as pipe:
        socket.send_fds(one, [b"x"], [pipe.read_fd])
        _message, fds, _flags, _address = socket.recv_fds(two, 1, 1)
        if not fds:
            raise KernelError("the descriptor did not arrive")
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fds[0])
            os.write(pipe.write_fd, b"relay")
            _expect(os.read(fds[0], 9) == b"relay")
    return "one sent over a unix socket worked at the other end"


def _tls() -> str:
    with _tcp_pair() as (near, _far):
        near.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    return "a socket took it"


def _io_uring() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    fd = int(libc.syscall(IO_URING_SETUP, 1, parameters))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(fd)
    return "a ring was made"
