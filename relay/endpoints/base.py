"""What every source and every sink at work has in common.

A source or a sink owns its descriptor and the `struct relay_end` that names it to the pump; the pump borrows
both while the end is wired to a pipeline. All methods run on the engine's thread. What happens to an end is
told through its hooks, plain fields that the pipeline (or a test) fills in; none is called twice.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from relay.engine import WATCH_HINTS, Engine
from relay.errors import EndpointError, SinkError, SourceError
from relay.kernel import core

if TYPE_CHECKING:
    from relay.endpoints.ferry import Ferry

# What to do next, by errno, where one sentence helps whoever reads the error.
HINTS = {
    "ECONNREFUSED": "is the receiver running and listening there?",
    "ENOENT": "check the path",
    "EACCES": "check the permissions, or run as another user",
    "EPERM": "check the permissions, or run as another user",
    "EISDIR": "name a file in that directory",
    "ENOTDIR": "a part of the path is no directory",
    "ENOSPC": "free some space; what was written stays",
    "EDQUOT": "free some space; what was written stays",
    "EROFS": "the filesystem is mounted read-only",
    "EFBIG": "the file size limit is reached (ulimit -f); what was written stays",
    "EADDRINUSE": "another program listens there: stop it or choose another port",
    "EADDRNOTAVAIL": "this machine has no such address",
    "ETIMEDOUT": "is the host up and reachable?",
    "EHOSTUNREACH": "is the host up and reachable?",
    "ENETUNREACH": "is there a route to that network?",
    "ECONNRESET": "the peer closed the connection before it had everything",
    "EPIPE": "the reader went away before it had everything",
    "EMFILE": "raise the limit of open files (ulimit -n)",
    "ENFILE": "raise fs.file-max (sysctl)",
    "ENXIO": "nothing is at the other end",
    "EIO": "the device reports an error: see dmesg",
}


def hint(code: int) -> str:
    """One sentence on what to do about that errno, or nothing."""
    return HINTS.get(errno.errorcode.get(code, ""), "")


def nothing(*_told: object) -> None:
    """A hook that nobody filled in, or nobody listens to any more."""


class End:
    """One descriptor at the edge of a pipeline. `c` is its struct; `c.fd` is -1 while it is not open."""

    failure: type[EndpointError] = EndpointError

    def __init__(self, engine: Engine, address: str) -> None:
        self.engine = engine
        self.address = address
        self.c = core.new_end()
        self.opened_at = 0.0
        self.closed = False

    def error(self, operation: str, code: int, *, reason: str = "", advice: str = "") -> EndpointError:
        """This end's error for `operation`, with the hint that fits the errno."""
        if not advice and self.c.is_socket:  # a socket has no disk that could be full
            advice = WATCH_HINTS.get(code, "")
        return self.failure(self.address, operation, code, advice or hint(code), reason=reason)

    def attach(self, fd: int, mask: int) -> bool:
        """Takes `fd` over and registers it, edge-triggered, with `mask`; False when it failed, and was told so.

        A file that epoll does not know (EPERM) never waits: it counts as always ready. Any other refusal means that
        nobody would ever say when it is ready, which is this end's failure.
        """
        self.c.fd = fd
        self.c.is_pipe = not self.c.is_socket and stat.S_ISFIFO(os.fstat(fd).st_mode)
        self.opened_at = time.monotonic()
        code = self.engine.add_end(self.c, mask)
        if not code:
            return True
        self.c.kind = core.INSTANT  # it is in no set: there is nothing to take out
        if code == errno.EPERM:
            self.c.readable = self.c.writable = 1
            return True
        self.refused(self.error("watching", code, advice=WATCH_HINTS.get(code, "")))
        return False

    def refused(self, error: EndpointError) -> None:
        """For subclasses: the descriptor cannot be watched. Closes it and says so."""

    def detach(self) -> int:
        """Unregisters the descriptor and hands it to the caller, who owns it from then on (-1: none)."""
        fd = int(self.c.fd)
        if fd >= 0:
            if self.c.kind == core.POLLED:
                self.engine.drop_end(self.c)
            self.c.fd = -1
        return fd

    @property
    def moved(self) -> int:
        """Payload bytes that went through."""
        return int(self.c.moved)

    @property
    def method(self) -> str:
        """How bytes cross here."""
        return core.METHOD_NAMES[self.c.method]


