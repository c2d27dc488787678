"""What is measured: one hop to so many sinks, in pieces of one size, by one method; and what came out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Kind = Literal["pipe", "unix", "tcp", "file", "memory", "null"]
Method = Literal["auto", "splice", "sendfile", "vmsplice", "copy"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

SOURCES: Final[tuple[Kind, ...]] = ("pipe", "unix", "tcp", "file", "memory")
SINKS: Final[tuple[Kind, ...]] = ("pipe", "unix", "tcp", "file", "null")
COUNTS: Final = (1, 4, 16)
SIZES: Final = (512, 64 * KIB, MIB)
WHOLE: Final = MIB  # files and memory are read in pieces of relay's choosing, which is up to this


@dataclass(frozen=True)
class Place:
    """A hop to `sinks` sinks, where whoever feeds the source gives `size` bytes at a time."""

    source: Kind
    to: Kind
    sinks: int
    size: int

    @property
    def hop(self) -> str:
        """How it is named: file-tcp."""
        return f"{self.source}-{self.to}"

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that can carry it; with several sinks `splice` means tee and splice.

        sendfile takes a file to one sink and nothing else; memory is lent or copied.
        """
        if self.source == "memory":
            return ("vmsplice", "copy")
        if self.source != "file":
            return ("splice", "copy")
        straight = self.sinks == 1 and self.to in ("pipe", "unix", "tcp")
        return ("splice", "sendfile", "vmsplice", "copy") if straight else ("splice", "vmsplice", "copy")


@dataclass(frozen=True)
class Figures:
    """What one cell came to, per GiB of the source's stream: a GiB to four sinks counts once.

    `cpu` is seconds of the engine's thread and of the threads that write files for it; `calls` are their system calls
    for payload, and the engine's waits. `bytes` in `seconds` were measured; `moved` went through in all, to each sink.
    `used` is the method by which they went in truth, `measured` what the session's record says of auto's two ways.
    """

    bytes: int
    seconds: float
    cpu_seconds: float
    calls_made: int
    moved: int
    used: str
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def gib_s(self) -> float:
        """GiB of the source's stream a second."""
        return self.bytes / GIB / self.seconds

    @property
    def cpu(self) -> float:
        """CPU seconds a GiB."""
        return self.cpu_seconds / (self.bytes / GIB)

    @property
    def calls(self) -> float:
        """System calls a GiB."""
        return self.calls_made / (self.bytes / GIB)


@dataclass(frozen=True)
class Denied:
    """A cell that this machine does not let happen, and why."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A cell that should have worked and did not, and what went wrong."""

    reason: str


Outcome = Figures | Denied | Failed


@dataclass
class Row:
    """A place with the outcome of every method tried there."""

    place: Place
    outcomes: dict[Method, Outcome]

    def figures(self, method: Method) -> Figures | None:
        """What a method came to; None where it was denied or not tried."""
        outcome = self.outcomes.get(method)
        return outcome if isinstance(outcome, Figures) else None

    def fixed(self) -> dict[Method, Figures]:
        """The methods that were measured, without auto."""
        return {m: f for m, f in self.outcomes.items() if m != "auto" and isinstance(f, Figures)}

    @property
    def failed(self) -> bool:
        """Whether something went wrong here."""
        return any(isinstance(outcome, Failed) for outcome in self.outcomes.values())

    def wrong(self) -> dict[Method, float]:
        """CPU of each method by that of auto: above 1 it would have been wrong to choose it."""
        auto = self.figures("auto")
        if auto is None:
            return {}
        return {m: f.cpu / auto.cpu for m, f in self.fixed().items() if m != auto.used}

    def cells(self) -> Iterator[dict[str, Any]]:
        """For JSON: a cell each method, without auto."""
        for method, outcome in self.outcomes.items():
            if method != "auto":
                yield {**self._where(), "method": method, **_told(outcome)}

    def auto(self) -> dict[str, Any] | None:
        """For JSON: what auto chose and how the other methods compare."""
        auto = self.figures("auto")
        if auto is None:
            return None
        wrong = {method: round(ratio, 3) for method, ratio in self.wrong().items()}
        return {**self._where(), "chose": auto.used, **_told(auto), "wrong": wrong}

    def _where(self) -> dict[str, Any]:
        place = self.place
        return {"from": place.source, "to": place.to, "sinks": place.sinks, "size": place.size}


def _told(outcome: Outcome) -> dict[str, Any]:
    if not isinstance(outcome, Figures):
        word = "denied" if isinstance(outcome, Denied) else "failed"
        return {"gib_s": None, "cpu_s_per_gib": None, "calls_per_gib": None, word: outcome.reason}
    return {
        "gib_s": round(outcome.gib_s, 4),
        "cpu_s_per_gib": round(outcome.cpu, 5),
        "calls_per_gib": round(outcome.calls),
    }


def catalogue(only: Sequence[str] = (), *, quick: bool = False) -> list[Place]:
    """Every place, hop by hop, or those of the hops named; `quick` leaves out 16 sinks and two of the sizes."""
    counts, sizes = (COUNTS[:2], SIZES[1:2]) if quick else (COUNTS, SIZES)
    return [
        Place(source, to, count, size)
        for source in SOURCES
        for to in SINKS
        if not only or f"{source}-{to}" in only
        for count in (counts if to != "null" else counts[:1])
        for size in (sizes if source not in ("file", "memory") else (WHOLE,))
    ]


def hops() -> list[str]:
    """The names of all hops."""
    return [f"{source}-{to}" for source in SOURCES for to in SINKS]
