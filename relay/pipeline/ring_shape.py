"""Which routes may go through a ring: those whose sinks could all be written to from one piece of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.kernel.ring import SIZE
from relay.stages.base import StageSettings
from relay.stages.tee import Settings as Tee
from relay.ways import Choice, Ways

PLAIN = (
    "tcp",
    "unix",
    "fifo",
    "null",
    "stdio",
    "fd",
)  # ends that may be written to out of memory, without a thread


def chained(stages: Sequence[StageSettings], sink: SinkSettings) -> str:
    """Why these stages and sinks need a chain; empty if the sinks may read one ring instead."""
    for stage in stages:
        if not isinstance(stage, Tee):
            return f"the stage '{stage.kind}' works on a chain"
        if stage.stages:
            return "a branch has stages, which work on a chain"
    files = 0
    for each, slow in sinks_of(stages, sink):
        if each.verb == "listen":
            return "a broadcast has a ring of its own"
        if each.sidecar:
            return "a checksum sees the bytes beside the chain"
        if each.proxy_protocol:
            return "a PROXY header is put in front of the stream on a chain"
        if slow.policy == "spill" or slow.buffer:
            return "a log is fed by a chain"
        files += each.address.scheme == "file"
        if each.address.scheme not in PLAIN and each.address.scheme != "file":
            return f"a '{each.address.scheme}' sink is written by a thread, which is handed pipes"
        if each.address.scheme == "file" and looked_at(each):
            return "between two loads its thread looks at the file, and is handed pipes"
        if each.address.scheme == "file" and slow.policy == "drop":
            return "a file that bytes are dropped for has a pipe of its own"
        if slow.align > SIZE // 8:
            return f"pieces of {slow.align} bytes are too large for a ring"
    if files and (files == 1 or files <= len(stages)):
        return "a file is written by a thread, which is handed pipes"
    return ""


def looked_at(sink: SinkSettings) -> bool:
    """Whether a file wants attention while it is written."""
    return sink.rotate is not None or isinstance(sink.fsync, float) or sink.direct


def sinks_of(stages: Sequence[StageSettings], sink: SinkSettings) -> Iterator[tuple[SinkSettings, OnSlow]]:
    """Every sink of a row of plain tees, with the policy in force there."""
    for stage in stages:
        if isinstance(stage, Tee):
            yield stage.to, stage.slow
    yield sink, sink.slow


@dataclass(frozen=True)
class Across:
    """How the whole of a stream crosses. `only` says why it needs a chain; without that there is a ring as well, the
    stream begins by `choice`, and `measured` says whether it may change on its way."""

    choice: Choice
    measured: bool
    only: str = ""


def across(
    stages: Sequence[StageSettings],
    sink: SinkSettings,
    ways: Ways,
    scheme: str,
    source: Choice,
    *,
    turns: bool,
) -> Across:
    """For a plan; `source` is how bytes of a source of that scheme would enter the chain, on which streams may take
    turns."""
    only = chained(stages, sink)
    schemes = [each.address.scheme for each, _slow in sinks_of(stages, sink)]
    if turns and "file" in schemes:
        only = only or "files that streams take turns at are written down a chain"
    if source.method in ("sendfile", "vmsplice"):
        only = source.reason
    if only:
        return Across(source, False, only)
    choice = ways.across(scheme, schemes)
    return Across(choice, ways.measured(schemes))
