"""The source's side of a pipeline during a turn: how it is read, how long it may be, how it ended."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

from relay.endpoints.base import Source
from relay.endpoints.options import Limits
from relay.engine import Engine
from relay.kernel import core
from relay.kernel.arena import MappedFile
from relay.pipeline.chain import Chain
from relay.pipeline.source_clock import SourceClock
from relay.ways import STRAIGHT, Choice, Ways

log = logging.getLogger("relay.pipeline")

METHODS = {"splice": core.SPLICE, "copy": core.COPY, "sendfile": core.SENDFILE, "vmsplice": core.VMSPLICE}


class Intake:
    """Owns the source of one turn until `close`, and the mapping of a file that is lent.

    `over`: nothing more will be read. `error` says why the stream is not whole; empty while it may be.
    `expired(reason)` is called when a limit of the source is reached.
    """

    def __init__(
        self,
        engine: Engine,
        route: str,
        source: Source,
        chain: Chain,
        ways: Ways,
        limits: Limits | None,
        expired: Callable[[str], None],
    ) -> None:
        self.source = source
        self.over = False
        self.error = ""
        self.began = time.monotonic()
        self._route = route
        self._mapped: MappedFile | None = None
        self.choice = self._choose(chain, ways)
        self._clock = SourceClock(engine, source, limits, expired) if limits is not None else None

    def _choose(self, chain: Chain, ways: Ways) -> Choice:
        source = self.source
        only = chain.outlets[0] if len(chain.nodes) == 1 else None
        settings = only.settings if only is not None else None
        # a broadcast's sink is whoever joins
        alone = settings.address.scheme if settings is not None and settings.verb != "listen" else ""
        choice = ways.from_source(
            source.scheme, copies=source.copies, alone=alone if alone in STRAIGHT else ""
        )
        if choice.method == "vmsplice" and source.c.memory:
            pass  # it is memory already
        elif choice.method == "vmsplice" and source.c.left > 0:
            self._mapped = MappedFile(source.c.fd, int(source.c.offset) + int(source.c.left))
            source.c.memory = self._mapped.pointer()
        elif choice.method == "vmsplice":
            choice = Choice("splice", "an empty file cannot be mapped")
        source.c.method = METHODS[choice.method]
        return choice

    def go_straight(self, chain: Chain, ways: Ways) -> None:
        """A socket whose only taker is a file is read into memory that the file is written from, if there is some."""
        sink = chain.outlets[0].sink
        if len(chain.nodes) == 1 and self.source.c.is_socket and sink is not None:
            choice = ways.straight(self.source.scheme)
            if choice is not None and sink.go_straight(choice.reason):
                self.choice = choice
                self.source.c.method = core.COPY

    def copies(self, name: str) -> None:
        """The kernel refused to splice from it with the errno of that name; the pump copies from now on."""
        self.choice = Choice("copy", f"splice from {self.source.address} answered {name}")

    def ended(self, code: int, broken_off: str = "") -> None:
        """It came to its end, failed with `code`, or is not read further for the reason `broken_off`."""
        self.over = True
        if self._clock is not None:
            self._clock.cancel()
        if code == errno.EFAULT and self._mapped is not None:
            code = errno.EIO  # a page of the mapped file could not be read
        if broken_off:
            self._failed(broken_off)
            if self.source.c.is_socket:  # its peer is told at once, however long what it gave takes
                self.source.close(reset=True)
        elif why := self.source.broke_off():
            self._failed(why)
        elif not self.look_for_change() and code:
            self._failed("", code=code)
        elif not self.error and self.source.c.left > 0:
            self._failed(f"it ended {self.source.c.left} bytes early")

    def look_for_change(self) -> bool:
        """Whether what was read changed underneath; then the stream is not whole."""
        if not self.error and (changed := self.source.changed()):
            self._failed(changed, "send it again when nobody writes to it")
        return bool(self.error)

    def _failed(self, reason: str, advice: str = "", code: int = 0) -> None:
        error = self.source.error("reading from", code, reason=reason, advice=advice)
        self.error = str(error)
        if not self.source.quiet:
            log.warning("%s: %s", self._route, error)

    def close(self, *, reset: bool) -> None:
        """Closes the source, with a reset when its peer must know that the stream was not delivered."""
        if self._clock is not None:
            self._clock.cancel()
        self.source.close(reset=reset)
        self.source.unwire()
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
