"""The whole configuration as frozen models: what the YAML says, checked, nothing opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, ValidationError, WithJsonSchema

from relay.endpoints.address import Address, AddressError
from relay.endpoints.options import Account, OnSlow
from relay.endpoints.settings import SinkSettings, SourceSettings
from relay.settings import FrozenModel, Place, Problem, refusal
from relay.stages.base import AnyStage, StageSettings
from relay.stages.tee import Settings as Tee
from relay.units import Duration


class Route(FrozenModel):
    """One source, ordered stages, one sink.

    From code, `Route(source=..., sink=..., stages=[...])` takes what the YAML does: addresses as text, or mappings; it
    raises ConfigErrors, with every problem and its place, where `relay check` would refuse it.
    """

    source: SourceSettings = Field(description="where bytes enter: a mapping, or a plain address")
    stages: tuple[AnyStage, ...] = Field(default=(), description="what happens on the way, in order")
    replies: tuple[AnyStage, ...] = Field(
        default=(), description="with duplex: what happens on the way back, in order"
    )
    sink: SinkSettings = Field(description="where bytes leave: a mapping, or a plain address")
    duplex: bool = Field(default=False, description="move bytes both ways between two sockets")
    method: Literal["auto", "zero-copy", "copy"] = Field(
        default="auto", description="how bytes cross; auto picks and says why"
    )
    wait_for_sinks: Duration | None = Field(
        default=None,
        description="read nothing from the source until every sink is there, or so much time has passed",
    )

    def __init__(
        self,
        *,
        source: str | Mapping[str, Any] | SourceSettings,
        sink: str | Mapping[str, Any] | SinkSettings,
        **more: Any,
    ) -> None:
        try:
            super().__init__(**{"source": source, "sink": sink, **more})
        except ValidationError as error:
            raise refusal(error, "relay.Route") from error

    # a route within a configuration is not made by the above, so its problems are told with all others
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined] # as pydantic marks its own

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """Keys that need `duplex`, or that it leaves no use for."""
        if "replies" in given and given.get("duplex", False) is False:
            yield Problem(
                "'replies' needs 'duplex: true': without it nothing comes back", ("replies",), at_key=True
            )
        sink = given.get("sink")
        if given.get("duplex") is True and isinstance(sink, Mapping) and "peer_eof" in sink:
            said = "'peer_eof' is for one-way sinks; with duplex an end of stream passes through"
            yield Problem(said, ("sink", "peer_eof"), at_key=True)

    def check_made(self) -> Iterator[Problem]:
        """Ends that cannot carry two ways, and pipelines that cannot each have the sink."""
        if self.duplex:
            for role, end in (("source", self.source), ("sink", self.sink)):
                if end.address.scheme not in ("tcp", "unix", "fd", "systemd"):
                    yield Problem(
                        f"duplex needs a socket at both ends; this {role} is {str(end.address)!r}", (role,)
                    )
            if self.sink.verb == "listen":
                said = (
                    "duplex needs one peer at each end, a listening sink broadcasts to many; connect instead"
                )
                yield Problem(said, ("sink", "listen"), at_key=True)
            yield from self._mirrors()
        if self.source.connections == "each":
            for _, sink in self.sinks():
                if sink.verb == "listen":
                    yield Problem(
                        f"'connections: each' gives each connection sinks of its own, but "
                        f"{str(sink.address)!r} can be listened on once only; write 'one'",
                        ("source", "connections"),
                    )

        yield from self._shared_logs()
        yield from self._named_peers()
        for place, sink in self.sinks():
            if not self.duplex or place != ("sink",):
                yield from (problem.within(*place) for problem in sink.one_way())

    def _named_peers(self) -> Iterator[Problem]:
        """Sinks that are to learn of a peer where a connection has none, or not one only; what duplex alone knows."""
        if not self.duplex and self.source.limits.half_closed is not None:
            said = (
                "'half_closed' needs 'duplex: true': a connection that goes one way is over with its stream"
            )
            yield Problem(said, ("source", "limits", "half_closed"), at_key=True)
        for place, sink in self.sinks():
            beside = not self.duplex or place != ("sink",)
            if sink.transparent and beside:
                said = "'transparent' needs 'duplex: true'; a one-way sink connects from an address of this machine"
                yield Problem(said, (*place, "transparent"), at_key=True)
            elif sink.transparent and self.source.address.scheme != "tcp" and not self.source.proxy_protocol:
                said = "'transparent' connects from the address of the source's peer; a unix peer has none"
                yield Problem(said, (*place, "transparent"), at_key=True)
            if not sink.proxy_protocol or not beside:
                continue
            if not self.source.listen:
                said = (
                    "'proxy_protocol' names the peer of a connection, and this source accepts none; "
                    'a fixed header is a stage: header: {text: "PROXY UNKNOWN\\r\\n"}'
                )
                yield Problem(said, (*place, "proxy_protocol"), at_key=True)
            elif self.turns() == "one":
                said = "'proxy_protocol' names one peer, and here connections take turns; write 'connections: each'"
                yield Problem(said, (*place, "proxy_protocol"), at_key=True)

    def _mirrors(self) -> Iterator[Problem]:
        """Sinks of a duplex route's tees that its many sessions, each with its own, could not have at once."""
        each = "each connection of a duplex route has sinks of its own"
        for place, sink in self.sinks():
            scheme = sink.address.scheme
            if place == ("sink",):
                continue
            if sink.verb == "listen":
                said = f"{each}, and {str(sink.address)!r} can be listened on once only; connect instead"
                yield Problem(said, (*place, "listen"), at_key=True)
            elif scheme in ("stdio", "fd"):
                said = f"{each}, and would mix in {str(sink.address)!r}; write a file with {{id}} in its name"
                yield Problem(said, place)
            elif scheme == "file" and not sink.placeholders - {"route"}:
                said = f"{each}, and {str(sink.address)!r} names one file for all; put {{id}} in the name"
                yield Problem(said, place)

    def _shared_logs(self) -> Iterator[Problem]:
        """Two sinks of one address whose logs would have one name."""
        seen: set[tuple[str, str]] = set()
        for place, sink, slow in self.policies():
            if slow.directory is None:
                continue
            key = (str(sink.address), slow.directory)
            if key in seen:
                said = f"another sink to {key[0]} keeps its log there already; name another directory"
                yield Problem(said, place)
            seen.add(key)

    def policies(self) -> Iterator[tuple[Place, SinkSettings, OnSlow]]:
        """Every sink with the policy that covers it as it is written, and the place of that."""

        def walk(
            stages: tuple[StageSettings, ...], at: Place
        ) -> Iterator[tuple[Place, SinkSettings, OnSlow]]:
            for index, stage in enumerate(stages):
                if isinstance(stage, Tee):
                    here = (*at, index, stage.kind)
                    yield from walk(stage.stages, (*here, "stages"))
                    own = "on_slow" in stage.model_fields_set
                    place = (*here, "on_slow") if own else (*here, "to", "on_slow")
                    yield place, stage.to, stage.on_slow if own else stage.to.on_slow

        yield from walk(self.stages, ("stages",))
        yield from walk(self.replies, ("replies",))
        yield ("sink", "on_slow"), self.sink, self.sink.on_slow

    def sinks(self) -> Iterator[tuple[Place, SinkSettings]]:
        """Every sink of the route with its place in it: those of its tees first, in order, replies too."""
        for key, stages in (("stages", self.stages), ("replies", self.replies)):
            for index, stage in enumerate(stages):
                for place, sink in stage.sinks():
                    yield (key, index, stage.kind, *place), sink
        yield ("sink",), self.sink

    @property
    def back(self) -> SinkSettings:
        """With duplex: the source's connections as the sink of the way back, which blocks as any other."""
        return SinkSettings.model_construct(connect=self.source.address)

    def turns(self) -> Literal["each", "one"]:
        """Whether each connection gets a pipeline of its own, or connections take turns on one.

        Unless the source says: one if a sink anywhere listens, is stdio or a descriptor, or is a file without
        placeholder.
        """
        if self.source.connections:
            return self.source.connections
        for _, sink in self.sinks():
            scheme = sink.address.scheme
            if (
                sink.verb == "listen"
                or scheme in ("stdio", "fd")
                or (scheme == "file" and not sink.placeholders)
            ):
                return "one"
        return "each"


