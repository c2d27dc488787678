"""What a configuration needs of files and ports, each with its place in it: pure but for following links.

A path stands for its directory, since files come and go there and are replaced whole. Directories that hold what is
nobody's business (`SHARED`) are not opened for one file: that file alone is, as it is when relay starts.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relay.config.models import Config, Route
from relay.endpoints.address import Address
from relay.endpoints.settings import SinkSettings, SourceSettings
from relay.endpoints.tcp import is_numeric
from relay.settings import Place

Kind = Literal["read", "write", "bind", "connect", "abstract"]

SHARED = ("/", "/etc", "/dev", "/home", "/root", "/run", "/usr", "/var", "/var/run", "/var/lib", "/tmp")
DNS = 53

# What the resolver, the C library and Python read of a system.
SYSTEM = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/passwd",
    "/etc/group",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/usr/share/zoneinfo",
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/proc",
    "/sys/devices/system/cpu",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


@dataclass(frozen=True)
class Want:
    """One thing that the configuration needs, for what stands at `place`; a path or a port.

    `make`: with which mode the directory is made if it is missing and its parent is not; 0: it is not.
    """

    place: Place
    kind: Kind
    path: str = ""
    port: int = 0
    make: int = 0


def wants(config: Config) -> Iterator[Want]:
    """Everything that `config` needs."""
    confine = config.confine
    if confine is not None:
        for index, path in enumerate(confine.read):
            yield Want(("confine", "read", index), "read", os.path.realpath(path))
        for index, path in enumerate(confine.write):
            yield Want(("confine", "write", index), "write", os.path.realpath(path))
    if config.admin is not None:
        if config.admin.socket is not None:
            yield from listens(("admin", "socket"), config.admin.socket)
        if config.admin.http is not None:
            yield from listens(("admin", "http"), config.admin.http)
    for name, route in config.routes.items():
        for want in _route(route):
            place = ("routes", name, *want.place)
            yield Want(place, want.kind, want.path, want.port, want.make)


def _route(route: Route) -> Iterator[Want]:
    yield from _end(("source",), route.source)
    for key, stages in (("stages", route.stages), ("replies", route.replies)):
        for index, stage in enumerate(stages):
            for path in _stage_files(stage):
                yield Want((key, index, stage.kind), "read", place_of(path))
    for place, sink in route.sinks():
        yield from _end(place, sink)
    for place, _sink, slow in route.policies():
        if slow.directory is not None:
            yield Want((*place, "directory"), "write", os.path.realpath(slow.directory), make=0o700)


def _end(place: Place, end: SourceSettings | SinkSettings) -> Iterator[Want]:
    address = end.address
    at = (*place, end.verb if end.verb in ("listen", "connect") else address.scheme)
    if end.verb == "listen":
        yield from listens(at, address)
    elif end.verb == "connect":
        for each in end.addresses if isinstance(end, SinkSettings) else (address,):
            yield from _connects(at, each)
    elif address.scheme == "fifo":
        yield Want(at, "write", place_of(address.path))
    elif address.scheme == "file" and isinstance(end, SourceSettings):
        yield Want(at, "read", place_of(address.path))
    elif address.scheme == "file":
        path, mode = _written(address.path)
        yield Want(at, "write", path, make=mode)


def _connects(place: Place, address: Address) -> Iterator[Want]:
    if address.scheme == "tcp":
        yield Want(place, "connect", port=address.port)
        if not is_numeric(address.host):
            yield Want(place, "connect", port=DNS)
    elif address.path.startswith("@"):
        yield Want(place, "abstract", str(address))


def listens(place: Place, address: Address) -> Iterator[Want]:
    """What listening on `address` takes."""
    if address.scheme == "tcp":
        yield Want(place, "bind", port=address.port)
        if address.host and not is_numeric(address.host):
            yield Want(place, "connect", port=DNS)
    elif address.scheme in ("unix", "shared") and not address.path.startswith("@"):
        yield Want(place, "write", place_of(address.path))


def _written(path: str) -> tuple[str, int]:
    """The directory in which a file sink writes, what stands before the first placeholder, and its mode."""
    if "{" not in path:
        place = place_of(path)
        return place, 0o777 if place != os.path.realpath(path) else 0
    return os.path.realpath(os.path.dirname(path.partition("{")[0]) or "."), 0o777  # noqa: PTH120 - a piece of text


def place_of(path: str) -> str:
    """What a rule for this path names: its directory, or itself where that is shared with everything else."""
    real = os.path.realpath(path)
    return real if _shared(str(Path(real).parent)) else str(Path(real).parent)


def _shared(directory: str) -> bool:
    return os.path.realpath(directory) in SHARED


def _stage_files(stage: object) -> Iterator[str]:
    path = getattr(stage, "file", None)
    if isinstance(path, str):
        yield path
    for inner in getattr(stage, "stages", ()):
        yield from _stage_files(inner)


def python_reads() -> Iterator[str]:
    """Where this Python and relay itself have their modules; what is imported late is read late."""
    own = Path(__file__).resolve().parent.parent
    yield str(own)
    for scheme in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield sysconfig.get_path(scheme)
    yield from (str(Path(sys.base_prefix) / sys.platlibdir), str(Path(sys.prefix) / "pyvenv.cfg"))
    for path in sys.path:
        # the folder that relay was started in is in the list, too, and none of relay's business
        if path and "-packages" in path:
            yield path
    library = sysconfig.get_config_var("LIBDIR")
    if isinstance(library, str):
        yield library
