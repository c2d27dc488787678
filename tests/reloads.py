"""A configuration that is written anew under a relay that serves, and what it says of that."""

from __future__ import annotations

import itertools
import os
import signal
import socket

from peers import receive_all
from relays import Process

KEPT = '  kept: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "kept-{id}"}}\n'
# below the ports that outgoing connections take, and not those of another run beside this one
PORTS = itertools.count(12_000 + os.getpid() % 280 * 64)


def free_port() -> int:
    """A port that nobody listens on now, nor will by chance: a reload closes and opens it again."""
    for port in PORTS:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("unreachable: the ports do not end")


def connect(port: int) -> socket.socket:
    """A connection to relay."""
    return socket.create_connection(("127.0.0.1", port))


def reload(served: Process, text: str, times: int = 1) -> None:
    """Writes the configuration anew and waits until relay says that it was reloaded."""
    done = len([line for line in served.lines if line.get("event") == "reload"])
    served.config.write_text(text)
    served.signal(signal.SIGHUP)
    served.until(
        lambda: len([line for line in served.lines if line.get("event") == "reload"]) >= done + times
    )


def reloads(served: Process) -> list[dict[str, object]]:
    """The lines about reloads so far."""
    return [line for line in served.lines if line.get("event") == "reload"]


def each(name: str, port: int, file: str, more: str = "") -> str:
    """A route whose connections each make a file."""
    return f'  {name}: {{source: {{listen: "tcp://127.0.0.1:{port}"}}, sink: {{file: "{file}"}}{more}}}\n'


def finish(sock: socket.socket) -> bytes:
    """Ends the stream and waits until relay closes."""
    sock.shutdown(socket.SHUT_WR)
    rest = receive_all(sock)
    sock.close()
    return rest