def _unix(value: object) -> Address:
    address = Address.of(value)
    if address.scheme != "unix":
        raise AddressError(
            f"the admin socket is a unix socket, got {str(address)!r}", hint="write unix:///path"
        )
    return address


def _tcp(value: object) -> Address:
    address = Address.of(value)
    if address.scheme != "tcp":
        raise AddressError(
            f"admin http listens on tcp, got {str(address)!r}", hint="write tcp://127.0.0.1:9464"
        )
    return address


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False  # a name, or all interfaces


class Admin(FrozenModel):
    """Where a running relay can be asked and told."""

    socket: (
        Annotated[
            Address, PlainValidator(_unix), WithJsonSchema({"type": "string", "pattern": r"^unix://|\$\{"})
        ]
        | None
    ) = Field(default=None, description="unix socket for relay status, reload, drain and health")
    http: (
        Annotated[
            Address, PlainValidator(_tcp), WithJsonSchema({"type": "string", "pattern": r"^tcp://|\$\{"})
        ]
        | None
    ) = Field(default=None, description="tcp address for metrics, health and the status page over HTTP")
    remote: bool = Field(default=False, description="let 'http' be reached from other machines")

    def check_made(self) -> Iterator[Problem]:
        """An address that others could reach, where nobody said that they may."""
        if self.http is not None and not self.remote and not _is_loopback(self.http.host):
            said = f"{self.http} can be reached from elsewhere; listen on tcp://127.0.0.1:{self.http.port}"
            yield Problem(f"{said}, or write 'remote: true' beside it if that is meant", ("http",))


