"""The checksums of one pipeline: files that end with theirs, and checksums that are left alone.

A checksum is a stage with a hidden outlet, whose sink takes every byte that the stage passes on. A file with a sidecar
has one of its own in front of it. The file's name and the sidecar are to appear together, so at the end the file waits
for its digest, however late that thread is; a digest that failed holds nobody. A checksum alone is no reason to go on
reading.
"""

from __future__ import annotations

from collections.abc import Sequence

from relay.endpoints.base import Sink
from relay.endpoints.digest import sidecar_line
from relay.endpoints.file import FileSink
from relay.pipeline.outlet import Outlet


class Checksums:
    """Of the pipeline that has these outlets."""

    def __init__(self, outlets: Sequence[Outlet]) -> None:
        self._outlets = outlets

    def ready(self, outlet: Outlet, sink: Sink) -> bool:
        """Whether `sink`, which was given all that it will get, can be finished; a file has its sidecar's line then."""
        if outlet.digest is None or not isinstance(sink, FileSink):
            return True
        if not outlet.digest.digest:
            hidden = next(o for o in self._outlets if o.stage is outlet.digest)
            if hidden.sink is not None and hidden.sink.state != "failed":
                return False
        sink.sidecar_line = sidecar_line(outlet.digest.algorithm, outlet.digest.digest)
        return True

    def waited(self, settled: Outlet, *, over: bool) -> list[tuple[Outlet, Sink]]:
        """Whose file waited for the checksum that has `settled`, and was given all that it will get. `over`: the source
        has ended."""
        return [
            (other, other.sink)
            for other in self._outlets
            if settled.hidden and other.digest is settled.stage and other.sink is not None
            if other.drained or (over and not other.waiting)
        ]

    def leave_alone(self) -> None:
        """A sink has settled: where every one has failed, checksums end as well."""
        visible = [o.sink for o in self._outlets if not o.hidden]
        if all(s is not None and s.state == "failed" for s in visible):
            for other in self._outlets:
                if other.hidden and other.sink is not None:
                    other.sink.abort("every sink failed")
