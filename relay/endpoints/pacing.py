"""Connections within one machine are not paced.

Facts (net/ipv4/tcp_bbr.c, tcp_output.c; man 7 tcp):
- BBR spreads what it sends by a timer for each burst, on every connection, also where both ends are on one machine
  and nothing between them could be overrun. There the timers are a good part of what sending costs: 1 GiB to four
  receivers by splice took 0.42 CPU-seconds without them and 0.93 with them (docs/benchmarks.md, "Scatter").
- Whoever chose BBR for the machine chose it for its networks. Any process may have reno, connection by connection;
  it sends as the acknowledgements come.
- An accepted connection has the control of the socket that listened.

What this means here: a connection between two addresses of this machine, as far as they show it, uses reno in place
of BBR; so does whatever listens on a loopback address. Others, and those whose system-wide choice does not pace, are
left as they are.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

LOOPBACK = ("127.", "::1", "::ffff:127.")
CHOICE = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def unpace(sock: socket.socket) -> None:
    """Lets a connection send without pacing if its peer is on this machine, or can only be. Only tcp is paced."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # reset meanwhile, or refused by a sandbox: it is paced, then
        own = sock.getsockname()[0]
        if not own.startswith(LOOPBACK) and own != sock.getpeername()[0]:
            return
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def needless(host: str) -> bool:
    """Whether a connection to `host`, an address in figures, would be paced although it stays on this machine."""
    if not host.startswith(LOOPBACK):
        return False
    with contextlib.suppress(OSError):
        return CHOICE.read_text().startswith("bbr")
    return False