class Confine(FrozenModel):
    """What relay gives up once it has started; never what the routes need. It cannot be taken back."""

    user: Account | None = Field(
        default=None, description="user to become when every address is bound, by name or number; takes root"
    )
    group: Account | None = Field(default=None, description="group to become; the user's own by default")
    files: bool | Literal["where_possible"] = Field(
        default="where_possible",
        description="only files that the routes, Python and the resolver need (Landlock)",
    )
    ports: bool | Literal["where_possible"] = Field(
        default="where_possible",
        description="only tcp ports that the routes listen on or connect to (Landlock)",
    )
    calls: bool | Literal["where_possible"] = Field(
        default="where_possible", description="only system calls that relay makes, no new processes (seccomp)"
    )
    read: tuple[str, ...] = Field(default=(), description="more files and directories that may be read")
    write: tuple[str, ...] = Field(default=(), description="more files and directories that may be written")

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """A group without a user would leave relay the rights of its user."""
        if "group" in given and "user" not in given:
            yield Problem("'group' needs 'user' beside it", ("group",), at_key=True)


LONGEST_NAME = 100  # bytes: it is a part of the names of files, which have 255


def _some(routes: dict[str, Route]) -> dict[str, Route]:
    if not routes:
        raise ValueError("there are no routes; a configuration needs at least one")
    for name in routes:
        if not name or not name.isprintable():
            raise ValueError(f"{name!r} is not a name for a route")
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"'{name[:20]}...' is too long for a route: {LONGEST_NAME} bytes at most")
    return routes


