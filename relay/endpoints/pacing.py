"""Connections within this machine are not paced.

Facts (net/ipv4/tcp_bbr.c, tcp_output.c): under BBR tcp sends at the rate that it believes the path to have, each piece
released by a timer. On the loopback device there is no queue that could be spared by that, and each piece wakes the
receiver by itself: a byte costs up to twice as much. Any process may choose reno, which does not pace; set before a
connection is there, it has never begun. An accepted socket has the algorithm of the one that listened, if that was
chosen.

What this means here: a socket that connects to a loopback address, or listens on one, gets reno where the system's own
choice is BBR. Connections to other machines keep what the system says.
"""

from __future__ import annotations

import contextlib
import socket
from functools import cache
from ipaddress import ip_address
from pathlib import Path

CHOICE = Path("/proc/sys/net/ipv4/tcp_congestion_control")


@cache
def paced() -> bool:
    """Whether this system's tcp paces what it sends."""
    try:
        return CHOICE.read_text().startswith("bbr")
    except OSError:
        return False


def within(host: str) -> bool:
    """Whether the address (in figures) is a loopback one."""
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def unpace(sock: socket.socket, host: str) -> None:
    """Before `sock` connects to `host`, or listens there: without pacing if that is within this machine."""
    if paced() and within(host):
        with contextlib.suppress(OSError):  # it works as it is, only dearer
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