class Source(End):
    """Where bytes enter. `copies` says why it cannot be spliced; empty when it can. `quiet`: its owner tells of its
    failure, in the record of a session."""

    failure = SourceError
    quiet = False
    rings = True  # whether a ring of memory may be filled from it, in place of the chain

    def __init__(self, engine: Engine, address: str) -> None:
        super().__init__(engine, address)
        self.scheme = "tcp"
        self.peer = ""
        self.local = ""  # where the peer connected to, as a proxy says; "": to this very socket
        self.via = ""  # the proxy that says so
        self.name = ""
        self.copies = ""
        self.on_open: Callable[[], None] = nothing
        self.on_fail: Callable[[EndpointError], None] = nothing
        self.on_close: Callable[[], None] = nothing

    def open(self) -> None:
        """Opens it; calls on_open, or on_fail with a SourceError, now or later."""
        self.on_open()

    def refused(self, error: EndpointError) -> None:
        """It fails before it began."""
        self.close(reset=True)
        self.on_fail(error)

    @property
    def method_now(self) -> str:
        """How its bytes enter the chain."""
        return self.method

    def refill(self) -> bool:
        """For a source that waits for more (a log's): looks for it; True when there is some, or its end."""
        return False

    def changed(self) -> str:
        """What changed under the reader while it was read; empty where nothing did."""
        return ""

    def broke_off(self) -> str:
        """Why what it gave is not the whole stream, where that is no errno of its descriptor; empty where it is."""
        return ""

    def unwire(self) -> None:
        """It is closed, and the pipeline is done with it: nothing of it names anybody any more."""
        self.c.reads = core.ffi.NULL
        self.on_open = self.on_close = self.on_fail = nothing

    def close(self, *, reset: bool = False) -> None:
        """Closes it; with `reset` its peer learns that the stream was not delivered. Safe to call again."""
        if not self.closed:
            self.closed = True
            fd = self.detach()
            if fd >= 0:
                os.close(fd)
            self.on_close()


State = Literal["opening", "open", "finishing", "cutting", "finished", "failed"]


