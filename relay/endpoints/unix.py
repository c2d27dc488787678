"""Unix stream sockets: `unix:///path`, or `unix://@name` in the abstract namespace.

Facts (man 7 unix):
- bind() makes a file that outlives the process; connecting to one whose owner is gone is ECONNREFUSED.
- bind() gives the file the mode of the socket's own inode, less the umask; the umask is the whole process's.
- An abstract name has no file and no permissions; it is gone with its last descriptor.
- connect() on a nonblocking socket says EAGAIN when the listener's backlog is full, and tells nothing later.
- What waits between two ends counts as the sender's: 208 KiB unless it asks for more, so a pipe of 1 MiB would go out
  in five pieces, each with a wake-up of the receiver and one of the sender.

What this means here: a stale socket file (nobody answers) is replaced; anything else that exists is refused
and left as it is; the file is removed at the end if it is still ours. A sink asks for room for a whole pipe.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from relay.endpoints import passed
from relay.endpoints.address import Address
from relay.endpoints.base import hint
from relay.endpoints.connecting import Connecting
from relay.endpoints.listening import BACKLOG, Bound, Key
from relay.endpoints.socket import SocketSink, SocketSource
from relay.engine import Engine
from relay.errors import SourceError
from relay.kernel.pipe import LARGEST_CAPACITY

PATIENCE = 1.0  # seconds to wait for others who listen in the same directory


def place(address: Address) -> str:
    """What bind() and connect() take for the address: a path, or NUL and the abstract name."""
    return "\0" + address.path[1:] if address.path.startswith("@") else address.path


class UnixSink(SocketSink):
    """Connects to a listening unix socket and writes there."""

    counts_fin = False

    def __init__(
        self, engine: Engine, address: Address, *, close_with_peer: bool = False, patience: float = 0.0
    ) -> None:
        super().__init__(engine, str(address), close_with_peer=close_with_peer, patience=patience)
        self._to = address
        self._connecting: Connecting | None = None

    def open(self) -> None:
        """Connects."""
        self._connecting = Connecting(self.engine, [(socket.AF_UNIX, place(self._to))], self._connected)
        if self.state != "opening":
            self._connecting = None

    def _connected(self, sock: socket.socket | None, code: int) -> None:
        self._connecting = None
        if sock is not None:
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_CAPACITY
            )  # as much as the system lets it
            self.adopt(sock)
        else:
            self.not_connected(code)

    def close(self) -> None:
        """Gives up connecting, or closes the connection."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        super().close()


class UnixSource(SocketSource):
    """Connects to a listening unix socket and reads from there."""

    def __init__(self, engine: Engine, address: Address) -> None:
        super().__init__(engine, str(address), None, str(address))
        self.scheme = "unix"
        self._to = address
        self._connecting: Connecting | None = None
        self._settled = False

    def open(self) -> None:
        """Connects; then on_open, or on_fail."""
        self._settled = False
        connecting = Connecting(self.engine, [(socket.AF_UNIX, place(self._to))], self._connected)
        self._connecting = None if self._settled else connecting

    def _connected(self, sock: socket.socket | None, code: int) -> None:
        self._connecting, self._settled = None, True
        if sock is None:
            self.on_fail(self.error("connecting to", code))
            return
        self._sock = sock
        sock.setblocking(False)
        super().open()

    def close(self, *, reset: bool = False) -> None:
        """Gives up connecting, or closes the connection."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        super().close(reset=reset)


def key(address: Address) -> Key:
    """Names the socket that listens there."""
    return ("unix", address.path)


def bind(
    address: Address,
    *,
    mode: int | None = None,
    owner: int = -1,
    group: int = -1,
    take: Callable[[Key], Bound | None] = lambda _key: None,
) -> list[Bound]:
    """Listens; the file gets `mode` before anybody can connect, and `owner` and `group` (ids, -1: as it is).

    `take` may know a socket that listens there already. Raises SourceError when the path holds something that is no
    stale socket.
    """
    bound = take(key(address))
    if bound is not None:
        dress(address, mode=mode, owner=owner, group=group)
        return [bound]
    if address.scheme == "systemd":
        raise SourceError(
            str(address),
            "listening on",
            0,
            "start relay by the unit of that socket, such as relay.socket, or by systemd-socket-activate",
            reason="no socket was passed",
        )
    given = passed.take(address, socket.AF_UNIX)
    if given is not None:
        return [Bound(given, str(address), key(address), passed=True)]
    named = not address.path.startswith("@")
    with _alone(address.path) if named else contextlib.nullcontext():
        if named:
            _make_way(address)
        return [_listen(address, mode, owner, group, named=named)]


def _listen(address: Address, mode: int | None, owner: int, group: int, *, named: bool) -> Bound:
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise SourceError(str(address), "listening on", error.errno or 0, hint(error.errno or 0)) from error
    try:
        if mode is not None and named:
            os.fchmod(sock.fileno(), 0o600)  # nobody but the owner may connect between bind and chmod
        sock.bind(place(address))
        dress(address, mode=mode, owner=owner, group=group)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise SourceError(str(address), "listening on", error.errno or 0, hint(error.errno or 0)) from error
    except SourceError:
        sock.close()
        raise
    return Bound(sock, str(address), key(address), address.path if named else "")


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Of relays that find the same stale socket one replaces it, and the others find it answering: each holds a lock on
    the directory meanwhile. Who cannot have that for PATIENCE seconds goes on without."""
    fd = -1
    with contextlib.suppress(OSError):
        fd = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    break
                time.sleep(0.01)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def dress(address: Address, *, mode: int | None, owner: int, group: int) -> None:
    """Gives the socket's file its permissions. Raises SourceError."""
    if address.path.startswith("@"):
        return
    try:
        if owner >= 0 or group >= 0:
            os.chown(address.path, owner, group)
        if mode is not None:
            os.chmod(address.path, mode)  # noqa: PTH101 - a path as given, next to chown
    except OSError as error:
        raise SourceError(str(address), "listening on", error.errno or 0, hint(error.errno or 0)) from error


def _make_way(address: Address) -> None:
    """Removes a stale socket; refuses anything else that exists."""
    try:
        kind = os.lstat(address.path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SourceError(str(address), "looking at", error.errno or 0, hint(error.errno or 0)) from error
    if not stat.S_ISSOCK(kind):
        raise SourceError(
            str(address),
            "listening on",
            errno.EEXIST,
            "it is left as it is: move it away or choose another path",
            reason="the path exists and is not a socket",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            Path(address.path).unlink(missing_ok=True)
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise SourceError(
                    str(address), "looking at", error.errno or 0, hint(error.errno or 0)
                ) from error
    raise SourceError(str(address), "listening on", errno.EADDRINUSE, hint(errno.EADDRINUSE))


def user_id(name: str | int | None) -> int:
    """The uid of a user given by name or number; -1 for None. Raises SourceError when there is no such user."""
    import pwd

    if name is None or isinstance(name, int):
        return -1 if name is None else name
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise SourceError(str(name), "looking up the user", 0, "check 'owner'", reason="unknown") from None


def group_id(name: str | int | None) -> int:
    """The gid of a group given by name or number; -1 for None. Raises SourceError when there is no such group."""
    import grp

    if name is None or isinstance(name, int):
        return -1 if name is None else name
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise SourceError(str(name), "looking up the group", 0, "check 'group'", reason="unknown") from None