class Config(FrozenModel):
    """A relay's configuration."""

    routes: Annotated[dict[str, Route], AfterValidator(_some)] = Field(description="routes by name")
    admin: Admin | None = Field(default=None, description="where a running relay can be asked and told")
    confine: Confine | None = Field(default=None, description="what relay gives up once it has started")
    engines: int | None = Field(
        default=None, ge=1, le=1024, description="threads that move bytes; one a CPU by default"
    )
    drain: Duration = Field(default=10.0, description="how long streams under way may take after SIGTERM")

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """Two listeners on one address, among whatever routes are right in themselves."""
        routes = given.get("routes")
        right: dict[str, Route] = {}
        for name, route in routes.items() if isinstance(routes, Mapping) else ():
            try:
                right[str(name)] = Route.model_validate(route)
            except ValidationError:
                continue  # reported when the routes themselves are read
        try:
            admin = Admin.model_validate(given["admin"]) if "admin" in given else None
        except ValidationError:
            admin = None
        yield from _clashes(right, admin)
        yield from _circles(right)


def _clashes(routes: Mapping[str, Route], admin: Admin | None) -> Iterator[Problem]:
    seen: list[tuple[str, Address]] = []
    for place, address in _listeners(routes, admin):
        what = f"route '{place[1]}'" if place[0] == "routes" else f"admin {place[1]}"
        for other, taken in seen:
            if _overlap(address, taken):
                beside = "" if address == taken else f" as {taken}"
                yield Problem(f"{address} is listened on by {other} already{beside}", place)
                break
        seen.append((what, address))


def _circles(routes: Mapping[str, Route]) -> Iterator[Problem]:
    """Sinks from which a stream comes back to its own route: one connection would breed others without end."""

    def leads_to(name: str) -> Iterator[tuple[Place, str]]:
        for place, sink in routes[name].sinks():
            for other, route in routes.items():
                if _leads(sink, route.source):
                    yield ("routes", name, *place, "shared" if sink.shared else "connect"), other

    for name in routes:
        for place, first in leads_to(name):
            seen, ahead = {first}, [first]
            while ahead and name not in seen:
                fresh = {other for _place, other in leads_to(ahead.pop())} - seen
                seen |= fresh
                ahead += sorted(fresh)
            if name in seen:
                yield Problem(f"what goes to '{first}' comes back to '{name}', again and again", place)


def _leads(sink: SinkSettings, source: SourceSettings) -> bool:
    """Whether what goes into the one comes out of the other."""
    if sink.shared or source.shared:
        return sink.shared == source.shared
    return bool(sink.connect and source.listen) and any(_reaches(to, source.address) for to in sink.addresses)


def _reaches(to: Address, listening: Address) -> bool:
    """Whether who connects to the one gets to the other, as far as that can be told without looking up names."""
    if to.scheme != listening.scheme or to.scheme == "unix":
        return to == listening
    here = listening.host in ("", "0.0.0.0", "::") and to.host in ("127.0.0.1", "::1", "localhost", "")
    return to.port == listening.port and to.port != 0 and (to.host == listening.host or here)


def _listeners(routes: Mapping[str, Route], admin: Admin | None) -> Iterator[tuple[Place, Address]]:
    for key in ("socket", "http") if admin else ():
        address = getattr(admin, key)
        if address is not None:
            yield ("admin", key), address
    for name, route in routes.items():
        if route.source.verb == "listen":
            key = "shared" if route.source.shared else "listen"
            yield ("routes", name, "source", key), route.source.address
        for place, sink in route.sinks():
            if sink.listen:
                yield ("routes", name, *place, "listen"), sink.listen


def _overlap(one: Address, other: Address) -> bool:
    """Whether the kernel would refuse to listen on both; names are compared as they are written."""
    if "tcp" not in (one.scheme, other.scheme):  # sockets with a path
        return one.path == other.path
    if one.scheme != other.scheme:
        return False
    if one.port != other.port or one.port == 0:
        return False
    hosts = {one.host, other.host}
    if len(hosts) == 1 or hosts & {"", "::"}:
        return True
    return "0.0.0.0" in hosts and not any(":" in host for host in hosts)
