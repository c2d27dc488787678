"""Addresses: the one way to write where bytes come from and where they go.

    tcp://host:port     tcp://[::1]:9000, tcp://:9000 (all interfaces), port 0 for any free one
    unix:///path        unix://relative/path, unix://@name for an abstract socket
    file:///path        or a plain path; file://relative/path too
    fifo:///path        a named pipe
    shared:///path      blocks of shared memory, over the unix socket there; shared://@name, too
    fd://3              a descriptor that relay was started with
    systemd://name      a listening socket that relay was started with (endpoints/passed.py)
    null:               nothing: an empty source, a sink that forgets
    -                   stdin for a source, stdout for a sink

An address is text and numbers: making one opens nothing and resolves no name. Paths are taken as they are;
there is no percent-encoding to undo.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Any, Literal, get_args

from relay.errors import RelayError, did_you_mean

Scheme = Literal["tcp", "unix", "file", "fifo", "shared", "fd", "systemd", "null", "stdio"]

_FORMS = {
    "tcp": "tcp://host:port",
    "unix": "unix:///path or unix://@name",
    "file": "file:///path or the plain path",
    "fifo": "fifo:///path",
    "shared": "shared:///path or shared://@name",
    "fd": "fd://N",
    "systemd": "systemd://name",
    "null": "null:",
    "stdio": "-",
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SHORT_OF_SLASHES = re.compile(r"(tcp|unix|file|fifo|shared|fd|systemd|null|stdio):(.*)", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):([0-9]{1,5})")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_PASSED = re.compile(
    r"[^:/\s\x00-\x1f\x7f]{1,255}(/[0-9]{1,4})?"
)  # as systemd has names, and which of several
_LONGEST_UNIX = 107  # sun_path has 108 bytes: a path needs its closing NUL, an abstract name its leading one


class AddressError(RelayError, ValueError):
    """The text is no address; says what is wrong with it and how to write it."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where bytes enter or leave. Only the fields of its scheme mean anything.

    `host` is a name, an IPv4 or an IPv6 address without brackets, "" for all interfaces. `path` is the path
    of a file, a fifo or a unix socket; an abstract unix socket's begins with "@". `number` is the
    descriptor of `fd://N`.
    """

    scheme: Scheme
    host: str = ""
    port: int = 0
    path: str = ""
    number: int = -1

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `text` says; AddressError if it says none."""
        if not text:
            raise AddressError("the address is empty", hint=f"write one such as {_FORMS['tcp']} or a path")
        if "\0" in text:
            raise AddressError(f"{text!r} holds a NUL byte, which no address can")
        if text == "-":
            return cls("stdio")
        if text == "null:":
            return cls("null")
        if text.startswith("memory:"):
            raise AddressError(
                f"{text!r}: memory belongs to a program",
                hint="use it from code (relay.Memory), or hand it over with shared:///path",
            )
        if matched := _URL.fullmatch(text):
            return cls._of_scheme(text, matched[1], matched[2])
        if matched := _SHORT_OF_SLASHES.fullmatch(text):
            raise AddressError(
                f"{text!r} is not an address",
                hint=f"write {_FORMS[matched[1]]} (or ./{text} for a file of that name)",
            )
        matched = _HOST_AND_PORT.fullmatch(text)
        if matched and int(matched[2]) <= 65535 and not matched[1].isdigit():  # 12:30 is nobody's host
            raise AddressError(
                f"{text!r} could be a host and port or a file",
                hint=f"write tcp://{text}, or ./{text} for the file",
            )
        return cls("file", path=text)

    @classmethod
    def _of_scheme(cls, text: str, scheme: str, rest: str) -> Address:
        match scheme:
            case "tcp":
                host, port = _host_and_port(text, rest)
                return cls("tcp", host=host, port=port)
            case "unix" | "shared":
                name = rest.removeprefix("@")
                if not name:
                    raise AddressError(f"{text!r} names no socket", hint=f"write {_FORMS[scheme]}")
                if len(name.encode(errors="surrogateescape")) > _LONGEST_UNIX:
                    raise AddressError(
                        f"{text!r}: the kernel takes unix paths of at most {_LONGEST_UNIX} bytes",
                        hint="use a shorter path, or one relative to the working directory",
                    )
                return cls("unix" if scheme == "unix" else "shared", path=rest)
            case "file" | "fifo":
                if not rest:
                    raise AddressError(f"{text!r} names no file", hint=f"write {_FORMS[scheme]}")
                return cls("file" if scheme == "file" else "fifo", path=rest)
            case "fd":
                if not (rest.isascii() and rest.isdigit() and len(rest) <= 9):
                    raise AddressError(
                        f"{text!r} names no descriptor", hint="write its number, such as fd://3"
                    )
                return cls("fd", number=int(rest))
            case "systemd":
                if not _PASSED.fullmatch(rest):
                    raise AddressError(
                        f"{text!r} names no socket", hint="write the FileDescriptorName= of its unit"
                    )
                return cls("systemd", path=rest)
            case "null" | "stdio":
                raise AddressError(f"{text!r} is not an address", hint=f"write {_FORMS[scheme]}")
        known = get_args(Scheme)
        guess = did_you_mean(scheme, known)
        raise AddressError(
            f"unknown scheme {scheme!r} in {text!r}{guess}",
            hint=f"known are {', '.join(_FORMS[name] for name in known)}",
        )

    @property
    def abstract(self) -> bool:
        """Whether this is a unix socket that has a name and no file."""
        return self.scheme in ("unix", "shared") and self.path.startswith("@")

    def __str__(self) -> str:
        """The canonical text: `Address.parse(str(address)) == address`."""
        match self.scheme:
            case "tcp":
                host = f"[{self.host}]" if ":" in self.host else self.host
                return f"tcp://{host}:{self.port}"
            case "unix" | "fifo" | "shared" | "systemd":
                return f"{self.scheme}://{self.path}"
            case "file":
                try:
                    plain = Address.parse(self.path) == self
                except AddressError:
                    plain = False
                return self.path if plain else f"file://{self.path}"
            case "fd":
                return f"fd://{self.number}"
            case "null":
                return "null:"
            case "stdio":
                return "-"

    @classmethod
    def of(cls, value: object) -> Address:
        """`value` itself if it is an address, the one it says if it is text; ValueError otherwise."""
        if isinstance(value, Address):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        raise AddressError(f"expected an address such as tcp://127.0.0.1:9000 or a path, got {value!r}")

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> Any:
        from pydantic_core import core_schema  # only where models are built: an address alone must stay cheap

        return core_schema.no_info_plain_validator_function(
            cls.of, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: Any, _handler: Any) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}


