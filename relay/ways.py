"""Which method a hop gets, and why in words: the one place that chooses, for plans and for pipelines.

A hop is a source into the chain, a tee, or a node out to its sink. What a kind of end can do is known from its
kind (docs/kernel-facts.md says how); what the machine allows is probed; `method` on the route or the command
may force a way. Pure: nothing is opened here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from relay.kernel.probe import Machine

Forced = Literal["auto", "zero-copy", "copy", "sendfile", "splice", "vmsplice"]
Method = Literal["splice", "tee", "sendfile", "vmsplice", "copy"]

STRAIGHT = ("tcp", "unix", "fifo")  # sinks that a file reaches by sendfile when nothing else is on the way
APPENDING = "a file opened to append refuses splice"
STRAIGHT_TO_FILE = "into memory that files are written from: splice would copy into the page cache, too"
DIRECT = "O_DIRECT takes whole, aligned blocks: bytes are gathered in memory first"


@dataclass(frozen=True)
class Choice:
    """A method and its reason."""

    method: Method
    reason: str

    def __str__(self) -> str:
        return f"{self.method} ({self.reason})"


@dataclass(frozen=True)
class Ways:
    """The choices for one route: what was asked for, on this machine."""

    machine: Machine
    forced: Forced = "auto"

    def _copies(self, call: str) -> str:
        if self.forced == "copy":
            return "asked for by method: copy"
        return self.machine.refused(call)

    def from_source(self, scheme: str, *, copies: str = "", alone: bool = False) -> Choice:
        """How bytes enter. `copies` is why this end cannot be spliced; `alone`: one socket sink, no stages."""
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
        if scheme == "file" and alone and self.forced in ("auto", "zero-copy", "sendfile"):
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

    def across(self, source: str, sinks: Sequence[str]) -> Choice:
        """How a stream between ends of those schemes, which may go down a chain or through a ring, begins."""
        if reason := self._copies("splice") or self._copies("tee") * (len(sinks) > 1):
            return Choice("copy", f"{reason}; one read into memory, one send a sink out of it")
        if self.forced != "auto":
            return Choice("splice", f"asked for by method: {self.forced}")
        if "file" in sinks:
            return Choice("copy", STRAIGHT_TO_FILE)
        if source == "file" and len(sinks) > 1 and set(sinks) == {"tcp"}:
            return Choice("copy", "into memory that all sinks are sent from: fewer, larger sends")
        if source == "unix" and list(sinks) == ["null"]:
            return Choice(
                "copy", "into one piece of memory: that costs less than references that nobody takes"
            )
        return Choice("splice", "pages move by reference; what that costs is measured as they do")

    def measured(self, sinks: Sequence[str]) -> bool:
        """Whether such a stream may change on its way, by what it costs."""
        return self.forced == "auto" and not (
            self._copies("splice") or self._copies("tee") * (len(sinks) > 1)
        )

    @staticmethod
    def odds(source: str, sinks: Sequence[str], way: str) -> float:
        """What the other way than `way` ("chain" or "ring") is thought to cost, as a multiple, by the ends' schemes.

        Between pipes and unix sockets references cost a small part of a copy; tcp spends a good deal either way. Files
        are filled by copying in any case, and out of pipes page by page.
        """
        if "file" in sinks:
            ring = 0.7 if source in ("tcp", "unix") else 0.85
        elif source == "file" and len(sinks) > 1 and set(sinks) == {"tcp"}:
            ring = 0.9
        elif source == "unix" and list(sinks) == ["null"]:
            ring = 0.7
        elif "tcp" in sinks:
            ring = 1.9 if len(sinks) > 1 else 1.3
        else:
            ring = 8.0
        return ring if way == "chain" else 1 / ring

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
