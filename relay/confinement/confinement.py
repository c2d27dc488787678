"""Least privilege: what relay gives up, in which order, and what a reload may still ask for.

    begin    before any thread is started: no new privileges, Landlock, the filter of system calls. They hold for all
             threads that come later. Where relay has a user to become, the filter leaves the calls that takes.
    close    when every address is bound and nothing else is open: the user, then a second filter that takes those calls
             away, both for all threads at once.

None of it can be taken back, so a reload that needs more is refused, with its place in the file and the reason.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from relay.config.models import Config, Confine
from relay.confinement.account import Account
from relay.confinement.wants import DEVICES, SYSTEM, Want, place_of, python_reads, wants
from relay.errors import KernelError, RelayBug
from relay.kernel import confine as kernel
from relay.kernel.confine import READ, WRITE, Access
from relay.kernel.probe import CAP_NET_BIND_SERVICE, machine
from relay.settings import Place

log = logging.getLogger("relay.serve")

PORTS = 4  # the version of Landlock that knows ports
ELSEWHERE = "install relay where everybody may read it"
RESTART = "restart relay for it"
OWN_DIRECTORY = "use a directory that is there and relay's own, or name one above it in confine.write"


def confined_to(config: Config, user: str | None) -> Config:
    """The configuration with `user` of the command line in it."""
    if user is None:
        return config
    whom: str | int = int(user) if user.isdecimal() else user
    confine = (config.confine or Confine()).model_copy(update={"user": whom})
    return config.model_copy(update={"confine": confine})


def planned(confine: Confine | None) -> str:
    """What would be given up, in words; empty for nothing."""
    if confine is None:
        return ""
    words = [] if confine.user is None else [f"becomes {confine.user} when every address is bound"]
    words.append("gets no new privileges")
    for key, what in (
        ("files", "touches no files"),
        ("ports", "no tcp ports"),
        ("calls", "makes no system calls"),
    ):
        asked = getattr(confine, key)
        if asked is not False:
            words.append(
                f"{what} but those it needs" + ("" if asked is True else ", where the kernel can see to it")
            )
    return "; ".join(words)


def lacks(config: Config) -> Iterator[tuple[str, str]]:
    """What keeps relay, as this user on this machine, from giving up what it is told to: why, and what to do."""
    confine = config.confine
    if confine is None:
        return
    if confine.user is not None:
        try:
            account = Account.of(confine.user, confine.group)
        except KernelError as error:
            yield str(error).removeprefix("confine: ").partition(";")[0], error.hint
        else:
            if os.geteuid() != 0 and not account.ours:
                yield f"becoming {account.name} takes root", "start relay as root, or as that user"
            for path in _unreadable(account):
                yield f"{account.name} cannot read {path}, where Python looks for modules", ELSEWHERE
        for name, route in config.routes.items():
            if route.sink.transparent:
                yield (
                    f"'transparent' of the route {name} takes CAP_NET_ADMIN, which goes with the user",
                    "leave 'user' out, and start relay as a user with AmbientCapabilities=CAP_NET_ADMIN",
                )
    version = kernel.landlock_version()
    for key, asked, needed in (("files", confine.files, 1), ("ports", confine.ports, PORTS)):
        if asked is not False and version < needed:
            yield (
                f"'{key}' takes Landlock {needed}, this kernel or sandbox has {version or 'none'}",
                "use a newer kernel",
            )
    if confine.files is not False and version:
        for path in _unallowable(list(wants(config)), confine):
            yield f"{path} is not there, so nothing can be allowed there", OWN_DIRECTORY


def _unreadable(account: Account) -> Iterator[str]:
    """The first place of Python's modules that the user could not read from; what is imported late would fail."""
    for path in python_reads():
        if Path(path).is_dir() and not account.reaches(path):
            yield path
            return


