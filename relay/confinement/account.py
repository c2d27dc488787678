"""The user that relay becomes.

Facts (man 7 credentials, 7 nptl, 5 proc): the C library changes all threads at once. A process that changed its ids
is not dumpable, so its /proc/self/fd belongs to root and it cannot open its own descriptors anew through it.
"""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from relay.endpoints.unix import group_id
from relay.errors import KernelError, SourceError


@dataclass(frozen=True)
class Account:
    """A user with its groups; `name` is for people."""

    name: str
    user: int
    group: int
    groups: tuple[int, ...]

    @classmethod
    def of(cls, user: str | int, group: str | int | None) -> Account:
        """The account of that user, in its own group unless another is named. Raises KernelError."""
        try:
            entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
        except KeyError:
            if isinstance(user, str):
                raise KernelError(
                    f"confine: there is no user {user!r}", hint=f"useradd --system {user}, or name another"
                ) from None
            entry = None  # a number needs no name
        if group is None and entry is None:
            raise KernelError(
                f"confine: the user {user} has no entry that names its group", hint="write 'group' beside it"
            )
        number = entry.pw_uid if entry is not None else int(user)
        try:
            main = entry.pw_gid if group is None and entry is not None else group_id(group)
        except SourceError as error:
            raise KernelError(
                f"confine: there is no group {group!r}", hint=f"groupadd --system {group}, or name another"
            ) from error
        groups = tuple(os.getgrouplist(entry.pw_name, main)) if entry is not None else (main,)
        return cls(entry.pw_name if entry is not None else str(user), number, main, groups)

    @property
    def ours(self) -> bool:
        """Whether this process is that user already, and could not be another."""
        return os.getresuid() == (self.user,) * 3 and os.getresgid() == (self.group,) * 3

    def reaches(self, directory: str) -> bool:
        """Whether that user could list it, as far as its mode and those of the directories above tell."""
        for number, path in enumerate([Path(directory), *Path(directory).parents]):
            try:
                status = path.stat()
            except OSError:
                return False
            need = 0o5 if number == 0 else 0o1
            shift = 6 if status.st_uid == self.user else 3 if status.st_gid in self.groups else 0
            if self.user and status.st_mode >> shift & need != need:
                return False
        return True

    def become(self) -> None:
        """Every thread is that user from now on, and cannot go back. Raises KernelError."""
        if self.ours:
            return
        try:
            os.setgroups(self.groups)
            os.setresgid(self.group, self.group, self.group)
            os.setresuid(self.user, self.user, self.user)
        except OSError as error:
            raise KernelError(
                f"confine: becoming {self.name}: {error.strerror}",
                hint="start relay as root, or as that user, or leave 'user' out",
                errno=error.errno or 0,
            ) from error
        if self.user and os.getresuid() != (self.user,) * 3:
            raise KernelError(f"confine: this process is not {self.name} after all")
