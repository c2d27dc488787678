"""Options that sources and sinks have beside their address: policies, limits, rotation, permissions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, PlainValidator, WithJsonSchema

from relay.settings import FrozenModel, Problem
from relay.units import Duration, Pace, PositiveDuration, PositiveSize, Size, parse_duration, parse_size, show

Policy = Literal["block", "drop", "disconnect", "spill"]
Balance = Literal["round_robin", "least_connections", "source_hash", "first"]
Network = IPv4Network | IPv6Network

INTRODUCED = 5.0  # seconds within which a proxy says for whom it connects
DEAD_AFTER = 15.0  # seconds of silence after which a tcp peer is given up
MEMORY_SPILL = 64 << 20  # bytes that a spill without directory may hold

_AFTER = {"block": 1.0, "drop": 0.2, "disconnect": 5.0}  # seconds


def _mode(value: object) -> int:
    """`0660`, `"660"` and `0o660` are all the permissions rw-rw----: digits of a mode are octal, always."""
    text = (
        str(value).removeprefix("0o") if isinstance(value, str | int) and not isinstance(value, bool) else ""
    )
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError(f"expected permissions such as 0660, got {show(value)}")
    return int(text, 8)


def _network(value: object) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    try:
        if isinstance(value, str):
            return _unmapped(ip_network(value))
    except ValueError as error:
        if "host bits" in str(error) and isinstance(value, str):
            outer = ip_network(value, strict=False)
            raise ValueError(f"{value!r} has bits beyond its prefix; did you mean '{outer}'?") from None
    raise ValueError(f"expected an IP address or a network such as 10.0.0.0/8, got {show(value)}")


def _unmapped(network: Network) -> Network:
    """IPv4 networks that are written as IPv4-mapped IPv6 are IPv4 networks, as their peers are IPv4 peers."""
    first = network.network_address
    if isinstance(first, IPv6Address) and first.ipv4_mapped is not None and network.prefixlen >= 96:
        return IPv4Network((first.ipv4_mapped, network.prefixlen - 96))
    return network


def _account(value: object) -> str | int:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"expected a name or a number, got {show(value)}")


_MODE_JSON = {"anyOf": [{"type": "string", "pattern": r"^(0o?)?[0-7]{3}$|\$\{"}, {"type": "integer"}]}
_ACCOUNT_JSON = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}]}
Mode = Annotated[int, PlainValidator(_mode), WithJsonSchema(_MODE_JSON)]
Account = Annotated[str | int, PlainValidator(_account), WithJsonSchema(_ACCOUNT_JSON)]
NetworkText = Annotated[Network, PlainValidator(_network), WithJsonSchema({"type": "string"})]


class OnSlow(FrozenModel):
    """What happens to a sink that does not keep pace. As written; `effective` fills in what was left out."""

    short_schema: ClassVar[dict[str, Any] | None] = {"enum": list(get_args(Policy))}

    policy: Policy | None = Field(
        default=None,
        description="block, drop, disconnect or spill; by default sinks block, listening sinks disconnect",
    )
    after: Duration | None = Field(
        default=None,
        description="how long a full backlog is tolerated: 200ms for drop, 5s for disconnect, 1s for block",
    )
    buffer: Size = Field(default=0, description="bytes of backlog beside the pipe's own")
    align: PositiveSize = Field(
        default=1,
        description="with drop: gaps begin and end at multiples of it, from the stream's first byte",
    )
    directory: str | None = Field(
        default=None,
        min_length=1,
        description="with spill: where the log is kept on disk; in memory if left out",
    )
    max: PositiveSize | None = Field(
        default=None,
        description="with spill: the most bytes the log may hold; 64MiB in memory, no limit on disk",
    )
    then: Literal["block", "drop", "disconnect"] | None = Field(
        default=None,
        description="with spill: what happens at max; by default sinks block, listening sinks disconnect",
    )

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """`on_slow: drop`."""
        return {"policy": value} if isinstance(value, str) else super().from_short(value)

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """Keys that only one policy has a use for."""
        policy = given.get("policy")
        if not isinstance(policy, str | None):
            return
        for key in ("directory", "max", "then"):
            if key in given and policy != "spill":
                yield Problem(f"'{key}' belongs to policy spill, {_this(policy)}", (key,), at_key=True)
        if given.get("buffer") and policy == "spill":
            yield Problem("a spill's log is its backlog; 'max' bounds it", ("buffer",), at_key=True)
        if "align" in given and policy != "drop" and given.get("then") != "drop":
            yield Problem(f"'align' belongs to policy drop, {_this(policy)}", ("align",), at_key=True)

    def effective(self, *, listening: bool) -> OnSlow:
        """The same with `policy`, `after` and, for spill, `then` and the `max` of a log in memory filled."""
        usual: Literal["block", "disconnect"] = "disconnect" if listening else "block"
        policy = self.policy or usual
        then, most = self.then, self.max
        if policy == "spill":
            then = then or usual
            most = MEMORY_SPILL if most is None and self.directory is None else most
        after = (
            self.after if self.after is not None else _AFTER[then if policy == "spill" and then else policy]
        )
        return self.model_copy(update={"policy": policy, "after": after, "then": then, "max": most})


def _this(policy: object) -> str:
    return f"this one is {policy}" if isinstance(policy, str) else "and no policy is given here"


class Limits(FrozenModel):
    """What a listening source lets in, and for how long; what is left out is unlimited."""

    connections: int | None = Field(default=None, ge=1, description="connections open at once")
    per_peer: int | None = Field(default=None, ge=1, description="connections open at once from one address")
    rate: Pace | None = Field(
        default=None,
        description="new connections a second, such as 100/s; those beyond it wait to be accepted",
    )
    idle: PositiveDuration | None = Field(
        default=None, description="end a connection on which nothing moves for so long"
    )
    half_closed: PositiveDuration | None = Field(
        default=None,
        description="with duplex: the same once one side has ended its stream and the other has not",
    )
    lifetime: PositiveDuration | None = Field(
        default=None, description="end a connection after so long, whatever it does"
    )
    allow: tuple[NetworkText, ...] = Field(default=(), description="networks that may connect; all if empty")
    deny: tuple[NetworkText, ...] = Field(
        default=(), description="networks that may not; stronger than allow"
    )


class Trust(FrozenModel):
    """Who is believed when he says, by a PROXY header, for whom he connects."""

    short_schema: ClassVar[dict[str, Any] | None] = {
        "anyOf": [{"type": "boolean"}, {"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    }

    trust: tuple[NetworkText, ...] = Field(
        default=(),
        description="networks of proxies, whose connections must begin with a PROXY header; unix peers are told by "
        "the socket's permissions",
    )
    timeout: PositiveDuration = Field(
        default=INTRODUCED, description="how long the header may take; a connection without it is reset"
    )

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """`proxy_protocol: 10.0.0.0/8`, a list of such, or `true` on a unix socket."""
        if isinstance(value, list | tuple):
            return {"trust": tuple(value)}
        if value is True:
            return {}
        if isinstance(value, str):
            return {"trust": (value,)}
        raise ValueError(f"expected the networks of the proxies that are trusted, got {show(value)}")


class Rotate(FrozenModel):
    """When a file sink begins its next file: whichever comes first. No full file is overwritten."""

    short_schema: ClassVar[dict[str, Any] | None] = {"type": "string", "description": "a size or a duration"}

    size: PositiveSize | None = Field(default=None, description="bytes in one file")
    every: PositiveDuration | None = Field(default=None, description="time in one file")

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """`rotate: 100MiB` or `rotate: 1h`."""
        if isinstance(value, str) and not value.strip().isdigit():
            for key, parse in (("size", parse_size), ("every", parse_duration)):
                try:
                    parse(value)
                except ValueError:
                    continue
                return {key: value}
        raise ValueError(f"expected a size such as 100MiB or a duration such as 1h, got {show(value)}")

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """Rotation needs a moment to rotate."""
        if not given:
            yield Problem("rotate needs 'size', 'every' or both", at_key=True)


def read_fsync(value: object) -> str | float:
    if value in ("never", "close"):
        return str(value)
    try:
        seconds = parse_duration(value)
    except ValueError:
        seconds = 0
    if not seconds:
        raise ValueError(f"expected never, close or a duration such as 1s, got {show(value)}")
    return seconds


def read_sidecar(value: object) -> object:
    return {True: "sha256", False: None}[value] if isinstance(value, bool) else value


LONGEST_QUESTION = 4096  # bytes: what any socket takes at once


class Health(FrozenModel):
    """How the upstreams of a duplex route are asked whether they are well. The short form is `every`."""

    short_schema: ClassVar[dict[str, Any] | None] = {"type": ["string", "number"]}

    every: PositiveDuration = Field(default=2.0, description="time between two checks of an upstream")
    timeout: PositiveDuration = Field(default=1.0, description="how long a check may take")
    fall: int = Field(
        default=3, ge=1, le=1000, description="checks in a row that must fail before it is down"
    )
    rise: int = Field(default=2, ge=1, le=1000, description="checks in a row that must pass before it is up")
    send: str | None = Field(
        default=None,
        min_length=1,
        max_length=LONGEST_QUESTION,
        description="what a check says once connected",
    )
    expect: str | None = Field(
        default=None, min_length=1, description="what the answer must contain; without it a connect is enough"
    )

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """`health: 2s`."""
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return {"every": value}
        return super().from_short(value)

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """A question whose answer nobody looks at."""
        if "send" in given and "expect" not in given:
            said = "'send' without 'expect' asks and does not listen; write what the answer must contain"
            yield Problem(said, ("send",), at_key=True)
