"""What `relay doctor` answers with faults injected, and what it says on a kernel as it should be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from forked import become

from relay.doctor import ends
from relay.kernel.pipe import Pipe

A_USER = 61_235  # nobody else's, so that its budget of pipe pages is all ours
SOMETHING = {"type": ["number", "null"]}
DOCUMENTED = {
    "type": "object",
    "required": ["machine", "abilities", "matrix", "failures"],
    "properties": {
        "machine": {"type": "object", "required": ["kernel", "relay", "sandbox"]},
        "abilities": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "state", "said", "needed"],
                "properties": {"state": {"enum": ["yes", "less", "no"]}, "needed": {"type": "boolean"}},
            },
        },
        "matrix": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["from", "to", "way", "result", "gb_s", "cpu_s_per_gb", "references"],
                "properties": {
                    "from": {"enum": ["memory", "file", "memfd", "pipe", "unix", "tcp", "process"]},
                    "to": {"enum": ["pipe", "unix", "tcp", "file", "memfd", "process"]},
                    "result": {"enum": ["shared", "copied", "denied"]},
                    "gb_s": SOMETHING,
                    "cpu_s_per_gb": SOMETHING,
                    "references": {"enum": ["held", "none", None]},
                },
            },
        },
        "failures": {"type": "array", "maxItems": 0},
    },
}


@contextlib.contextmanager
def spent_budget() -> Iterator[None]:
    """In a child of another user: all pipe pages of his are taken while the block lasts."""
    become(A_USER)
    held: list[Pipe] = []
    while not held or held[-1].capacity > 2 * 4096:
        held.append(Pipe())
    ends.piece.cache_clear()
    yield
    for pipe in held:
        pipe.close()


def states(document: dict[str, Any]) -> dict[str, str]:
    """The state of each ability."""
    return {one["name"]: one["state"] for one in document["abilities"]}


def results(document: dict[str, Any]) -> dict[tuple[str, str, str], str]:
    """What was found on each row of the matrix."""
    return {(row["from"], row["to"], row["way"]): row["result"] for row in document["matrix"]}


def expected(_source: str, to: str, way: str) -> str:
    """What this kernel does: references go into pipes and sockets, and a memfd's map to another process."""
    by_reference = way in ("vmsplice", "splice", "sendfile", "tee") and to in ("pipe", "unix", "tcp")
    return "shared" if by_reference or way == "passed" else "copied"


def needs(call: str, source: str, to: str, way: str) -> bool:
    """Whether a row cannot be without that call."""
    if call == "splice":  # lent memory goes on to anything but a pipe by splice
        lent_on = way == "vmsplice" and to not in ("pipe", "process")
        return way in ("splice", "vmsplice+splice") or lent_on
    if call == "vmsplice":
        return "vmsplice" in way
    return way == call
