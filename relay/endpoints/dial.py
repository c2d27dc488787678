"""Where a duplex route connects to, made ready once for many connections.

Facts: a socket is connected with seven system calls, and a route may be asked for thousands of connections a second.

What this means here: places become structs that C connects by (kernel/dial.c).
"""

from __future__ import annotations

import socket
import struct

from relay.endpoints.connecting import Place
from relay.endpoints.liveness import LOOKS, RTO_MAX_MS, keepalive
from relay.endpoints.pacing import paced, within
from relay.endpoints.proxy_header import end_of
from relay.kernel import core


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
