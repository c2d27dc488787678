"""Which upstream a new connection gets, and which others would have come before it.

Fact (Thaler and Ravishankar, 1998): give each pair of a client and a server a number that looks random, and each
client the server with its highest number. When a server goes, its clients alone move, to servers spread over all the
others, and they come back when it does. Nothing needs to be remembered.

What this means here: `source_hash` keeps no table. All four choices are functions of what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

from relay.endpoints.options import Balance


class Weighed(Protocol):
    """An upstream as a choice sees it: its sessions, connecting or open, and what its hashes are made with."""

    sessions: int
    seed: bytes


One = TypeVar("One", bound=Weighed)


def seed_of(name: str) -> bytes:
    """What the hashes of the upstream of that name are made with: the same in every relay that knows it so."""
    return blake2b(name.encode(errors="surrogateescape"), digest_size=16).digest()


def client_of(peer: str) -> bytes:
    """Whose connections stay together: a tcp peer's host. A unix peer is a process, `pid:N`."""
    host = peer if peer.startswith("pid:") else peer.rpartition(":")[0] or peer
    return host.encode(errors="surrogateescape")


def weight(client: bytes, seed: bytes) -> bytes:
    """The number of a client with an upstream: the highest wins."""
    return blake2b(client, digest_size=8, key=seed).digest()


def choose(balance: Balance, usable: Sequence[One], peer: str, turn: int) -> One:
    """One of `usable`, of which there is at least one, in the order of the configuration. `turn` counts up with every
    choice."""
    if len(usable) == 1 or balance == "first":
        return usable[0]
    if balance == "round_robin":
        return usable[turn % len(usable)]
    if balance == "least_connections":
        first = turn % len(usable)  # of those that have as few they take turns
        return min((*usable[first:], *usable[:first]), key=lambda one: one.sessions)
    client = client_of(peer)
    return max(usable, key=lambda one: weight(client, one.seed))


def passed_over(balance: Balance, chosen: One, everyone: Sequence[One], peer: str) -> list[One]:
    """Those of `everyone` that might have been chosen in place of `chosen`, had they been usable."""
    if balance == "first":
        return list(everyone[: everyone.index(chosen)])
    if balance == "source_hash":
        client = client_of(peer)
        least = weight(client, chosen.seed)
        return [one for one in everyone if weight(client, one.seed) > least]
    return [one for one in everyone if one is not chosen]