class Sink(End):
    """Where bytes leave.

    Its life: `open`, bytes, then either `finish` (the stream ended; on_finish is called when its end has
    everything) or `fail`/`abort` (on_fail is called). `copies` says why it cannot be spliced; empty when it
    can. `lost` counts bytes handed over that are known not to have arrived.
    """

    failure = SinkError

    def __init__(self, engine: Engine, address: str) -> None:
        super().__init__(engine, address)
        self.state: State = "opening"
        self.copies = ""
        self.lost = 0
        self.reason = ""
        self.failed_with: EndpointError | None = None
        self.started_at = time.monotonic()
        self.ended_at = 0.0
        self.on_open: Callable[[Sink], None] = nothing
        self.on_finish: Callable[[Sink], None] = nothing
        self.on_fail: Callable[[Sink], None] = nothing

    def wire(self, pipeline: core.Struct) -> None:
        """Names the pipeline that this sink's readiness wakes. Call it before `open`."""
        self.c.writes = pipeline

    def unwire(self) -> None:
        """The pipeline is going away: nothing of this sink names it any more, so that both are freed at once."""
        self.c.reads = self.c.writes = core.ffi.NULL
        self.on_open = self.on_finish = self.on_fail = nothing

    def open(self) -> None:
        """Starts to open it. Bytes meant for it wait in its pipe until then."""
        raise NotImplementedError  # every kind has its own way; this class is never used by itself

    def refused(self, error: EndpointError) -> None:
        """It fails before it began."""
        self.fail(error)

    def opened(self) -> None:
        """For subclasses: it is open."""
        if self.state == "opening":
            self.state = "open"
            self.on_open(self)

    def go_straight(self, why: str) -> bool:
        """Whether it has memory that a source may be read into, past the pipe; from here on it is, for that reason."""
        return False

    def takes_spans(self, why: str) -> Ferry | None:
        """The ferry whose thread is handed spans of memory from here on, for that reason; None where it may not be."""
        return None

    def finish(self) -> None:
        """The stream is complete and all of it was handed over: end it so that the receiver knows."""
        self.finished()

    def finished(self) -> None:
        """For subclasses: the receiver has everything."""
        if self.state in ("failed", "finished"):
            return
        self.state = "finished"
        self.ended_at = time.monotonic()
        self.close()
        self.on_finish(self)

    def hear(self, what: int, error: int) -> None:
        """What the pump reports of it, but for its end: that is its pipeline's to decide."""
        if what == core.SINK_FAILED:
            self.broke(error)
        elif what == core.PEER_ENDED:
            self.peer_ended()
        elif what == core.SINK_BUSY:
            self.busy()

    def broke(self, code: int, reason: str = "") -> None:
        """The pump met `code` while giving it bytes; `reason` says it better than the errno's own words."""
        self.fail(self.error("writing to", code, reason=reason))

    def peer_ended(self) -> None:
        """The peer of a one-way sink shut its write side: noted, not acted on."""

    def busy(self) -> None:
        """Bytes went out to it, the first after it had asked to be told."""

    def fail(self, error: EndpointError) -> None:
        """It failed; closes it and says so once."""
        if self.state in ("failed", "finished"):
            return
        self.state = "failed"
        self.failed_with = error
        self.reason = str(error)
        self.ended_at = time.monotonic()
        self.close()
        self.on_fail(self)

    def cut(self, reason: str) -> None:
        """The stream broke off: what was handed over may still arrive, then the receiver can tell."""
        self.abort(reason)

    def abort(self, reason: str) -> None:
        """Ends it before its stream is complete, so that the receiver can tell."""
        self.fail(self.error("ending", 0, reason=reason))

    def change(self, old: object, new: object) -> None:
        """A stage behind it has other settings from now on; only one with a log has stages behind it."""

    def reopen(self) -> None:
        """Opens anew the file that it writes and somebody may have moved away; other sinks have none."""

    def close(self) -> None:
        """Closes the descriptor, abruptly where that tells the receiver of a failure. Safe to call again."""
        if not self.closed:
            self.closed = True
            fd = self.detach()
            if fd >= 0:
                os.close(fd)

    @property
    def calls(self) -> int:
        """System calls made for its bytes by a thread of its own; most sinks have none."""
        return 0

    @property
    def backlog(self) -> int:
        """Bytes that wait in this sink's log; only a spill has one."""
        return 0

    @property
    def reconnects(self) -> int:
        """How often it was connected again; only one with a log does that by itself."""
        return 0

    @property
    def connects(self) -> tuple[float, ...]:
        """How long each connect took; only one with a log knows by itself."""
        return ()

    @property
    def twice(self) -> int:
        """Bytes sent again after a connection broke; only a spill does that."""
        return 0

    @property
    def away(self) -> bool:
        """Whether one that is connected again by itself is not there."""
        return False

    def unread(self) -> int:
        """What was handed over and its receiver's side has not taken, the end of the stream included; 0 where that
        cannot be told. It falls as long as the receiver takes something, and is no count of bytes."""
        return 0

    def under_way(self) -> int:
        """Bytes handed over that the receiver's kernel has not acknowledged, where that can be told."""
        return 0

    @property
    def seconds(self) -> float:
        """From when it was open until it ended, or now; waiting for a receiver to come does not count."""
        return (self.ended_at or time.monotonic()) - (self.opened_at or self.started_at)

    @property
    def result_path(self) -> str:
        """Where what it wrote can be found; empty for a sink that is no file."""
        return ""
