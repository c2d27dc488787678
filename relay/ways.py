"""Which method a hop gets, and why in words: the one place that chooses, for plans and for pipelines.

A hop is a source into the chain, a tee, or a node out to its sink. What a kind of end can do is known from its
kind (docs/kernel-facts.md says how); what the machine allows is probed; `method` on the route or the command
may force a way. Pure: nothing is opened here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from relay.kernel.probe import Machine

Forced = Literal["auto", "zero-copy", "copy", "sendfile", "splice", "vmsplice"]
Method = Literal["splice", "tee", "sendfile", "vmsplice", "copy"]

STRAIGHT = ("tcp", "unix", "fifo")  # sinks that a file may reach by sendfile when nothing else is on the way
PAGED = (
    "fifo",
    "stdio",
    "fd",
)  # sources that were written into a pipe: single pages, however large the writes
APPENDING = "a file opened to append refuses splice"
STRAIGHT_TO_FILE = "into memory that files are written from: splice would copy into the page cache, too"
REFERENCES = "pages move by reference; what that costs is measured as they do"
SMALL_ONES = "messages so small cost less to copy than a slot in every pipe"
DIRECT = "O_DIRECT takes whole, aligned blocks: bytes are gathered in memory first"


@dataclass(frozen=True)
class Choice:
    """A method and its reason."""

    method: Method
    reason: str

    def __str__(self) -> str:
        return f"{self.method} ({self.reason})"


class Pieces(NamedTuple):
    """How a stream's first bytes came: `first` is the mean size of the first slot in a pipe, `filled` of all that came
    at a time. Zeros: it was not seen."""

    first: int = 0
    filled: int = 0


UNSEEN: Final = Pieces()
SMALL: Final = 1024  # bytes: such messages are copied for less than a slot costs in every pipe
FEW_TO_TCP: Final = 20 << 10  # bytes at a time: to tcp a copy costs less than passing them on
FEW_TO_NULL: Final = 40 << 10  # bytes at a time: references cost more than dropping a copy of them
PLENTY: Final = 768 << 10  # bytes at a time: more than there is room for


def thought(source: str, sinks: Sequence[str], pieces: Pieces = UNSEEN) -> tuple[float, str]:
    """What copying is thought to cost between ends of those schemes, as a multiple of references, and why.

    Between pipes and unix sockets references cost a small part of a copy; tcp spends a good deal either way. Files are
    filled by copying in any case, and out of pipes page by page. From docs/benchmarks.md.
    """
    several = len(sinks) > 1
    small = 0 < pieces.first <= SMALL
    paged = source in PAGED
    if "file" in sinks:
        return (0.7 if source in ("tcp", "unix") else 0.85), STRAIGHT_TO_FILE
    if several and set(sinks) == {"tcp"} and (source == "file" or (paged and pieces.filled >= PLENTY)):
        return 0.9, "into memory that all sinks are sent from: fewer, larger sends than page by page"
    if list(sinks) == ["null"] and (source == "unix" or (paged and 0 < pieces.filled <= FEW_TO_NULL)):
        return 0.7, "into one piece of memory: that costs less than references that nobody takes"
    if small and source in ("tcp", "unix") and set(sinks) <= {"tcp", "unix"}:
        return 0.8, SMALL_ONES
    if small and source == "unix" and pieces.first * len(sinks) <= 2 * SMALL:
        return 0.9, SMALL_ONES  # to more pipes, the copies into each cost as much
    if 0 < pieces.filled <= FEW_TO_TCP and (paged or source == "tcp") and set(sinks) == {"tcp"}:
        return 0.9, "few bytes at a time cost less to copy than to pass on by reference"
    if "tcp" in sinks:
        return (1.9 if several else 1.3), REFERENCES
    return 8.0, REFERENCES


@dataclass(frozen=True)
class Ways:
    """The choices for one route: what was asked for, on this machine."""

    machine: Machine
    forced: Forced = "auto"

    def _copies(self, call: str) -> str:
        if self.forced == "copy":
            return "asked for by method: copy"
        return self.machine.refused(call)

    def from_source(self, scheme: str, *, copies: str = "", alone: str = "") -> Choice:
        """How bytes enter. `copies` is why this end cannot be spliced; `alone`: the scheme of the only sink, one of
        STRAIGHT, when no stages are on the way."""
        if scheme == "null":
            return Choice("splice", "there is nothing to move")
        if reason := self._copies("splice"):
            return Choice("copy", reason)
        if copies:
            return Choice("copy", copies)
        if scheme == "shared":
            return Choice(
                "copy", "out of slots that their producer writes again; final memory goes by reference"
            )
        if scheme == "memory" or (scheme == "file" and self.forced == "vmsplice"):
            refused = self.machine.refused("vmsplice")
            reason = (
                "asked for" if self.forced == "vmsplice" else "pages that nobody writes to again are lent"
            )
            return Choice("copy", refused) if refused else Choice("vmsplice", reason)
        # to a unix socket the 16 slots of sendfile's own pipe cost 1.1 of a large pipe's
        fits = alone and (alone != "unix" or self.forced == "sendfile")
        if scheme == "file" and fits and self.forced in ("auto", "zero-copy", "sendfile"):
            refused = self.machine.refused("sendfile")
            if not refused:
                return Choice("sendfile", "a file straight to one socket needs no pipe")
            if self.forced == "sendfile":
                return Choice("splice", refused)
        if self.forced == "sendfile":
            return Choice("splice", "sendfile takes a file straight to one socket, with nothing between")
        if self.forced == "vmsplice":
            return Choice("splice", "vmsplice lends memory, or a file mapped into it")
        if scheme == "file":
            return Choice("splice", "page-cache pages go into the pipe by reference")
        return Choice("splice", "pages move into the pipe by reference")

    def straight(self, scheme: str) -> Choice | None:
        """How a socket's bytes reach a file when nothing else is on the way; None where they go through a pipe."""
        if reason := self._copies("splice"):
            return Choice("copy", reason)
        if self.forced != "auto" or scheme not in ("tcp", "unix"):
            return None
        return Choice("copy", STRAIGHT_TO_FILE)

    def tee(self) -> Choice:
        """How the stream is doubled."""
        if reason := self._copies("tee") or self.machine.refused("splice"):
            return Choice("copy", reason)
        return Choice("tee", "both pipes refer to the same pages")

    def to_sink(self, scheme: str, *, copies: str = "") -> Choice:
        """How bytes leave. `copies` is why this end cannot be spliced."""
        if reason := self._copies("splice"):
            return Choice("copy", reason)
        if copies:
            return Choice("copy", copies)
        if scheme == "file":
            return Choice("splice", "into the page cache, which the kernel fills once")
        if scheme == "null":
            return Choice("splice", "pages are let go unseen")
        if scheme == "shared":
            return Choice("copy", "into memory that the consumer maps")
        if scheme == "digest":
            return Choice("copy", "a checksum must see the bytes")
        return Choice("splice", "pages move to the end by reference")

    def across(self, source: str, sinks: Sequence[str], pieces: Pieces = UNSEEN) -> Choice:
        """How a stream between ends of those schemes, which may go down a chain or through a ring, begins; and how it
        goes on once its first pieces were seen."""
        if reason := self._copies("splice") or self._copies("tee") * (len(sinks) > 1):
            return Choice("copy", f"{reason}; one read into memory, one send a sink out of it")
        if self.forced != "auto":
            return Choice("splice", f"asked for by method: {self.forced}")
        copying, why = thought(source, sinks, pieces)
        return Choice("copy" if copying < 1 else "splice", why)

    def measured(self, sinks: Sequence[str]) -> bool:
        """Whether such a stream may change on its way, by what it costs."""
        return self.forced == "auto" and not (
            self._copies("splice") or self._copies("tee") * (len(sinks) > 1)
        )

    @staticmethod
    def odds(source: str, sinks: Sequence[str], way: str, pieces: Pieces = UNSEEN) -> float:
        """What the other way than `way` ("chain" or "ring") is thought to cost, as a multiple."""
        copying, _why = thought(source, sinks, pieces)
        return copying if way == "chain" else 1 / copying

    def to_ring(self) -> Choice:
        """How bytes come to a broadcast."""
        return Choice("copy", "into one ring of memory for all subscribers; without any, bytes pass by")

    def from_ring(self) -> Choice:
        """How they go to its subscribers."""
        return Choice("copy", "one send out of the ring, which costs less than pipes of references")

    def duplex(self, scheme: str) -> Choice:
        """How bulk crosses a duplex route towards that kind of socket. Small messages are copied in any case."""
        if reason := self._copies("splice"):
            return Choice("copy", reason)
        if self.forced in ("zero-copy", "splice"):
            return Choice("splice", "asked for by method: zero-copy")
        if scheme == "unix":
            return Choice("copy", "one large buffer costs less than splicing into a unix socket")
        return Choice("splice", "pages move through a pipe by reference; small messages are copied")

    @staticmethod
    def duplex_odds(scheme: str, way: str) -> float:
        """What the other way than `way` is thought to cost there, as a multiple."""
        ring = 0.8 if scheme == "unix" else 1.4
        return ring if way == "chain" else 1 / ring

    @property
    def duplex_measured(self) -> bool:
        """Whether that is where bulk begins, and what it costs decides."""
        return self.forced == "auto" and not self._copies("splice")

    def between(self) -> Choice:
        """How bytes go from one of relay's pipes to the next."""
        if reason := self._copies("splice"):
            return Choice("copy", reason)
        return Choice("splice", "pages move between pipes by reference")
