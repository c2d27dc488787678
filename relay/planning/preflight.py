"""What this machine lacks for a configuration, found by looking: nothing is opened, made or bound.

Each finding names the object, what is wrong with it, and the command, sysctl or limit that mends it. None is
an error of the configuration: the machine may be different when the routes run, and another one certainly is.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from relay.config.load import load_to_run
from relay.config.models import Config, Route
from relay.confinement import confinement
from relay.endpoints import unix
from relay.endpoints.address import Address
from relay.endpoints.dial import TRANSPARENT
from relay.endpoints.settings import SinkSettings, SourceSettings
from relay.endpoints.template import placeholders
from relay.errors import SourceError
from relay.kernel.pipe import LARGEST_CAPACITY
from relay.kernel.probe import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_NET_RAW, Machine, machine
from relay.planning import drawing
from relay.planning.plan import Plan, make_plan
from relay.serving.spilling import spilling

UNKNOWN = "-"  # stands for a placeholder's value in a path


@dataclass(frozen=True)
class Finding:
    """`what` is wrong with `about`; `remedy` is what to type or to change."""

    about: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.about}: {self.what}; {self.remedy}"


def show_plan(path: str | None, form: str) -> str:
    """The plan of the configuration at `path` as text, json or mermaid. Raises ConfigErrors."""
    plan = _planned(load_to_run(path))
    if form == "json":
        return json.dumps(drawing.as_data(plan), indent=2, ensure_ascii=False) + "\n"
    return drawing.as_mermaid(plan) if form == "mermaid" else drawing.as_text(plan)


def show_check(path: str | None, form: str) -> tuple[str, list[Finding]]:
    """The answer about the configuration at `path` as text or json, and what the preflight found.

    Raises ConfigErrors when `relay serve` would refuse it.
    """
    config = load_to_run(path)
    plan = _planned(config)
    found = list(findings(config, plan))
    if form == "json":
        data = {
            "ok": True,
            "routes": list(config.routes),
            "needs": drawing.need_data(plan.total),
            "limits": {"descriptors": plan.machine.files, "pipe_pages": plan.machine.pipe_pages or None},
            "warnings": [{"about": f.about, "what": f.what, "remedy": f.remedy} for f in found],
        }
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n", found
    return "\n".join(["ok", *drawing.summary(plan)]) + "\n", found


def _planned(config: Config) -> Plan:
    return replace(make_plan(config, machine()), confined=confinement.planned(config.confine))


def findings(config: Config, plan: Plan) -> Iterator[Finding]:
    """Everything that would keep these routes from running as they should, here and now."""
    yield from limits(plan)
    for address in (config.admin.socket, config.admin.http) if config.admin is not None else ():
        if address is not None and not address.abstract:
            for finding in (
                _socket_path(address) if address.scheme == "unix" else _port(address, plan.machine)
            ):
                yield Finding(f"admin: {finding.about}", finding.what, finding.remedy)
    yield from (Finding("confine", what, remedy) for what, remedy in confinement.lacks(config))
    for name, route in config.routes.items():
        for finding in _route(name, route, plan.machine):
            yield Finding(f"{name}: {finding.about}", finding.what, finding.remedy)


# -- the machine's limits


def limits(plan: Plan) -> Iterator[Finding]:
    """Descriptors and pipe pages, with every route at its limit and one stream where there is none."""
    here, total = plan.machine, plan.total
    spare = 0
    for route in plan.routes:  # a broadcast nobody can join is of no use
        spare += route.subscriber.descriptors if route.subscriber is not None else 0
    wanted = total.descriptors + spare
    if wanted > here.files:
        remedy = f"ulimit -n {wanted}"
        if wanted > here.files_hard:
            remedy += f" as root (the hard limit is {here.files_hard}), or LimitNOFILE={wanted} in the unit"
        yield Finding("open files", f"the routes need {wanted} descriptors, {here.files} are allowed", remedy)
    if here.pipe_pages and total.pages > here.pipe_pages:
        yield Finding(
            "pipe pages",
            f"the routes' pipes take {total.pages} pages, a user has {here.pipe_pages}: "
            "beyond that pipes are small and slow",
            f"sysctl fs.pipe-user-pages-soft={total.pages}",
        )
    if not here.privileged and here.pipe_max < LARGEST_CAPACITY and total.pipes:
        yield Finding(
            "pipe size",
            f"pipes may have {here.pipe_max} bytes, relay asks for up to {LARGEST_CAPACITY}",
            f"sysctl fs.pipe-max-size={LARGEST_CAPACITY}",
        )


# -- what the routes name


def _route(name: str, route: Route, here: Machine) -> Iterator[Finding]:
    source = route.source
    if source.verb == "listen":
        yield from _listener(source, here)
    elif source.address.scheme == "file":
        yield from _readable(source.address.path, "the source")
    elif source.address.scheme == "fifo":
        yield from _fifo(source.address.path, os.R_OK)
    for stage in route.stages + route.replies:
        yield from _stage_files(stage)
    for _address, _sink, slow, _stages in spilling(route):
        if slow.directory is not None:
            there = isinstance(_status(slow.directory, follow=True), os.stat_result)
            inside = Path(slow.directory)
            yield from _directory(inside if there else inside.parent, f"spill directory {inside}")
    for _place, sink in route.sinks():
        if sink.verb == "listen":
            yield from _listener(sink, here)
        elif sink.address.scheme == "file":
            yield from _writable(name, sink)
        elif sink.address.scheme == "fifo":
            yield from _fifo(sink.address.path, os.W_OK)
        if sink.transparent and not here.capabilities & (1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW):
            remedy = (
                "AmbientCapabilities=CAP_NET_RAW in the unit, or setcap cap_net_raw+ep on the interpreter"
            )
            yield Finding(str(sink.address), f"'transparent': {TRANSPARENT}", remedy)


def _stage_files(stage: object) -> Iterator[Finding]:
    """Files that a stage, or one in its branch, reads when a stream begins."""
    path = getattr(stage, "file", None)
    if isinstance(path, str):
        yield from _readable(path, f"the stage {getattr(stage, 'kind', '')}")
    for inner in getattr(stage, "stages", ()):
        yield from _stage_files(inner)


def _listener(end: SourceSettings | SinkSettings, here: Machine) -> Iterator[Finding]:
    address = end.address
    if address.scheme in ("unix", "shared"):
        if not address.abstract:
            yield from _socket_path(address)
            yield from _accounts(end)
    else:
        yield from _port(address, here)


def _port(address: Address, here: Machine) -> Iterator[Finding]:
    if 0 < address.port < here.first_port and not here.capabilities & 1 << CAP_NET_BIND_SERVICE:
        yield Finding(
            str(address),
            f"ports below {here.first_port} take CAP_NET_BIND_SERVICE",
            f"choose another port, or sysctl net.ipv4.ip_unprivileged_port_start={address.port}",
        )


def _socket_path(address: Address) -> Iterator[Finding]:
    status = _status(address.path)
    if isinstance(status, os.stat_result) and not stat.S_ISSOCK(status.st_mode):
        yield Finding(
            str(address), "the path exists and is not a socket", "move it away or choose another path"
        )
    yield from _directory(Path(address.path).parent, str(address))


def _accounts(end: SourceSettings | SinkSettings) -> Iterator[Finding]:
    for key, value, look_up in (
        ("user", end.owner, unix.user_id),
        ("group", end.group, unix.group_id),
    ):
        try:
            look_up(value)
        except SourceError:
            tool = "useradd --system" if key == "user" else "groupadd --system"
            yield Finding(
                str(end.address), f"there is no {key} {value!r}", f"{tool} {shlex.quote(str(value))}"
            )


def _readable(path: str, what: str) -> Iterator[Finding]:
    status = _status(path, follow=True)
    if isinstance(status, OSError):
        yield Finding(path, f"{what} cannot be read: {status.strerror}", "check the path")
    elif not stat.S_ISREG(status.st_mode):
        yield Finding(path, f"{what} is not a regular file", "use fifo:///path for a named pipe, - for stdin")
    elif not os.access(path, os.R_OK, effective_ids=True):
        yield Finding(path, f"{what} may not be read", f"chmod +r {shlex.quote(path)}, or run as its owner")


def _fifo(path: str, mode: int) -> Iterator[Finding]:
    status = _status(path, follow=True)
    if isinstance(status, OSError):
        yield from _directory(Path(path).parent, path)
    elif not stat.S_ISFIFO(status.st_mode):
        yield Finding(path, "the path exists and is not a fifo", "move it away or choose another path")
    elif not os.access(path, mode, effective_ids=True):
        right = "r" if mode == os.R_OK else "w"
        yield Finding(path, "the fifo may not be opened", f"chmod +{right} {shlex.quote(path)}")


def _writable(route: str, sink: SinkSettings) -> Iterator[Finding]:
    """A file sink makes its file, and the directory of it if only that one is missing."""
    path = _filled(sink.address.path, route)
    target = Path(path)
    status = _status(path, follow=True)
    if isinstance(status, os.stat_result) and UNKNOWN not in _filled_names(sink):
        if stat.S_ISDIR(status.st_mode):
            yield Finding(path, "it is a directory", "add a file name, such as {time}-{id}.bin")
            return
        if sink.append and not os.access(path, os.W_OK, effective_ids=True):
            yield Finding(path, "the file may not be written", f"chmod +w {shlex.quote(path)}")
    directory = target.parent
    if isinstance(_status(str(directory), follow=True), os.stat_result):
        yield from _directory(directory, sink.address.path)
    elif not placeholders(str(Path(sink.address.path).parent.parent)) - {"route"}:
        yield from _directory(directory.parent, sink.address.path, making=directory)


def _filled(path: str, route: str) -> str:
    """The path with the route's name in it and UNKNOWN for what only a stream tells."""
    from relay.endpoints.template import fill_path

    values = dict.fromkeys(("time", "peer", "id", "name"), UNKNOWN)
    return fill_path(path, {"route": route, **values})


def _filled_names(sink: SinkSettings) -> str:
    """UNKNOWN if a stream's own name is in the path, else nothing."""
    return UNKNOWN if sink.placeholders - {"route"} else ""


def _directory(directory: Path, about: str, *, making: Path | None = None) -> Iterator[Finding]:
    """Whether something can be made in `directory`; `making` is a directory in it that is missing itself."""
    status = _status(str(directory), follow=True)
    missing = shlex.quote(str(making or directory))
    if isinstance(status, OSError):
        yield Finding(
            about, f"the directory {directory} cannot be used: {status.strerror}", f"mkdir -p {missing}"
        )
    elif not stat.S_ISDIR(status.st_mode):
        yield Finding(about, f"{directory} is not a directory", "choose another path")
    elif not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        yield Finding(
            about,
            f"nothing can be made in the directory {directory}",
            f"chown {os.geteuid()} {shlex.quote(str(directory))}, or run as its owner",
        )


def _status(path: str, *, follow: bool = False) -> os.stat_result | OSError:
    try:
        return os.stat(path) if follow else os.lstat(path)  # noqa: PTH116 - paths as given, errors as values
    except OSError as error:
        return error
