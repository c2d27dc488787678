"""Listening sockets that relay was started with: socket activation, as systemd does it.

Facts (man 3 sd_listen_fds, 5 systemd.socket): LISTEN_FDS descriptors from 3 on are there for the process LISTEN_PID;
LISTEN_FDNAMES has their names, in order, one for all sockets of a unit. Whoever passed them keeps them open: what
connects while relay is not there waits in the backlog, and nobody is reset when relay closes its copy.

What this means here: the descriptors are taken over once, when the program starts, and kept as long as it lives;
whoever listens gets a duplicate. A listener takes the passed socket that is bound where it would bind, and
`systemd://name` means the address of the one of that name. Accepting needs O_NONBLOCK, which belongs to the socket and
is set on it: it was made for this program. The file of a unix socket is its maker's, and stays.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from relay.endpoints.address import Address, AddressError
from relay.errors import UsageError, did_you_mean

FIRST = 3
VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

_sockets: list[tuple[str, socket.socket]] = []  # by name, in the order in which they were passed


def receive(environ: MutableMapping[str, str] = os.environ) -> int:
    """Takes over what was passed to this process, and tells no child of it; how many these are. Once.

    Raises UsageError when one is no listening stream socket.
    """
    given = {name: environ.pop(name, "") for name in VARIABLES}
    if given["LISTEN_PID"] != str(os.getpid()) or not given["LISTEN_FDS"].isdecimal():
        return 0
    count = int(given["LISTEN_FDS"])
    names = given["LISTEN_FDNAMES"].split(":") if given["LISTEN_FDNAMES"] else []
    for number in range(count):
        name = names[number] if number < len(names) else "unknown"
        _sockets.append((name, _listening(FIRST + number, name)))
    return count


def _listening(fd: int, name: str) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"the descriptor {fd} ({name}) that was passed cannot be used: {error}") from error
    what = ""
    if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        what = f"of the family {sock.family}"
    elif sock.type != socket.SOCK_STREAM:
        what = "no stream socket"
    elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        what = "not listening"
    if what:
        sock.detach()
        raise UsageError(
            f"the socket {fd} ({name}) that was passed is {what}",
            hint="the unit of the socket needs ListenStream= and Accept=no",
        )
    return sock


def close() -> None:
    """Lets go of all of them; whoever passed them has its own."""
    while _sockets:
        _sockets.pop()[1].close()


def address_of(sock: socket.socket) -> Address:
    """Where it listens."""
    bound = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        name = os.fsdecode(bound)
        return Address("unix", path="@" + name[1:] if name.startswith("\0") else name)
    host = str(bound[0])
    if host == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        host = ""
    return Address("tcp", host=host, port=int(bound[1]))


def meant(address: Address) -> Address:
    """For `systemd://name`, the address of the socket of that name; as it is where none was passed to this process.

    `systemd://name/1` is the second of several that have one name. Raises AddressError when others were passed.
    """
    if address.scheme != "systemd" or not _sockets:
        return address
    name, _slash, place = address.path.partition("/")
    alike = [sock for each, sock in _sockets if each == name]
    if not alike:
        names = sorted({each for each, _sock in _sockets})
        raise AddressError(
            f"no socket called {name!r} was passed{did_you_mean(name, names)}",
            hint=f"there are {', '.join(names)}: FileDescriptorName= in the unit of the socket gives the name",
        )
    if not place and len(alike) > 1:
        raise AddressError(
            f"{len(alike)} sockets that were passed are called {name!r}",
            hint=f"write {address}/0 to {address}/{len(alike) - 1}, each for a route",
        )
    if int(place or 0) >= len(alike):
        raise AddressError(f"{len(alike)} sockets that were passed are called {name!r}, counted from 0")
    return address_of(alike[int(place or 0)])


def take(address: Address, family: int) -> socket.socket | None:
    """A duplicate of the socket that was passed and listens on `address`, a numeric one; None if none does."""
    for _name, sock in _sockets:
        if sock.family == family and address_of(sock) == address:
            return sock.dup()
    return None


def names() -> list[str]:
    """Of all that were passed, in order."""
    return [name for name, _sock in _sockets]
