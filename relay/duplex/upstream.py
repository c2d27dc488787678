"""One upstream: where it is, how it is, and what its sessions found out about it.

Theory of operation. Two things keep new sessions from an upstream. Checks say that it is *down* (duplex/health.py), and
stay right whatever sessions meet. A session that cannot connect *ejects* it for a while, longer each time; after that
one session at a time goes there on trial, and either it is taken back or the while begins anew. Connects that began
before an ejection say nothing new: a hundred that were under way at once eject once. A wait is short again after the
upstream went without failures for Backoff.SUSTAINED seconds.

No session is ever touched by any of this: it is asked for new ones only.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from typing import Literal

from relay.backoff import Backoff
from relay.duplex.balance import seed_of
from relay.endpoints.address import Address
from relay.endpoints.connecting import Place
from relay.endpoints.dial import dial_of
from relay.errors import name_of

State = Literal["up", "down", "ejected", "leaving"]

# Failures for which the upstream is not to blame: its backlog is full for a moment, or this machine is short of
# something or may not connect so.
BLAMELESS = frozenset(
    {
        errno.EAGAIN,
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,
        errno.EPERM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """How an upstream is at one moment. `upstream` is in figures, `address` as it was configured; `sessions` are
    connecting or open, `served` counts all that it ever had, `fails` those that could not connect, beside
    `failed_checks`; `why` it is not up, `seconds` for how long it is in this state."""

    upstream: str
    address: str
    state: State
    sessions: int
    served: int
    fails: int
    failed_checks: int
    why: str
    seconds: float


@dataclass(slots=True)
class Attempt:
    """A session's connect to an upstream; `trial`: the upstream was ejected, and this will say whether it still is."""

    upstream: Upstream
    began: float
    trial: bool
    passed: list[tuple[str, str]]


class Upstream:
    """One place. `name` says it in figures, `address` as it was configured. Times are monotonic seconds.

    Belongs to an Upstreams, under whose lock all that changes is read and written.
    """

    def __init__(self, address: str, place: Place, dead_after: float, now: float) -> None:
        self.name = shown(place)
        self.scheme: Literal["tcp", "unix"] = "unix" if place[0] == socket.AF_UNIX else "tcp"
        self.place = place
        self.configure(address, dead_after)
        self.seed = seed_of(self.name)
        self.sessions = 0
        self.served = 0
        self.fails = 0
        self.failed_checks = 0
        self.why = ""
        self._since = now
        self._up = True
        self._in_a_row = 0  # checks: above 0 good ones, below 0 bad ones
        self._ejected = False
        self._ejected_at = 0.0
        self._until = now
        self._trials = 0
        self._backoff = Backoff()

    def configure(self, address: str, dead_after: float) -> None:
        """What a reload may change."""
        self.address = address
        self.dial = dial_of(self.place, dead_after)

    @property
    def state(self) -> State:
        """In one word, as long as it is among those that new sessions may go to."""
        return "down" if not self._up else "ejected" if self._ejected else "up"

    def usable(self, now: float) -> bool:
        """Whether a new session may go there; one that is ejected takes one on trial when its time has come."""
        return self._up and (not self._ejected or (now >= self._until and not self._trials))

    def badness(self) -> tuple[bool, float, int]:
        """Of those that are not usable the least is tried first."""
        return (not self._up, self._until if self._ejected else 0.0, self.sessions)

    def told(self, now: float, *, listed: bool = True) -> UpstreamState:
        """What may be told to others; one that is not `listed` any more only has sessions that go on."""
        return UpstreamState(
            upstream=self.name,
            address=self.address,
            state=self.state if listed else "leaving",
            sessions=self.sessions,
            served=self.served,
            fails=self.fails,
            failed_checks=self.failed_checks,
            why=self.why if self.state in ("down", "ejected") else "",
            seconds=now - self._since,
        )

    # -- what sessions find

    def begin(self, now: float, passed: list[tuple[str, str]]) -> Attempt:
        """A session connects."""
        self.sessions += 1
        self.served += 1
        self._trials += self._ejected
        return Attempt(self, now, self._ejected, passed)

    def leave(self, attempt: Attempt) -> None:
        """The session is over, or goes elsewhere."""
        self.sessions -= 1
        self._tried(attempt)

    def _tried(self, attempt: Attempt) -> None:
        if attempt.trial:
            attempt.trial = False
            self._trials -= 1

    def refused(self, attempt: Attempt, code: int, now: float) -> float | None:
        """The session could not connect: seconds for which it is ejected from now on; None if nothing changes."""
        self.leave(attempt)
        self.served -= 1
        if code in BLAMELESS:
            return None
        self.fails += 1
        if self._ejected_at and attempt.began <= self._ejected_at:
            return None
        if not self._ejected:
            self._backoff.lasted(now - self._until)
            self._changes(now)
        wait = self._backoff.next()
        self._ejected, self._ejected_at, self._until = True, now, now + wait
        self.why = in_words(code)
        return wait

    def connected(self, attempt: Attempt, now: float) -> bool:
        """A trial went well; whether that ends its ejection."""
        self._tried(attempt)
        return attempt.began > self._ejected_at and self._readmit(now)

    def _readmit(self, now: float) -> bool:
        if not self._ejected:
            return False
        self._ejected = False
        self._until = now
        self._changes(now)
        return True

    def _changes(self, now: float) -> None:
        self._since = now

    # -- what checks find

    def unchecked(self) -> None:
        """Nobody checks it any more: what checks said of it does not stand."""
        self._up, self._in_a_row = True, 0

    def checked(self, why: str, began: float, now: float, fall: int, rise: int) -> bool:
        """A check went well, or not and `why`; whether it is up or down is decided by so many in a row, at the very
        first by one. Whether that changed anything."""
        first = not self._in_a_row
        if why:
            self.failed_checks += 1
            self._in_a_row = min(self._in_a_row, 0) - 1
            if self._up:
                self.why = why
        else:
            self._in_a_row = max(self._in_a_row, 0) + 1
        changed = False
        if self._up and (self._in_a_row <= -fall or (first and why)):
            self._up, changed = False, True
            self._changes(now)
        elif not self._up and self._in_a_row >= rise:
            self._up, changed = True, True
            self._changes(now)
        if not why and began > self._ejected_at:
            changed = self._readmit(now) or changed
        return changed


def shown(place: Place) -> str:
    """A place as an address."""
    family, where = place
    if family == socket.AF_UNIX:
        return str(Address("unix", path="@" + where[1:] if where.startswith("\0") else str(where)))
    return str(Address("tcp", host=str(where[0]), port=int(where[1])))


def in_words(code: int) -> str:
    """An errno for people."""
    return f"{os.strerror(code)} ({name_of(code)})"
