"""What may stand behind `listen`, `connect`, `file`, `fifo`, `fd` and `shared`: readers of one value each, and its JSON
Schema. A reader raises ValueError in plain words."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import PlainValidator, WithJsonSchema

from relay.endpoints import passed
from relay.endpoints.address import Address, AddressError
from relay.endpoints.template import check_path
from relay.units import show


def _socket(verb: str, value: object) -> Address:
    address = Address.of(value)
    if address.scheme not in ("tcp", "unix"):
        fits = address.scheme in ("file", "fifo", "fd")
        way = (
            f"write {address.scheme}: {show(address.path or address.number)}"
            if fits
            else "write the plain address"
        )
        raise AddressError(f"'{verb}' takes a tcp or unix address, got {str(address)!r}", hint=way)
    return address


def read_listening(value: object) -> Address:
    """Where a socket listens."""
    address = Address.of(value)
    if address.scheme == "systemd":
        return passed.meant(address)
    return _socket("listen", value)


def read_connecting(value: object) -> Address:
    """Where a socket connects to."""
    address = _socket("connect", value)
    if address.scheme == "tcp" and not address.port:
        raise AddressError(
            f"port 0 in {str(address)!r} is for listening only", hint="give the port of the peer"
        )
    if address.scheme == "tcp" and not address.host:
        hint = f"this machine is tcp://127.0.0.1:{address.port}"
        raise AddressError(f"{str(address)!r} names no host to connect to", hint=hint)
    return address


def _path(scheme: Literal["file", "fifo"], value: object) -> Address:
    if isinstance(value, Address) and value.scheme == scheme:
        return value
    if not isinstance(value, str):
        quote = "; put it in quotes" if isinstance(value, int | float) else ""
        raise AddressError(f"expected the path of a {scheme}, got {show(value)}{quote}")
    if not value or "\0" in value:
        raise AddressError(f"{value!r} is not a path", hint=f"write the path of a {scheme}")
    if value == "-" or value == "null:":
        raise AddressError(
            f"{value!r} is not the path of a {scheme}",
            hint=f"write the plain address {value!r} in place of the mapping",
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        address = Address.parse(value)
        if address.scheme != scheme:
            raise AddressError(f"'{scheme}' takes a path, got the {address.scheme} address {value!r}")
        return address
    return Address(scheme, path=value)


def read_file(value: object) -> Address:
    """The path of a file."""
    return _path("file", value)


def read_template(value: object) -> Address:
    """The path of a file, with placeholders."""
    address = _path("file", value)
    check_path(address.path)
    if address.path.endswith("/"):
        raise AddressError(
            f"{address.path!r} is a directory", hint="add a file name, such as {time}-{id}.bin"
        )
    return address


def read_shared(value: object) -> Address:
    """Where the consumer of shared memory listens."""
    address = Address.of(value)
    if address.scheme not in ("shared", "unix"):
        raise AddressError(
            f"'shared' takes the address of a unix socket, got {str(address)!r}",
            hint="write unix:///path or unix://@name",
        )
    return Address("shared", path=address.path)


def read_fifo(value: object) -> Address:
    """The path of a named pipe."""
    return _path("fifo", value)


def read_descriptor(value: object) -> Address:
    """The number of a descriptor."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Address("fd", number=value)
    if isinstance(value, Address) or (isinstance(value, str) and value.startswith("fd:")):
        address = Address.of(value)
        if address.scheme == "fd":
            return address
    raise AddressError(f"expected the number of a descriptor, such as 3, got {show(value)}")


SOCKET_JSON = WithJsonSchema({"type": "string", "pattern": r"^(tcp|unix)://|\$\{"})
LISTEN_JSON = WithJsonSchema({"type": "string", "pattern": r"^(tcp|unix|systemd)://|\$\{"})
SHARED_JSON = WithJsonSchema({"type": "string", "pattern": r"^(unix|shared)://|\$\{"})
PATH_JSON = WithJsonSchema({"type": "string", "minLength": 1})
FD_JSON = WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^fd://|\$\{"}]}
)

ListenAddress = Annotated[Address, PlainValidator(read_listening), LISTEN_JSON]
ConnectAddress = Annotated[Address, PlainValidator(read_connecting), SOCKET_JSON]
_ADDRESS_JSON = {"type": "string", "pattern": r"^(tcp|unix)://|\$\{"}
SOCKETS_JSON = WithJsonSchema(
    {"anyOf": [_ADDRESS_JSON, {"type": "array", "items": _ADDRESS_JSON, "minItems": 1, "uniqueItems": True}]}
)
