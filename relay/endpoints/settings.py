"""Sources and sinks as the configuration says them; the runtime classes beside this file own the descriptors.

A mapping has exactly one of `listen`, `connect`, `file`, `fifo`, `fd` and `shared`. A plain address is the short
form: a source listens on tcp and unix and reads the rest, a sink connects to tcp and unix and writes the
rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from relay.endpoints import passed, scopes
from relay.endpoints.address import Address, AddressError
from relay.endpoints.options import (
    DEAD_AFTER,
    Account,
    Balance,
    Health,
    Limits,
    Mode,
    OnSlow,
    Rotate,
    Trust,
    read_fsync,
    read_sidecar,
)
from relay.endpoints.readers import (
    FD_JSON,
    PATH_JSON,
    SHARED_JSON,
    SOCKETS_JSON,
    ConnectAddress,
    ListenAddress,
    read_connecting,
    read_descriptor,
    read_fifo,
    read_file,
    read_shared,
    read_template,
)
from relay.endpoints.scopes import LIVE, UNIX_LISTEN, UPSTREAM_KEYS, Scope
from relay.endpoints.template import placeholders
from relay.settings import FrozenModel, Problem, list_of
from relay.units import PositiveDuration, Size, show

Algorithm = Literal["sha256", "blake3", "xxh3", "crc32c"]

ENDS = ("listen", "connect", "file", "fifo", "fd", "shared")
REACHED_AGAIN = ("tcp", "unix", "fifo", "shared")  # sinks behind which somebody may come back


class EndpointSettings(FrozenModel):
    """What sources and sinks have in common: one end, and the options of that kind of end."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [end]} for end in ENDS]})

    hidden = frozenset({"plain"})
    short_schema: ClassVar[dict[str, Any] | None] = {
        "type": "string",
        "minLength": 1,
        "description": "a plain address",
    }
    short_verb: ClassVar[Literal["listen", "connect"]]
    role: ClassVar[str]
    applies: ClassVar[Mapping[str, Scope]]

    listen: ListenAddress | None = Field(
        default=None, description="tcp, unix or systemd address to listen on"
    )
    connect: ConnectAddress | None = Field(default=None, description="tcp or unix address to connect to")
    file: Annotated[Address, PlainValidator(read_file), PATH_JSON] | None = Field(
        default=None, description="path of a file"
    )
    fifo: Annotated[Address, PlainValidator(read_fifo), PATH_JSON] | None = Field(
        default=None, description="path of a named pipe"
    )
    fd: Annotated[Address, PlainValidator(read_descriptor), FD_JSON] | None = Field(
        default=None, description="number of a descriptor that relay was started with"
    )
    shared: Annotated[Address, PlainValidator(read_shared), SHARED_JSON] | None = Field(
        default=None,
        description="unix socket over which a local program and relay hand each other blocks of shared memory",
    )
    plain: Address | None = Field(
        default=None, description="stdin, stdout or null; set by the short form only"
    )

    mode: Mode | None = Field(default=None, description="permissions of the unix socket, such as 0660")
    owner: Account | None = Field(default=None, description="owner of the unix socket, by name or number")
    group: Account | None = Field(default=None, description="group of the unix socket, by name or number")
    dead_after: PositiveDuration = Field(
        default=DEAD_AFTER, description="tcp: give up on a peer that has left data unanswered for so long"
    )

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """A plain address."""
        if not isinstance(value, str | Address):
            raise ValueError(
                f"expected an address or a mapping with one of {list_of(ENDS)}, got {show(value)}"
            )
        address = Address.of(value)
        match address.scheme:
            case "tcp" | "unix" | "systemd":
                return {cls.short_verb: address}
            case "file" | "fifo" | "fd" | "shared":
                return {address.scheme: address}
        return {"plain": address}

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """One end, and only the options of that kind of end."""
        ends = [key for key in ENDS if key in given]
        if not ends:
            yield Problem(f"a {cls.role} needs one of {list_of(ENDS)}", at_key=True)
            return
        for second in ends[1:]:
            yield Problem(
                f"a {cls.role} has one of {list_of(ENDS)}; '{ends[0]}' is given already",
                (second,),
                at_key=True,
            )
        verb, scheme, abstract, handed = ends[0], ends[0], False, False
        if verb in LIVE:
            try:
                address = Address.of(given[verb])
                handed = address.scheme == "systemd"
                address = passed.meant(address)
            except AddressError:
                scheme = ""  # reported with the address itself
            else:
                scheme, abstract = address.scheme, address.abstract
            if scheme == "systemd":
                scheme = ""  # which kind of socket that is will be seen when it is passed
        kind = (
            f"{verb} on {scheme}"
            if verb == "listen"
            else f"{verb} to {scheme}"
            if verb == "connect"
            else verb
        )
        kind = kind if scheme else verb
        if verb == "shared":
            verb, scheme, abstract = cls._shared_is(given[verb])
        for place, scope in cls._scoped(given):
            wrong_scheme = bool(scheme) and scheme not in scope.schemes
            mine = not abstract and not handed  # a file that relay makes
            if verb not in scope.verbs or wrong_scheme or (scope is UNIX_LISTEN and not mine):
                said = f"'{place[-1]}' applies to {scope.words} only, this {cls.role} is '{kind}'"
                yield Problem(said + " with an abstract name" * abstract, place, at_key=True)

    @classmethod
    def _shared_is(cls, _address: object) -> tuple[str, str, bool]:
        """What an end of that kind is for the options' scopes: verb, scheme, whether its name is abstract."""
        return "shared", "shared", False

    @classmethod
    def _scoped(cls, given: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Scope]]:
        """The options given that apply to some kinds of end only."""
        for key in given:
            if key in cls.applies:
                yield (key,), cls.applies[key]

    @property
    def address(self) -> Address:
        """Where the bytes come from or go to."""
        found = self.listen or self.connect or self.file or self.fifo or self.fd or self.shared or self.plain
        assert found is not None  # `check` saw to it
        return found


