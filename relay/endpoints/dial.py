"""Where a duplex route connects to, looked up once for many connections.

Facts: a name may stand for several addresses, and for others tomorrow; looking it up may take seconds. A socket is
connected with seven system calls, and a route may be asked for thousands of connections a second.

What this means here: addresses become structs that C connects by (kernel/dial.c). An address in figures and a path
are made into one at the start; a name is looked up on a thread when it is needed, and again when the answer is
older than KEEP. Whoever comes meanwhile waits for the answer.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

from relay.endpoints import tcp, unix
from relay.endpoints.address import Address
from relay.endpoints.connecting import Place
from relay.endpoints.liveness import LOOKS, RTO_MAX_MS, keepalive
from relay.endpoints.pacing import paced, within
from relay.endpoints.proxy_header import end_of
from relay.engine import Engine
from relay.kernel import core

KEEP = 5.0  # seconds for which the answer about a name is good

Answer = Callable[[list[core.Struct], str], None]


def dial_of(place: Place, dead_after: float) -> core.Struct:
    """The `struct relay_dial` for an address family and what connect() takes there."""
    family, where = place
    if family == socket.AF_UNIX:
        raw = struct.pack("=H", family) + where.encode(errors="surrogateescape")
        if not where.startswith("\0"):
            raw += b"\0"
    elif family == socket.AF_INET:
        raw = struct.pack("=H", family) + struct.pack("!H4s8x", where[1], socket.inet_aton(where[0]))
    else:
        raw = (
            struct.pack("=H", family)
            + struct.pack("!HI16s", where[1], where[2], socket.inet_pton(family, where[0].partition("%")[0]))
            + struct.pack("=I", where[3])
        )
    dial = core.new("dial", place_size=len(raw), family=family, tcp=int(family != socket.AF_UNIX))
    core.ffi.memmove(dial.place, raw, len(raw))
    dial.unpaced = int(family != socket.AF_UNIX and paced() and within(where[0]))
    dial.idle, dial.interval, dial.count = keepalive(dead_after)
    low, high = RTO_MAX_MS
    dial.longest_ms = min(high, max(low, int(dead_after * 1000 / LOOKS)))
    return dial


TRANSPARENT = "connecting from somebody else's address takes CAP_NET_ADMIN or CAP_NET_RAW"


def sockaddr_from(peer: str) -> bytes:
    """What bind() takes to connect from the address of `peer`, named as in records, with a port of the kernel's choice.

    Empty for a peer that has no address.
    """
    end = end_of(peer)
    if end is None:
        return b""
    if end[0].version == 4:
        return struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 0, end[0].packed)
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16sI", 0, 0, end[0].packed, 0)


class Dials:
    """The structs for `address`, on one engine. `get(answer)` calls `answer(dials, reason)`, now or later;
    `dials` is empty when the name cannot be looked up, for that reason.
    """

    def __init__(self, engine: Engine, address: Address, dead_after: float) -> None:
        self._engine = engine
        self._address = address
        self._dead_after = dead_after
        self._waiting: list[Answer] = []
        self._looking = False
        self._dials: list[core.Struct] = []
        self._until = 0.0
        if address.scheme == "unix":
            self._found([(socket.AF_UNIX, unix.place(address))])
            self._until = float("inf")
        elif tcp.is_numeric(address.host):
            self._found(tcp.lookup(address.host, address.port))
            self._until = float("inf")

    def get(self, answer: Answer) -> None:
        """Calls `answer` with the addresses, in the order in which they are to be tried."""
        if self._engine.now < self._until:
            answer(self._dials, "")
            return
        self._waiting.append(answer)
        if not self._looking:
            self._looking = True
            host, port = self._address.host, self._address.port
            self._engine.work(lambda: tcp.lookup(host, port), self._answered)

    def _answered(self, places: list[Place] | None, failed: BaseException | None) -> None:
        self._looking = False
        reason = ""
        if failed is not None or not places:
            why = failed.strerror if isinstance(failed, socket.gaierror) else str(failed)
            reason = f"looking up {self._address.host!r}: {why}"
            found: list[core.Struct] = []
        else:
            self._found(places)
            self._until = self._engine.now + KEEP
            found = self._dials
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer(found, reason)

    def _found(self, places: list[Place]) -> None:
        self._dials = [dial_of(place, self._dead_after) for place in places]
