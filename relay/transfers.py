"""What the commands do, from code: `send` and `run`, with progress, cancellation, and errors that are raised.

Both return when everything is done, on whichever thread they are called, and leave the process's signals alone.
Everything happens on threads of their own; callbacks are called on the caller's. relay.aio has them for asyncio.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from relay.config.data import from_data
from relay.config.models import Config, Route
from relay.errors import RelayError, TransferCancelled, TransferError, UsageError
from relay.journal.record import SessionRecord
from relay.kernel import memfd
from relay.sending.order import order
from relay.sending.progress import Progress, Standing
from relay.sending.sending import Sending
from relay.serving.route import RunningRoute
from relay.serving.server import Server

if TYPE_CHECKING:
    from typing_extensions import Buffer

# What goes wrong is raised here; a program that wants the log lines as well sets up logging.
logging.getLogger("relay").addHandler(logging.NullHandler())

Path: TypeAlias = "str | os.PathLike[str]"

IN_MEMORY = "memory"  # the name of a stream that is a buffer


class Cancel:
    """Ends what it was given to, from any thread: `cancel()`. Once it was called, whatever begins ends at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._tell: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        """Whether it was called."""
        return self._count > 0

    def cancel(self) -> None:
        """Ends it: `send` at once, `run` as its `drain` says, and at once the second time."""
        with self._lock:
            self._count += 1
            tell = list(self._tell)
        for one in tell:
            one()

    def attach(self, tell: Callable[[], None]) -> Callable[[], None]:
        """relay's own: `tell` is called at each cancel, now if there was one. Returns what takes it off again."""
        with self._lock:
            self._tell.append(tell)
            count = self._count
        if count:
            tell()

        def detach() -> None:
            with self._lock:
                self._tell.remove(tell)

        return detach


@dataclass(frozen=True)
class Outcome:
    """What became of a transfer. `code` is the exit code that the command would have; 0: all was delivered.

    `results` has a mapping for each stream and sink, as the command's JSON lines have (`sink`, `file`, `bytes`,
    `seconds`, `method`, `result`, `reason`, `checksum`, ...; empty for `run`); `records` has one for each
    stream with all its sinks.
    """

    code: int
    results: tuple[Mapping[str, Any], ...]
    records: tuple[SessionRecord, ...]

    @property
    def bytes(self) -> int:
        """Bytes delivered, over all sinks."""
        return sum(sink.bytes for record in self.records for sink in record.sinks)

    def check(self) -> Outcome:
        """Itself, or TransferError when anything was not delivered."""
        if not self.code:
            return self
        reasons = [record.reason for record in self.records if record.reason]
        reasons += [sink.reason for record in self.records for sink in record.sinks if sink.reason]
        if self.code == 6:
            reasons = ["the checksum is another than the one given"]
        said = "; ".join(dict.fromkeys(reasons)) or f"code {self.code}"
        kind = TransferCancelled if self.code > 128 else TransferError
        raise kind(said, outcome=self)


class _Told(Progress):
    """Progress that a callback is told of, and results that are kept."""

    def __init__(
        self, callback: Callable[[Sequence[Standing]], None] | None, names: Mapping[str, str]
    ) -> None:
        super().__init__(sys.stderr)
        self.results: list[Mapping[str, Any]] = []
        self.interval = None if callback is None else 0.1
        self._callback = callback
        self._names = names

    def show(self, standings: Sequence[Standing], *, last: bool = False) -> None:
        """Hands the standings on."""
        if self._callback is not None:
            self._callback(standings)

    def result(self, line: str, fields: Mapping[str, Any]) -> None:
        """Keeps them."""
        name = str(fields.get("file", ""))
        self.results.append({**fields, "file": self._names.get(name, name)})


def send(
    source: Path | Buffer | Sequence[Path],
    to: Path | Sequence[Path],
    *,
    method: str = "auto",
    rate: str | int | None = None,
    offset: str | int = 0,
    length: str | int | None = None,
    checksum: str = "",
    wait: str | float = 0.0,
    on_slow: str = "block",
    progress: Callable[[Sequence[Standing]], None] | None = None,
    cancel: Cancel | None = None,
    check: bool = True,
) -> Outcome:
    """Sends files, or bytes in memory, to every address in `to`, as `relay send` does; waits until it is done.

    `source` is a path ("-": stdin), several of them (each a stream of its own, in order), or a buffer, whose bytes,
    in C order, are copied once before anything is sent. Amounts are numbers (bytes, bytes a second, seconds) or
    text with units ("10MB/s"). Delivered means acknowledged by the receiver's kernel.

    `progress` is called ten times a second with a Standing for each address. `cancel` ends it from another
    thread. Raises TransferError, whose `outcome` says what did arrive, when anything was not delivered
    (TransferCancelled when it was cancelled), unless `check` is False; UsageError for arguments that make
    no sense.
    """
    if not _several(to):
        raise UsageError("there is nobody to send to: `to` is empty")
    with ExitStack() as stack:
        names: dict[str, str] = {}
        files = [_path_of(one, stack, names) for one in _several(source)]
        wanted = order(
            files, [os.fspath(one) for one in _several(to)], method=method, rate=rate, offset=offset,
            length=length, checksum=checksum, wait=wait, on_slow=on_slow,
        )  # fmt: skip
        told = _Told(progress, names)
        sending = Sending(wanted, told, signals=False)
        if cancel is not None:
            stack.callback(cancel.attach(sending.cancel))
        code = sending.run()
        records = (
            replace(record, source=names.get(record.source, record.source)) for record in sending.records
        )
        outcome = Outcome(code, tuple(told.results), tuple(records))
    return outcome.check() if check else outcome


