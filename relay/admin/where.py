"""Where a relay is asked: the address that is given, $RELAY_ADMIN, or the socket of this user's session."""

from __future__ import annotations

import os
from collections.abc import Mapping

from relay.endpoints.address import Address, AddressError
from relay.errors import UsageError

VARIABLE = "RELAY_ADMIN"
NAME = "relay.sock"


def default_place(environment: Mapping[str, str] = os.environ) -> Address | None:
    """Where `serve` listens without an `admin` in its configuration, and commands ask; None where nothing says.

    Raises UsageError when the variable holds no address of a socket.
    """
    given = environment.get(VARIABLE, "")
    if given:
        return parsed(given, f"${VARIABLE}")
    directory = environment.get("XDG_RUNTIME_DIR", "")
    if not directory or not directory.startswith("/"):
        return None
    try:
        return Address.parse(f"unix://{directory}/{NAME}")
    except AddressError:
        return None  # too long a path


def parsed(text: str, whose: str) -> Address:
    """The address that `text` says; a plain path is that of a unix socket. Raises UsageError."""
    try:
        address = Address.parse(text)
        if address.scheme == "file":
            address = Address.parse(f"unix://{address.path}")
    except AddressError as error:
        raise UsageError(f"{whose}: {error}") from error
    if address.scheme not in ("unix", "tcp"):
        raise UsageError(f"{whose}: a relay is asked over unix:///path or tcp://host:port, not {address}")
    return address


def place_to_ask(given: str | None) -> Address:
    """Where a command asks: at `given`, or the default. Raises UsageError when nothing says where."""
    if given:
        return parsed(given, "--admin")
    found = default_place()
    if found is None:
        raise UsageError(
            f"where is the relay? neither ${VARIABLE} nor $XDG_RUNTIME_DIR is set; write --admin unix:///path"
        )
    return found