class SourceSettings(EndpointSettings):
    """Where bytes enter: a mapping, or a plain address."""

    short_verb = "listen"
    role = "source"
    applies = scopes.SOURCE

    connections: Literal["each", "one"] | None = Field(
        default=None,
        description="each connection gets sinks of its own, or connections take turns on one pipeline",
    )
    limits: Limits = Field(default=Limits(), description="what a listening source lets in, and for how long")
    proxy_protocol: Trust | None = Field(
        default=None, description="connections from these networks begin with a PROXY header, version 1 or 2"
    )

    def check_made(self) -> Iterator[Problem]:
        """Whom a PROXY header is believed from."""
        if self.proxy_protocol is None or self.listen is None:
            return
        if self.listen.scheme == "tcp" and not self.proxy_protocol.trust:
            said = "nobody is trusted: name the networks of the proxies, such as 10.0.0.0/8"
            yield Problem(said, ("proxy_protocol",))
        elif self.listen.scheme == "unix" and self.proxy_protocol.trust:
            said = "peers of a unix socket have no network; write 'true', and say who may connect with 'mode'"
            yield Problem(said, ("proxy_protocol",))

    @classmethod
    def _scoped(cls, given: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Scope]]:
        yield from super()._scoped(given)
        limits = given.get("limits")
        if isinstance(limits, Mapping) and given.keys() & {"listen", "connect", "shared"}:
            for key in limits:
                if key in scopes.LIMITS:
                    yield ("limits", key), scopes.LIMITS[key]

    @classmethod
    def _shared_is(cls, address: object) -> tuple[str, str, bool]:
        try:
            return "listen", "unix", read_shared(address).path.startswith("@")
        except AddressError:
            return "listen", "unix", False  # reported with the address itself

    @property
    def verb(self) -> Literal["listen", "connect", "read"]:
        """What the source does to get its bytes."""
        return "listen" if self.listen or self.shared else "connect" if self.connect else "read"


