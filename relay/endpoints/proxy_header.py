"""PROXY protocol: the header by which a proxy says for whom it connects, versions 1 and 2, read and made.

Facts (the protocol's description, proxy-protocol.txt of HAProxy):
- Version 1 is a line of at most 107 bytes, `PROXY TCP4 source destination port port` and CR LF; `PROXY UNKNOWN` is
  followed by anything up to the end of its line.
- Version 2 is 16 bytes (a signature of 12, version and command, family and transport, a length), then addresses, then
  records (TLV) that a receiver may pass over. Command LOCAL is the proxy's own connection, for nobody.
- What follows the header belongs to the stream and may come in the same segment. A receiver that expects a header
  must never go on without one: whoever may connect could then say what he likes.

What this means here: `scan` tells how many of the bytes at hand belong to the header, so that no more than these are
taken from the socket, and finds out at the first wrong byte that this is none. Addresses are written as records
name a peer: `1.2.3.4:5`, `[::1]:5`. Where a header names no tcp addresses, those of the connection itself hold.
"""

from __future__ import annotations

import re
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, NamedTuple

Version = Literal["v1", "v2"]
IP = IPv4Address | IPv6Address

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LINE = b"PROXY "
LONGEST_LINE = 107  # bytes, with its CR LF
LONGEST = 4096  # bytes of a version 2 header with all its records
FIXED = 16  # bytes of version 2 that say how many follow

_START = struct.Struct("!12sBBH")
_FAMILIES = {1: 12, 2: 36, 3: 216}  # bytes of both addresses and ports: IPv4, IPv6, unix
_STREAM, _DATAGRAM = 1, 2
_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")


class Malformed(ValueError):
    """The bytes are no PROXY header; the message says what is wrong with them."""


class Origin(NamedTuple):
    """For whom a proxy connects and where that one had connected to; empty where the header does not say."""

    peer: str = ""
    local: str = ""


def scan(data: bytes) -> tuple[int, bool]:
    """How many of the first bytes of a connection belong to its header, and whether it is whole with them.

    Raises Malformed as soon as they cannot be the beginning of one.
    """
    if data[:6] == LINE[: len(data)]:
        return _scan_line(data)
    if data[:12] == SIGNATURE[: len(data)]:
        return _scan_binary(data)
    raise Malformed("it does not begin with a PROXY header")


def _scan_line(data: bytes) -> tuple[int, bool]:
    end = data.find(b"\n", 0, LONGEST_LINE)
    if end < 0:
        if len(data) >= LONGEST_LINE:
            raise Malformed(f"its PROXY line has more than {LONGEST_LINE} bytes")
        return len(data), False
    if data[end - 1 : end] != b"\r":
        raise Malformed("its PROXY line does not end with CR LF")
    return end + 1, True


def _scan_binary(data: bytes) -> tuple[int, bool]:
    if len(data) > 12 and data[12] not in (0x20, 0x21):
        raise Malformed(f"version and command 0x{data[12]:02x} of its PROXY header are unknown")
    if len(data) < FIXED:
        return len(data), False
    size = FIXED + struct.unpack_from("!H", data, 14)[0]
    if size > LONGEST:
        raise Malformed(f"its PROXY header has {size} bytes, {LONGEST} are read")
    return min(size, len(data)), len(data) >= size


def parse(header: bytes) -> Origin:
    """What a whole header says. Raises Malformed."""
    length, whole = scan(header)
    if not whole or length != len(header):
        raise Malformed("its PROXY header is not whole" if not whole else "there is more than a PROXY header")
    return _parse_binary(header) if header[:1] == b"\r" else _parse_line(header)


def _parse_line(header: bytes) -> Origin:
    words = header[:-2].split(b" ")
    if words[1] == b"UNKNOWN":
        return Origin()
    if words[1] not in (b"TCP4", b"TCP6") or len(words) != 6:
        raise Malformed(f"its PROXY line is not one: {header[:-2].decode('latin-1')!a}")
    family = IPv4Address if words[1] == b"TCP4" else IPv6Address
    ends = []
    for host, port in ((words[2], words[4]), (words[3], words[5])):
        try:
            address = family(host.decode("ascii"))
        except ValueError:
            raise Malformed(f"{host.decode('latin-1')!a} in its PROXY line is no address") from None
        if not _PORT.fullmatch(port) or int(port) > 65535:
            raise Malformed(f"{port.decode('latin-1')!a} in its PROXY line is no port")
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            raise Malformed("an address in its PROXY line has a scope")
        ends.append(name(address, int(port)))
    return Origin(*ends)


def _parse_binary(header: bytes) -> Origin:
    _signature, command, kind, size = _START.unpack_from(header)
    if command == 0x20:  # LOCAL: whatever else it says is passed over
        return Origin()
    family, transport = kind >> 4, kind & 15
    if family > 3 or transport > _DATAGRAM:
        raise Malformed(f"family and transport 0x{kind:02x} of its PROXY header are unknown")
    if size < _FAMILIES.get(family, 0):
        raise Malformed(f"its PROXY header ends within the addresses: {size} bytes of them")
    if family not in (1, 2) or transport != _STREAM:
        return Origin()
    wide = 4 if family == 1 else 16
    raw = header[FIXED : FIXED + _FAMILIES[family]]
    ports = struct.unpack_from("!HH", raw, 2 * wide)
    ends = [ip_address(raw[:wide]), ip_address(raw[wide : 2 * wide])]
    return Origin(*(name(address, port) for address, port in zip(ends, ports, strict=True)))


def name(address: IP, port: int) -> str:
    """How an address and a port are named in records; IPv4 in IPv6's clothes is IPv4."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def end_of(name: str) -> tuple[IP, int] | None:
    """The address and port of a peer named as records do; None for one that has none, such as a unix peer."""
    host, colon, port = name.rpartition(":")
    try:
        return ip_address(host.strip("[]").partition("%")[0]), int(port) if colon else 0
    except ValueError:
        return None


def make(version: Version, peer: str, local: str) -> bytes:
    """The header for a connection that `peer` made to `local`, both named as in records.

    Where one of them has no address, as unix sockets have none, the header says so.
    """
    source, destination = end_of(peer), end_of(local)
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n" if version == "v1" else _START.pack(SIGNATURE, 0x21, 0x00, 0)
    addresses = [source[0], destination[0]]
    if len({address.version for address in addresses}) > 1:
        addresses = [_mapped(address) for address in addresses]
    ports = (source[1], destination[1])
    four = addresses[0].version == 4
    if version == "v1":
        words = [f"TCP{4 if four else 6}", *map(str, addresses), *map(str, ports)]
        return f"PROXY {' '.join(words)}\r\n".encode()
    body = b"".join(address.packed for address in addresses) + struct.pack("!HH", *ports)
    return _START.pack(SIGNATURE, 0x21, 0x11 if four else 0x21, len(body)) + body


def own(version: Version) -> bytes:
    """The header for a connection that is relay's own, for nobody: a health check."""
    return b"PROXY UNKNOWN\r\n" if version == "v1" else _START.pack(SIGNATURE, 0x20, 0x00, 0)


def local_of(fd: int) -> str:
    """Where the peer of the connection `fd`, which is borrowed, connected to; empty for a unix socket."""
    sock = socket.socket(fileno=fd)
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return ""
        host, port = sock.getsockname()[:2]
        return name(ip_address(host.partition("%")[0]), port)
    finally:
        sock.detach()


def _mapped(address: IP) -> IPv6Address:
    return address if isinstance(address, IPv6Address) else IPv6Address(f"::ffff:{address}")