def _host_and_port(text: str, rest: str) -> tuple[str, int]:
    """The two halves of what stands behind tcp://, each checked."""
    form = f"write {_FORMS['tcp']}"
    if rest.startswith("["):
        host, closed, tail = rest[1:].partition("]")
        if not closed:
            raise AddressError(f"{text!r} has '[' without ']'", hint="write tcp://[::1]:9000")
        if not _is_ip(socket.AF_INET6, host.partition("%")[0]):
            raise AddressError(
                f"{host!r} in {text!r} is not an IPv6 address",
                hint="brackets hold IPv6 only: tcp://[::1]:9000",
            )
        if not tail.startswith(":"):
            raise AddressError(f"{text!r} has no port", hint=f"write tcp://[{host}]:PORT")
        digits = tail[1:]
    else:
        host, colon, digits = rest.rpartition(":")
        if not colon:
            raise AddressError(f"{text!r} has no port", hint=form)
        if ":" in host:
            inner = rest if _is_ip(socket.AF_INET6, rest) else host
            raise AddressError(
                f"{text!r} has more than one ':'",
                hint=f"an IPv6 address needs brackets: tcp://[{inner}]:PORT",
            )
        if host == "*":
            raise AddressError(f"'*' in {text!r} is not a host", hint=f"all interfaces are tcp://:{digits}")
        if host and not _HOST.fullmatch(host) and not host.isidentifier():
            raise AddressError(f"{host!r} in {text!r} is not a host name", hint=form)
        if host and re.fullmatch(r"[0-9.]+", host) and not _is_ip(socket.AF_INET, host):
            raise AddressError(
                f"{host!r} in {text!r} is not an IPv4 address", hint="it needs four numbers from 0 to 255"
            )
    if not digits:
        raise AddressError(f"{text!r} has no port", hint=form)
    if not (digits.isascii() and digits.isdigit()):
        raise AddressError(f"port {digits!r} in {text!r} is not a number", hint=form)
    if len(digits.lstrip("0")) > 5 or int(digits) > 65535:
        raise AddressError(f"port {digits} in {text!r} is out of range", hint="ports go from 0 to 65535")
    return host, int(digits)


def _is_ip(family: socket.AddressFamily, host: str) -> bool:
    try:
        socket.inet_pton(family, host)
    except (OSError, ValueError):
        return False
    return True