class SinkSettings(EndpointSettings):
    """Where bytes leave: a mapping, or a plain address."""

    short_verb = "connect"
    role = "sink"
    applies = scopes.SINK
    hidden = frozenset({"plain", "others"})

    connect: Annotated[Address, PlainValidator(read_connecting), SOCKETS_JSON] | None = Field(
        default=None,
        description="tcp or unix address to connect to; with duplex a list of them: a connection gets one",
    )
    others: tuple[Address, ...] = Field(
        default=(), description="the addresses behind the first; set by a list"
    )
    balance: Balance | None = Field(
        default=None,
        description="with duplex: which upstream a connection gets; round_robin for a list, first for one address",
    )
    health: Health | None = Field(default=None, description="with duplex: upstreams are asked how they are")
    tries: int = Field(
        default=3, ge=1, le=100, description="with duplex: most upstreams that are tried for one connection"
    )
    connect_timeout: PositiveDuration = Field(
        default=10.0, description="with duplex: how long connecting may take, all tries together"
    )
    file: Annotated[Address, PlainValidator(read_template), PATH_JSON] | None = Field(
        default=None, description="path of a file; {route} {time} {peer} {id} {name} are filled in"
    )
    on_slow: OnSlow = Field(default=OnSlow(), description="what happens when this sink does not keep pace")
    burst: Size = Field(
        default=0, description="listening sinks: the last bytes of the stream that a newcomer gets at once"
    )
    peer_eof: Literal["note", "close"] = Field(
        default="note",
        description="what a one-way sink does when its peer ends its own stream: note it, or close",
    )
    proxy_protocol: Literal["v1", "v2"] | None = Field(
        default=None, description="begin each connection with a PROXY header that names the source's peer"
    )
    transparent: bool = Field(
        default=False,
        description="with duplex: connect from the address of the source's peer (IP_TRANSPARENT)",
    )
    append: bool = Field(default=False, description="write at the end of the file that is there, in place")
    rotate: Rotate | None = Field(default=None, description="begin a new file by size or time")
    fsync: Annotated[
        str | float, PlainValidator(read_fsync), WithJsonSchema({"type": ["string", "number"]})
    ] = Field(
        default="never",
        description="never, close (before the file gets its name), or a duration between two",
    )
    direct: bool = Field(default=False, description="write past the page cache (O_DIRECT)")
    sidecar: Annotated[
        Algorithm | None,
        BeforeValidator(read_sidecar),
        WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": list(get_args(Algorithm))}]}),
    ] = Field(
        default=None,
        description="write a checksum beside the file that the standard tool verifies; true is sha256",
    )

    @classmethod
    def _known(cls, value: Mapping[Any, Any], found: list[Problem]) -> dict[str, Any]:
        """As the parent; of a list of addresses the first is `connect`, the rest are `others`."""
        given = super()._known(value, found)
        if not isinstance(listed := given.get("connect"), tuple):
            return given
        right: list[Address] = []
        for index, item in enumerate(listed):
            try:
                address = read_connecting(item)
            except ValueError as error:
                found.append(Problem(str(error), ("connect", index)))
                continue
            if address in right:
                found.append(Problem(f"{address} is in the list already", ("connect", index)))
            right.append(address)
        if not listed:
            found.append(Problem("the list is empty; an upstream is an address to connect to", ("connect",)))
        nowhere = Address("unix", path="none")  # beside a problem that is told
        return given | {"connect": right[0] if right else nowhere, "others": tuple(right[1:])}

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """What the parent checks, and file options that exclude each other."""
        yield from super().check(given)
        if given.get("append") is True and given.get("sidecar"):
            yield Problem(
                "'sidecar' covers whole files; with 'append' it could not be verified",
                ("sidecar",),
                at_key=True,
            )
        if given.get("append") is True and given.get("direct") is True:
            said = "'direct' writes whole blocks at their places; with 'append' a file may end anywhere"
            yield Problem(said, ("direct",), at_key=True)
        if given.get("rotate"):
            if given.get("append") is True:
                said = "'rotate' begins new files; with 'append' there is one, which logrotate and SIGHUP can rotate"
                yield Problem(said, ("rotate",), at_key=True)
            if given.get("sidecar"):
                said = "'sidecar' covers one file; with 'rotate' the stream is in many"
                yield Problem(said, ("sidecar",), at_key=True)

    def check_made(self) -> Iterator[Problem]:
        """A policy that this kind of sink cannot have."""
        yield from (problem.within("on_slow") for problem in self.cannot(self.on_slow))

    def cannot(self, slow: OnSlow) -> Iterator[Problem]:
        """What in a policy that covers this sink it cannot have, each at its key in the policy."""
        scheme = self.address.scheme
        if self.proxy_protocol and (slow.policy == "spill" or slow.buffer):
            key = "buffer" if slow.buffer else "policy" if "policy" in slow.model_fields_set else ""
            said = (
                "a log may go to several connections, one after another, and none of them has one peer only"
            )
            yield Problem(f"{said}: leave 'proxy_protocol' out", (key,) if key else (), at_key=True)
        if slow.directory is not None and self.verb != "listen" and scheme not in REACHED_AGAIN:
            said = f"a log on disk waits for a sink that can be reached again; {str(self.address)!r} is none"
            hint = "leave 'directory' out: the log is then in memory"
            yield Problem(f"{said}; {hint}", ("directory",), at_key=True)
        if slow.directory is not None and self.verb == "listen":
            said = "a listening sink has no log on disk: its subscribers read from one ring in memory"
            hint = "leave 'directory' out: 'max' is then how much larger the ring is"
            yield Problem(f"{said}; {hint}", ("directory",), at_key=True)

    def one_way(self) -> Iterator[Problem]:
        """What means something for the sink of a duplex route only, each at its key."""
        for key in UPSTREAM_KEYS:
            if key in self.model_fields_set:
                said = f"'{key}' is for the sink of a duplex route, which gives each connection an upstream"
                yield Problem(said, (key,), at_key=True)
        if self.others:
            said = "a list of addresses is for the sink of a duplex route; one stream goes to many by 'tee'"
            yield Problem(said, ("connect",), at_key=True)

    @property
    def straight(self) -> bool:
        """Whether it is a file that a socket may be read into memory for: nothing to see to between two loads."""
        looks = self.rotate is not None or isinstance(self.fsync, float) or self.direct
        backlog = self.slow.buffer or self.slow.policy == "spill"
        return self.address.scheme == "file" and not looks and not backlog

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where the bytes may go to: one address, or all in the list of a duplex route's sink."""
        return (self.address, *self.others)

    @property
    def balanced(self) -> Balance:
        """Which upstream a connection gets."""
        return self.balance or ("round_robin" if self.others else "first")

    @property
    def verb(self) -> Literal["listen", "connect", "write"]:
        """What the sink does to get rid of its bytes."""
        return "listen" if self.listen else "connect" if self.connect or self.shared else "write"

    @property
    def slow(self) -> OnSlow:
        """The policy in force, with its defaults filled in; a tee's own goes before its sink's."""
        return self.on_slow.effective(listening=self.verb == "listen")

    @property
    def placeholders(self) -> frozenset[str]:
        """The placeholders in the path of a file; empty for everything else."""
        return placeholders(self.address.path) if self.address.scheme == "file" else frozenset()
