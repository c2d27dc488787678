"""A seccomp filter that denies system calls, installed in a child before it runs a program.

Facts (man 2 seccomp; linux/filter.h, linux/seccomp.h): a filter is a classic BPF program over the call's number, the
architecture and the arguments. Without privileges it takes no_new_privs. It stays through execve, and is inherited.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable, Sequence

NUMBERS = {
    "clone": 56, "clone3": 435, "epoll_create1": 291, "eventfd2": 290, "fcntl": 72, "fork": 57, "io_uring_setup": 425,
    "madvise": 28, "memfd_create": 319, "pipe2": 293, "process_vm_readv": 310, "sendfile": 40, "sendmsg": 46,
    "setsockopt": 54, "socket": 41, "socketpair": 53, "splice": 275, "tee": 276, "vfork": 58, "vmsplice": 278,
}  # fmt: skip
"""Of x86_64."""

KNOWN = platform.machine() == "x86_64"
X86_64 = 0xC000003E
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
NUMBER, ARCH, SECOND = 0, 4, 24  # offsets in struct seccomp_data; the low half of the second argument
ALLOW, DENY = 0x7FFF0000, 0x00050000
NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2
F_ADD_SEALS = 1033

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def denying(calls: Sequence[str], code: int = errno.EPERM) -> Callable[[], None]:
    """What a child calls before execve: from then on `calls` answer `code`. "seals" is fcntl's F_ADD_SEALS alone."""
    steps: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, X86_64),
        (RETURN, 0, 0, ALLOW),
    ]
    steps.append((LOAD, 0, 0, NUMBER))
    for call in calls:
        if call != "seals":
            steps += [(EQUAL, 0, 1, NUMBERS[call]), (RETURN, 0, 0, DENY | code)]
    if "seals" in calls:  # last: it loads something else
        steps += [(EQUAL, 1, 0, NUMBERS["fcntl"]), (RETURN, 0, 0, ALLOW), (LOAD, 0, 0, SECOND)]
        steps += [(EQUAL, 0, 1, F_ADD_SEALS), (RETURN, 0, 0, DENY | code)]
    steps.append((RETURN, 0, 0, ALLOW))
    raw = b"".join(struct.pack("HBBI", *step) for step in steps)

    def install() -> None:
        code_room = ctypes.create_string_buffer(raw, len(raw))
        program = _Program(len(steps), ctypes.addressof(code_room))
        for arguments in ((NO_NEW_PRIVS, 1, 0, 0, 0), (SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0)):
            if _libc.prctl(*arguments) < 0:
                number = ctypes.get_errno()
                raise OSError(number, f"prctl: {os.strerror(number)}")

    return install
