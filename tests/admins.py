"""What tests ask a running relay, over its admin sockets."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from peers import PATIENCE
from relays import Process

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]

SOCKET = "admin.sock"
ADMIN = f"admin: {{socket: 'unix://{SOCKET}', http: 'tcp://127.0.0.1:0'}}\n"
INBOX = """routes:
  inbox:
    source: {listen: 'tcp://127.0.0.1:0'}
    sink: {file: 'inbox/{id}.bin'}
"""


class OverUnix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        """To the path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


def asked(
    where: Path | int,
    path: str,
    given: Any = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
) -> tuple[int, str]:
    """The status and the body of one request, at a unix socket's path or a port of this machine."""
    connection = (
        OverUnix(where)
        if isinstance(where, Path)
        else http.client.HTTPConnection("127.0.0.1", where, timeout=PATIENCE)
    )
    try:
        body = None if given is None else given if isinstance(given, bytes) else json.dumps(given)
        connection.request(method or ("GET" if given is None else "POST"), path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def figures(where: Path | int) -> Figures:
    """What /metrics says: the value by name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    status, text = asked(where, "/metrics")
    assert status == 200, text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def figure(found: Figures, name: str, **labels: str) -> float:
    """The sum of the samples of that name with these labels among theirs."""
    matching = [
        value
        for (each, having), value in found.items()
        if each == name and set(labels.items()) <= set(having)
    ]
    assert matching, f"there is no {name} with {labels}"
    return sum(matching)


def send(port: int, data: bytes) -> None:
    """One stream, to its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


def http_port(served: Process) -> int:
    """The port of its admin listener."""
    line = served.until(
        lambda: next(
            (one for one in served.lines if one.get("event") == "admin" and "tcp://" in one["address"]), None
        )
    )
    return int(line["address"].rpartition(":")[2])