def _unallowable(wanted: list[Want], confine: Confine) -> Iterator[str]:
    """Paths to write that are not there, will not be made, and are beneath nothing that is allowed."""
    above = {os.path.realpath(each) for each in confine.write}
    for want in wanted:
        makes = want.make and Path(want.path).parent.is_dir()
        named = any(str(parent) in above for parent in Path(want.path).parents)
        if want.kind == "write" and not os.path.lexists(want.path) and not makes and not named:
            yield want.path


def _threads() -> int:
    """How many threads there are, of libraries, too."""
    try:
        return len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return threading.active_count()


class Confinement:
    """What relay has given up for `config`, which was read from the file `source` (None, "-": from none).

    `user` is that of the command line, which goes before the configuration's; `also` is what is needed besides.
    """

    def __init__(
        self, config: Config, source: str | None = None, user: str | None = None, also: Sequence[Want] = ()
    ) -> None:
        config = confined_to(config, user)
        self._confine = config.confine
        self._config = config
        self._user = user
        self._also = also
        self._source = None if source in (None, "-") else source
        self._account: Account | None = None
        self._became = False
        self._paths: dict[str, Access] | None = None
        self._ports: set[tuple[int, int]] | None = None
        self._scoped = 0
        self._lacks: list[str] = []
        self._began = False
        self._filter: Literal["none", "first", "last"] = "none"

    @property
    def owner(self) -> tuple[int, int]:
        """The user and the group that relay will be, by number; -1 for as it is."""
        if self._account is None or not self._becomes:
            return (-1, -1)
        return (self._account.user, self._account.group)

    def begin(self) -> None:
        """Before any thread is started: no new privileges, Landlock, and the filter. Raises KernelError."""
        confine = self._confine
        if confine is None:
            return
        if _threads() > 1:
            raise RelayBug("rights are given up when threads are there already")
        machine()  # looks at the system as it is
        if confine.user is not None:
            self._account = Account.of(confine.user, confine.group)
        wanted = [*wants(self._config), *self._also]
        version = kernel.landlock_version()
        if self._possible("files", confine.files, version >= 1, "this kernel has no Landlock"):
            self._make_directories(wanted)
            self._paths = self._allowed(wanted)
        if self._possible("ports", confine.ports, version >= PORTS, f"Landlock has version {version}, not 4"):
            self._ports = self._open_ports(wanted)
        if self._paths is not None:
            abstract = any(want.kind == "abstract" for want in wanted)
            self._scoped = kernel.SIGNALS | (0 if abstract else kernel.ABSTRACT_SOCKETS)
        kernel.no_new_privileges()
        if version:
            kernel.enter(kernel.Rules(self._paths, self._ports, self._scoped))
        known = kernel.can_filter()
        if self._possible("calls", confine.calls, known, "the system calls of this processor are not known"):
            self._filter_calls("first" if self._becomes else "last")
        self._began = True

    @property
    def _becomes(self) -> bool:
        return self._account is not None and not self._account.ours

    def _filter_calls(self, which: Literal["first", "last"]) -> None:
        assert self._confine is not None
        try:
            kernel.filter_calls(becoming=which == "first")
            self._filter = which
        except KernelError as error:
            self._possible("calls", self._confine.calls, False, str(error))

    def _possible(self, key: str, asked: bool | str, possible: bool, why: str) -> bool:
        if asked is False:
            return False
        if not possible:
            if asked is True:
                raise KernelError(
                    f"confine: '{key}: true' cannot be done: {why}", hint="write where_possible"
                )
            self._lacks.append(f"{key}: {why}")
        return possible

    def _make_directories(self, wanted: list[Want]) -> None:
        """Those that the routes would make themselves, so that there is something to allow access to."""
        for want in wanted:
            if want.make and not os.path.lexists(want.path) and Path(want.path).parent.is_dir():
                Path(want.path).mkdir(mode=want.make)
                if self._account is not None and self._becomes:
                    os.chown(want.path, self._account.user, self._account.group)
        assert self._confine is not None
        for path in _unallowable(wanted, self._confine):
            raise KernelError(
                f"confine: {path} is not there, so nothing can be allowed there", hint=OWN_DIRECTORY
            )

    def _allowed(self, wanted: list[Want]) -> dict[str, Access]:
        found: dict[str, Access] = {}
        read = [*SYSTEM, *python_reads(), *(want.path for want in wanted if want.kind == "read")]
        if self._source is not None:
            read.append(place_of(self._source))
        for path in read:
            real = os.path.realpath(path)
            found[real] = found.get(real, Access(0)) | READ
        for path in [*DEVICES, *(want.path for want in wanted if want.kind == "write")]:
            found[path] = found.get(path, Access(0)) | WRITE
        return found

    def _open_ports(self, wanted: list[Want]) -> set[tuple[int, int]]:
        kinds = {"bind": kernel.BIND, "connect": kernel.CONNECT}
        return {(want.port, kinds[want.kind]) for want in wanted if want.kind in kinds}

    def close(self) -> None:
        """When every address is bound: the user, and the calls that becoming it took. Raises KernelError."""
        if not self._began:
            if self._confine is not None:
                log.warning("not confined: the process is not relay's own", extra={"event": "not_confined"})
            return
        if self._account is not None and self._becomes:
            for path in _unreadable(self._account):
                log.warning(
                    "%s cannot read %s, where Python looks for modules: what is needed later fails; %s",
                    self._account.name,
                    path,
                    ELSEWHERE,
                )
            self._account.become()
            self._became = True
        if self._filter == "first":
            self._filter_calls("last")
        self._tell()

    def _tell(self) -> None:
        done = [f"user {self._account.name}"] if self._account is not None else []
        done += ["no new privileges"]
        done += [f"files beneath {len(self._paths)} paths"] if self._paths is not None else []
        if self._ports is not None:
            done += [f"{len(self._ports)} tcp ports"]
        done += ["system calls"] if self._filter == "last" else []
        log.info("confined: %s", ", ".join(done), extra={"event": "confined", "to": done})
        for lack in self._lacks:
            log.warning("not confined: %s", lack, extra={"event": "not_confined"})

    # -- reload

    def refusals(self, config: Config, at_work: Config) -> Iterator[tuple[Place, str]]:
        """What in a new configuration needs rights that were given up, each with its place and the reason."""
        if confined_to(config, self._user).confine != self._confine:
            yield ("confine",), f"what relay gives up it gives up when it starts: {RESTART}"
            return
        if self._confine is None:
            return
        have = {want.port for want in wants(at_work) if want.kind == "bind"}
        for want in wants(config):
            said = self._refusal(want, have)
            if said:
                yield want.place, f"{said}: {RESTART}"

    def _refusal(self, want: Want, bound: set[int]) -> str:
        if want.kind in ("read", "write") and self._paths is not None:
            if not self._beneath(want.path, READ if want.kind == "read" else WRITE):
                return f"relay gave up the right to {want.kind} {want.path} (confine.files)"
        elif want.kind in ("bind", "connect"):
            kind = kernel.BIND if want.kind == "bind" else kernel.CONNECT
            if self._ports is not None and (want.port, kind) not in self._ports:
                words = "listen on" if want.kind == "bind" else "connect to"
                return f"relay gave up the right to {words} port {want.port} (confine.ports)"
            low = 0 < want.port < machine().first_port
            if want.kind == "bind" and low and want.port not in bound and self._gave_up_low_ports():
                return f"port {want.port} takes root, which relay gave up (confine.user)"
        elif want.kind == "abstract" and self._scoped & kernel.ABSTRACT_SOCKETS:
            return f"relay gave up the right to connect to {want.path} (confine.files)"
        return ""

    def _gave_up_low_ports(self) -> bool:
        return self._became and bool(machine().capabilities & 1 << CAP_NET_BIND_SERVICE)

    def _beneath(self, path: str, access: Access) -> bool:
        """Whether the rules allow `access` to a path, or to the directory that it is in."""
        places = [path, *map(str, Path(path).parents)]
        return any(access & self._paths.get(place, Access(0)) == access for place in places if self._paths)
