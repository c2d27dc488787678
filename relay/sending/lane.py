"""What `relay send` carries, and the lanes that carry it.

document    one stream: a file, a fifo or stdin
lane        one engine (thread) that carries documents one after the other, each through its own pipeline
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from relay.endpoints.base import Source
from relay.endpoints.fifo import FifoSource
from relay.endpoints.file import FileSource, Identity
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.endpoints.stdio import InheritedSource
from relay.engine import Engine
from relay.errors import EndpointError, RelayError, SourceError
from relay.journal.record import SessionRecord, SinkRecord
from relay.kernel.probe import machine
from relay.pipeline.pipeline import Pipeline
from relay.pipeline.sinks import Making
from relay.sending.order import Order
from relay.sending.progress import Standing
from relay.spill.spills import Spills
from relay.stages.base import StageSettings
from relay.stages.checksum import Settings as ChecksumSettings
from relay.stages.limit import Settings as LimitSettings
from relay.stages.stage import Turn
from relay.stages.tee import Settings as TeeSettings
from relay.stages.throttle import Settings as ThrottleSettings
from relay.ways import Ways

_ids = itertools.count(1)

_AGAIN = "send it again when nobody writes to it"


class Document:
    """One stream to be sent. Lanes share it: its fields are set once, under the lock where two might."""

    def __init__(self, path: str, order: Order) -> None:
        self.path = path
        self.name = "stdin" if path == "-" else Path(path).name or path
        self.shown = "stdin" if path == "-" else path
        self.kind, self.expected = _kind_and_size(path, order)
        self.complained = False
        self._order = order
        self._identity: Identity | None = None
        self._lock = threading.Lock()

    @property
    def once(self) -> bool:
        """Whether it can be read only once, and so is teed."""
        return self.kind != "file"

    def source(self, engine: Engine) -> Source:
        """A source of it, not open yet."""
        order = self._order
        if self.kind == "stdin":
            return InheritedSource(engine, 0, offset=order.offset, length=order.length)
        if self.kind == "fifo":
            fifo = FifoSource(engine, self.path)
            fifo.c.left = -1 if order.length is None else order.offset + order.length
            return fifo
        return FileSource(engine, self.path, offset=order.offset, length=order.length)

    def seen(self, identity: Identity) -> bool:
        """Whether this is the state of the file that everybody else saw; the first to look decides."""
        with self._lock:
            self._identity = self._identity or identity
            return self._identity == identity

    def stages(self, tees: Sequence[SinkSettings]) -> tuple[StageSettings, ...]:
        """What the stream passes before the last sink."""
        order = self._order
        made: list[StageSettings] = []
        if self.once and order.offset and not _is_file(0 if self.kind == "stdin" else self.path):
            made.append(LimitSettings(skip=order.offset))
        if order.rate:
            made.append(ThrottleSettings(rate=order.rate))
        if self.once and order.algorithm:
            made.append(ChecksumSettings(algorithm=order.algorithm))
        made += [TeeSettings(to=sink) for sink in tees]
        return tuple(made)


def _is_file(path: str | int) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - stdin is a number
    except OSError:
        return False  # whatever it is, opening it will say so


def _kind_and_size(path: str, order: Order) -> tuple[str, int | None]:
    """file, fifo or stdin; and the bytes that will be sent if that is known."""
    if path != "-" and Path(path).is_fifo():
        return "fifo", order.length
    kind = "stdin" if path == "-" else "file"
    try:
        status = os.stat(0 if path == "-" else path)  # noqa: PTH116 - stdin is a number
    except OSError:
        return kind, 0
    if order.length is not None or not stat.S_ISREG(status.st_mode):
        return kind, order.length
    start = order.offset
    if path == "-":
        start += os.lseek(0, 0, os.SEEK_CUR)
    return kind, max(0, status.st_size - start) if status.st_size else None


class Receiver:
    """One address, and the bytes it got of the streams that are over."""

    def __init__(self, settings: SinkSettings) -> None:
        self.settings = settings
        self.sent = 0


class _Now(NamedTuple):
    """What a lane is at. Replaced whole, so that another thread never sees half of it."""

    document: Document | None
    number: int
    pipeline: Pipeline | None
    began: float


class Lane:
    """Carries `documents` in order to `receivers`, teed if there are several; owns its engine.

    `on_over(document, record)` is called after each and `on_done(lane)` after the last, on the lane's thread.
    """

    def __init__(
        self,
        name: str,
        order: Order,
        documents: Sequence[Document],
        receivers: Sequence[Receiver],
        on_begin: Callable[[Document], None],
        on_over: Callable[[Document, SessionRecord], None],
        on_done: Callable[[Lane], None],
    ) -> None:
        self.receivers = receivers
        self._order = order
        self._todo = deque(documents)
        self._count = len(documents)
        self._on_begin, self._on_over, self._on_done = on_begin, on_over, on_done
        self._ways = Ways(machine(), order.method)
        self._patience = order.wait
        self._now = _Now(None, 0, None, 0.0)
        self._spills = Spills()
        self._engine = Engine(name)

    # -- on the main thread

    def start(self) -> None:
        """Begins with the first document."""
        self._engine.start()
        self._engine.post(self._next)

    def abort(self, reason: str) -> None:
        """Ends the stream under way, leaves those that wait."""
        self._engine.post(lambda: self._abort(reason))

    def close(self) -> None:
        """Ends the engine. The lane must be done, or never begun."""
        self._engine.stop()
        self._engine.close()

    def standings(self, whole: int | None, streams: int, before: int) -> list[Standing]:
        """How far each receiver is; `before` streams of `streams` went before this lane's first."""
        document, number, pipeline, began = self._now
        moved = [0] * len(self.receivers)
        if pipeline is not None:
            outlets = [outlet for outlet in pipeline.chain.outlets if not outlet.hidden]
            sinks = [outlet.sink for outlet in outlets]
            moved = [0 if sink is None else sink.moved for sink in sinks]
        return [
            Standing(
                address=str(receiver.settings.address),
                stream=document.shown if document else "",
                number=before + number,
                streams=streams,
                bytes=count,
                total=document.expected if document else None,
                sent=receiver.sent + count,
                whole=whole,
                seconds=time.monotonic() - began if document else 0.0,
            )
            for receiver, count in zip(self.receivers, moved, strict=True)
        ]

    # -- on the engine's thread

    def _next(self) -> None:
        if not self._todo:
            self._now = self._now._replace(document=None, pipeline=None)
            self._on_done(self)
            return
        document = self._todo.popleft()
        self._now = _Now(document, self._now.number + 1, None, time.monotonic())
        source = document.source(self._engine)
        source.on_fail = lambda error: self._not_begun(document, error)
        source.on_open = lambda: self._begin(document, source)
        source.open()

    def _begin(self, document: Document, source: Source) -> None:
        if isinstance(source, FileSource) and not document.seen(source.identity):
            source.close()
            changed = "it changed after another address was begun"
            self._not_begun(document, SourceError(document.path, "reading from", 0, _AGAIN, reason=changed))
            return
        self._on_begin(document)
        at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        turn = Turn(route="send", id=str(next(_ids)), time=at, peer=source.peer, name=document.name)
        *tees, last = [self._settings(receiver, document) for receiver in self.receivers]
        try:
            pipeline = Pipeline(
                self._engine,
                "send",
                document.stages(tees),
                last,
                self._ways,
                persistent=False,
                making=Making(
                    patience=self._patience,
                    spill=partial(self._spills.sink, self._ways, patience=self._patience),
                ),
                on_over=lambda record: self._engine.post(lambda: self._over(document, record)),
            )
        except RelayError as error:
            source.close(reset=True)
            self._not_begun(document, error)
            return
        self._now = self._now._replace(pipeline=pipeline)
        pipeline.open()
        try:
            pipeline.begin(source, turn)
        except (RelayError, OSError) as error:  # no descriptor is left for a sink's own pipes
            pipeline.abort(str(error))

    @staticmethod
    def _settings(receiver: Receiver, document: Document) -> SinkSettings:
        """A file is a log already: each address reads it where it stands, nothing needs to be kept for it."""
        if document.once or receiver.settings.slow.policy != "spill":
            return receiver.settings
        return receiver.settings.model_copy(update={"on_slow": OnSlow(policy="block")})

    def _not_begun(self, document: Document, error: RelayError) -> None:
        """The document cannot be read, or there is nothing left to carry it with: no sink was opened."""
        reason = str(error)
        sinks = []
        for receiver in self.receivers:
            address = str(receiver.settings.address)
            sinks.append(SinkRecord(address, address, 0, 0.0, "", "failed", reason))
        record = SessionRecord(
            route="send", id="", source=document.shown, peer="", bytes=0, seconds=0.0, method="",
            ended_by="source", result="failed", reason=reason, sinks=sinks,
            source_failed=isinstance(error, EndpointError),
        )  # fmt: skip
        self._on_over(document, record)
        self._engine.post(self._next)  # and not at once: a thousand missing files are no reason to recurse

    def _over(self, document: Document, record: SessionRecord) -> None:
        self._now = self._now._replace(document=None, pipeline=None)
        for receiver, sink in zip(self.receivers, record.sinks, strict=True):
            receiver.sent += sink.bytes
            if sink.result == "failed":
                sink.reason = sink.reason or record.reason
        if all(sink.result == "failed" and not sink.bytes for sink in record.sinks):
            self._patience = 0.0  # nobody came within all of it: the rest need not wait that long again
        self._on_over(document, record)
        self._next()

    def _abort(self, reason: str) -> None:
        self._todo.clear()
        pipeline = self._now.pipeline
        if pipeline is not None:
            pipeline.abort(reason)
