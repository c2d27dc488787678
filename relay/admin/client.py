"""The other side of the admin socket: one question to a running relay, and its answer."""

from __future__ import annotations

import http.client
import json
import os
import socket
from errno import ECONNREFUSED, ENOENT
from typing import Any, NamedTuple

from relay.endpoints.address import Address
from relay.errors import RelayError

PATIENCE = 10.0  # seconds for an answer
LARGEST = 256 << 20  # bytes of one


class NoAnswer(RelayError):
    """No relay answered where it was asked."""


class Answer(NamedTuple):
    """HTTP's status, and the body."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace").strip()

    def data(self) -> Any:
        """The body as JSON. Raises NoAnswer when it is none."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise NoAnswer(f"the answer is no JSON: {self.text[:200]}", hint="is that a relay?") from error


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Address, patience: float) -> None:
        super().__init__("localhost", timeout=patience)
        self._address = address

    def connect(self) -> None:
        """Over the unix socket, or over tcp."""
        to = self._address
        if to.scheme == "tcp":
            self.sock = socket.create_connection((to.host or "localhost", to.port), self.timeout)
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect("\0" + to.path[1:] if to.abstract else to.path)


def ask(
    address: Address, path: str, given: dict[str, Any] | None = None, *, patience: float = PATIENCE
) -> Answer:
    """GET of `path` at `address`, or POST of what is `given`. Raises NoAnswer, which says what to do."""
    connection = _Connection(address, patience)
    try:
        if given is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(given), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(LARGEST))
    except TimeoutError as error:
        raise NoAnswer(
            f"asking {address}: no answer within {patience:g} s", hint="is relay stuck?"
        ) from error
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        hint = "check the permissions: only the user that runs relay may ask"
        if error.errno in (ECONNREFUSED, ENOENT):
            hint = "is relay running there? write --admin ADDRESS for another place"
        raise NoAnswer(f"asking {address}: {said}", hint=hint) from error
    except http.client.HTTPException as error:
        raise NoAnswer(f"asking {address}: {error!r}", hint="is that a relay?") from error
    finally:
        connection.close()
