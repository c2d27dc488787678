"""Giving up rights for good: no_new_privs, Landlock and seccomp, typed.

Facts (man 7 landlock, 2 seccomp): a rule names the kinds of access it allows to a file, or to all that is beneath a
directory, by what the path is now: a file that is replaced later is another file. Which kinds a kernel knows depends on
its version of Landlock: 1 files, 2 moving between directories, 3 truncating, 4 tcp ports, 5 device ioctls, 6 signals
and abstract sockets. What was open before stays usable. A filter that answers by number alone is looked up in a bitmap
by the kernel and costs nothing to speak of.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from enum import IntFlag
from typing import NamedTuple

from relay.errors import KernelError
from relay.kernel.core import check, ffi, lib


class Access(IntFlag):
    """Kinds of access to files, as Landlock counts them."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Access.READ_FILE | Access.READ_DIR
WRITE = (
    READ
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.REMOVE_FILE
    | Access.REMOVE_DIR
    | Access.MAKE_DIR
    | Access.MAKE_REG
    | Access.MAKE_SOCK
    | Access.MAKE_FIFO
    | Access.REFER
)
ON_FILES = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV

BIND = 1 << 0
CONNECT = 1 << 1
ABSTRACT_SOCKETS = 1 << 0
SIGNALS = 1 << 1


def landlock_version() -> int:
    """0 where there is none, or where a sandbox around relay refuses it."""
    return max(0, int(lib.relay_landlock_version()))


def no_new_privileges() -> None:
    """Whatever this thread starts gets no rights that it has not. Raises KernelError."""
    check(lib.relay_no_new_privileges(), "giving up new privileges")


class Rules(NamedTuple):
    """What a Landlock rule set allows. None: nothing of that kind is forbidden.

    `ports` are (port, BIND or CONNECT or both); `scoped` is what of ABSTRACT_SOCKETS and SIGNALS ends at relay.
    """

    paths: Mapping[str, Access] | None
    ports: Iterable[tuple[int, int]] | None
    scoped: int = 0


def enter(rules: Rules) -> None:
    """From now on this thread, and all that it starts, may do what `rules` allow and no more of those kinds.

    Raises KernelError. What this kernel's Landlock does not know is not forbidden; a path that is not there has no
    rule.
    """
    version = landlock_version()
    known = Access((1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1)
    if version < 5:
        known &= ~Access.IOCTL_DEV
    files = int(known) if rules.paths is not None else 0
    ports = BIND | CONNECT if rules.ports is not None and version >= 4 else 0
    scoped = rules.scoped if version >= 6 else 0
    if not files and not ports and not scoped:
        return
    made = check(lib.relay_landlock_rules(files, ports, scoped), "making a Landlock rule set")
    try:
        for path, access in (rules.paths or {}).items():
            _allow(made, path, access & known)
        if ports:
            for port, kinds in rules.ports or ():
                check(lib.relay_landlock_port(made, kinds, port), f"allowing the port {port}")
        check(lib.relay_landlock_enter(made), "entering the Landlock rule set")
    finally:
        os.close(made)


def _allow(rules: int, path: str, access: Access) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # there is nothing to allow access to
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= ON_FILES
        if access:
            check(lib.relay_landlock_path(rules, int(access), fd), f"allowing access to {path}")
    finally:
        os.close(fd)


# -- system calls

ALLOW = 0x7FFF0000
KILL = 0x80000000
REFUSE = 0x00050000  # with an errno in the low half
_LOAD, _EQUAL, _AT_LEAST, _SOME, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST = 0, 4, 16  # offsets in struct seccomp_data; the first argument's low half
_THREAD = 0x00010000  # CLONE_THREAD
_FAMILIES = (1, 2, 10, 16)  # unix, IPv4, IPv6, netlink (which the resolver asks for addresses)
_SPARE = 64  # numbers above the highest that is known here, which a newer libc may try first


def calls(*, becoming: bool = False) -> dict[str, int]:
    """The system calls that relay makes, by name, with their numbers here; `becoming`: those besides that become
    another user, and that filter what is left."""
    found: dict[str, int] = {}
    for table_of in (lib.relay_calls, lib.relay_calls_becoming)[: 1 + becoming]:
        count = ffi.new("int *")
        table = table_of(count)
        found |= {ffi.string(table[i].name).decode(): int(table[i].number) for i in range(count[0])}
    return found


def filter_calls(*, becoming: bool = False) -> None:
    """From now on, and for every thread, only the calls that relay makes are there; others are EPERM.

    New threads may be started, new processes not; sockets are unix, IPv4, IPv6 or netlink. What is not known yet is
    ENOSYS, so that a newer libc does without. `becoming` leaves what becoming another user takes, and the next filter,
    which is without. Raises KernelError.
    """
    steps = _program(calls(becoming=becoming), int(lib.relay_arch()))
    made = ffi.new("struct relay_step[]", len(steps))
    for number, (code, yes, no, value) in enumerate(steps):
        made[number].code, made[number].yes, made[number].no, made[number].value = code, yes, no, value
    said = int(lib.relay_filter(made, len(steps)))
    if said > 0:
        raise KernelError(f"filtering system calls: thread {said} has a filter of its own")
    check(said, "filtering system calls", hint="the kernel or a sandbox around relay has no seccomp filters")


def can_filter() -> bool:
    """Whether the numbers of this processor are known."""
    return bool(lib.relay_arch())


def _program(numbers: Mapping[str, int], arch: int) -> Sequence[tuple[int, int, int, int]]:
    """The filter: each allowed number gets its answer at once, so jumps stay short."""
    plain = sorted(
        number for name, number in numbers.items() if name not in ("clone", "socket", "socketpair")
    )
    steps = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, KILL),  # the numbers of another processor mean something else
        (_LOAD, 0, 0, _NUMBER),
    ]
    for number in plain:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, ALLOW)]
    refuse = (_RETURN, 0, 0, REFUSE | errno.EPERM)
    steps += [
        (_EQUAL, 0, 4, numbers["clone"]),
        (_LOAD, 0, 0, _FIRST),
        (_SOME, 0, 1, _THREAD),
        (_RETURN, 0, 0, ALLOW),
        refuse,
    ]
    for name in ("socket", "socketpair"):
        steps += [(_EQUAL, 0, len(_FAMILIES) * 2 + 2, numbers[name]), (_LOAD, 0, 0, _FIRST)]
        for family in _FAMILIES:
            steps += [(_EQUAL, 0, 1, family), (_RETURN, 0, 0, ALLOW)]
        steps += [refuse]
    steps += [
        (_EQUAL, 2, 0, CLONE3),
        (_AT_LEAST, 0, 2, max(*numbers.values(), _LATEST) + 1),
        (_AT_LEAST, 1, 0, max(*numbers.values(), _LATEST) + 1 + _SPARE),
        (_RETURN, 0, 0, REFUSE | errno.ENOSYS),
        refuse,
    ]
    return steps


CLONE3 = 435  # on every processor; its flags are in memory that a filter cannot see
_LATEST = 462