def _several(given: Any) -> Sequence[Any]:
    """One thing as a sequence of one; a buffer is one thing."""
    return given if isinstance(given, list | tuple) else (given,)


def _path_of(source: Any, stack: ExitStack, names: dict[str, str]) -> str:
    """A path to `source`; of a memfd that holds it, if it is a buffer."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    view = memoryview(source)
    flat = (
        memoryview(view.tobytes())
        if not view.c_contiguous
        else view.cast("B")
        if view.nbytes
        else memoryview(b"")
    )
    fd = memfd.make("relay-send")
    stack.callback(os.close, fd)
    memfd.fill(fd, flat)
    path = f"/proc/self/fd/{fd}"
    names[path] = IN_MEMORY
    return path


def run(
    config: Path | Mapping[str, Any] | Config | Route,
    *,
    once: bool = False,
    on_ready: Callable[[list[str]], None] | None = None,
    on_record: Callable[[SessionRecord], None] | None = None,
    progress: Callable[[Sequence[Standing]], None] | None = None,
    cancel: Cancel | None = None,
    check: bool = True,
) -> Outcome:
    """Runs routes until they are done, or cancelled, as `relay serve` does, or `relay run` if `once`.

    `config` is the path of a YAML file, a mapping shaped like one, a `Config`, or a single `Route`. With
    `once` a source that listens takes one connection. `on_ready` is given the addresses that are listened
    on, `on_record` the record of each stream as it ends, `progress` (five times a second) how far each sink
    of each stream is. `cancel` drains, and ends at once the second time.

    Outcome.records holds the streams of routes that end by themselves, not those of a server that runs for
    ever. Raises ConfigErrors, and, unless `check` is False, the error of what cannot be opened, and
    TransferError when a stream was not delivered whole. A cancelled run is no error unless its drain was cut
    short.
    """
    records: list[SessionRecord] = []
    untold: deque[SessionRecord] = (
        deque()
    )  # engines tell of the ends of streams, the caller's thread hears of them

    failed: list[BaseException] = []

    def ready(routes: list[RunningRoute]) -> None:
        if on_ready is None:
            return
        try:
            on_ready([address for route in routes for address in route.bound])
        except BaseException as error:
            failed.append(error)
            server.end()
            server.end()

    def over(record: SessionRecord) -> None:
        if finite:
            records.append(record)
        untold.append(record)

    def far(routes: list[RunningRoute]) -> None:
        while untold:
            record = untold.popleft()
            if on_record is not None:
                on_record(record)
        if progress is not None:
            progress([standing for route in routes for standing in standings(route)])

    loaded = _config(config)
    finite = once or all(route.source.verb == "read" for route in loaded.routes.values())
    server = Server(loaded, once=once, on_record=over, on_ready=ready, signals=False, on_progress=far)
    with ExitStack() as stack:
        if cancel is not None:
            stack.callback(cancel.attach(server.end))
        code = server.run()
    far([])
    if failed:
        raise failed[0]
    if check and server.refusal is not None:
        raise server.refusal
    outcome = Outcome(code, (), tuple(records))
    return outcome.check() if check else outcome


def _config(given: Path | Mapping[str, Any] | Config | Route) -> Config:
    if isinstance(given, Config):
        return given
    if isinstance(given, Route):
        return from_data({"routes": {"run": given}})
    if isinstance(given, Mapping):
        return from_data(given)
    from relay.config.load import load_to_run  # YAML, for who has some

    return load_to_run(os.fspath(given))


def standings(route: RunningRoute) -> list[Standing]:
    """How far each sink of each stream of `route` is; the whole of a stream is not known beforehand."""
    found = []
    for number, pipeline in enumerate(route.pipelines, 1):
        for outlet in pipeline.chain.outlets:
            if outlet.hidden or outlet.sink is None:
                continue
            moved = outlet.sink.moved
            found.append(
                Standing(
                    address=str(outlet.sink.address), stream=route.name, number=number, streams=0,
                    bytes=moved, total=None, sent=moved, whole=None, seconds=0.0,
                )
            )  # fmt: skip
    return found


__all__ = ["Cancel", "Outcome", "RelayError", "Standing", "TransferError", "run", "send"]
