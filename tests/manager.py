"""A service manager in the test: sockets that it passes, and a socket on which it is notified."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers import PATIENCE
from relays import Process, environment, relay

# What the manager does between fork and exec: descriptors from 3 on, and the variables that go with them.
_PASS = """
import fcntl, os, sys
count = int(sys.argv[1])
given = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100 + 3) for fd in sys.argv[2:2 + count]]
for number, fd in enumerate(given):
    os.dup2(fd, 3 + number)
    os.set_inheritable(3 + number, True)
    os.close(fd)
os.environ.update(LISTEN_FDS=str(count), LISTEN_PID=str(os.getpid()), WATCHDOG_PID=str(os.getpid()))
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""


class Manager:
    """Hears what relay tells: `words` are all datagrams so far, as dictionaries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.words: list[dict[str, str]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.settimeout(PATIENCE)
        self._sock.bind(str(path))

    def hear(self, key: str, value: str = "") -> dict[str, str]:
        """The next datagram with that key (and value)."""
        while True:
            raw = self._sock.recv(65536).decode()
            word = dict(line.partition("=")[::2] for line in raw.split("\n"))
            self.words.append(word)
            if key in word and value in ("", word[key]):
                return word

    def close(self) -> None:
        """Hears nothing more."""
        self._sock.close()


@contextlib.contextmanager
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A manager that is notified on a socket in `tmp_path`."""
    made = Manager(tmp_path / "notify")
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def activated(
    text: str,
    cwd: Path,
    sockets: Sequence[tuple[str, socket.socket]] = (),
    notified: Manager | None = None,
    arguments: Sequence[str] = (),
    prefix: Sequence[str] = (),
    **env: str,
) -> Iterator[Process]:
    """`relay serve` on a configuration, with these sockets (by name) passed and a manager to notify."""
    config = cwd / "relay.yaml"
    config.write_text(text)
    fds = [sock.fileno() for _name, sock in sockets]
    more: dict[str, Any] = dict(env)
    if sockets:
        more.setdefault("LISTEN_FDNAMES", ":".join(name for name, _sock in sockets))
    if notified is not None:
        more["NOTIFY_SOCKET"] = str(notified.path)
    passing = [sys.executable, "-c", _PASS, str(len(fds)), *map(str, fds)]
    with relay(
        "serve",
        "--log-format",
        "json",
        *arguments,
        config,
        cwd=cwd,
        prefix=[*prefix, *passing],
        pass_fds=fds,
        env=environment(**more),
    ) as process:
        process.config = config
        yield process


def listener(host: str = "127.0.0.1") -> socket.socket:
    """A listening tcp socket at a port of the kernel's choice."""
    return socket.create_server((host, 0))


def port_of(sock: socket.socket) -> int:
    """Where it listens."""
    return int(sock.getsockname()[1])


def route(source: str, sink: str = '"null:"', more: str = "") -> str:
    """One route called r."""
    return f'drain: 5s\nroutes:\n  r: {{source: {{listen: "{source}"{more}}}, sink: {sink}}}\n'


def ask(port: int, data: bytes = b"question") -> socket.socket:
    """A connection that has sent `data` and its end."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    return sock


__all__ = ["Manager", "activated", "ask", "listener", "manager", "port_of", "route"]
