"""The logs of one relay: their directories, each locked once, their names, and the engines that read disks."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from weakref import WeakSet

from relay.endpoints.base import hint
from relay.endpoints.options import OnSlow
from relay.endpoints.settings import SinkSettings
from relay.endpoints.template import fill_path
from relay.engine import Engine
from relay.errors import SinkError
from relay.log.log import Log
from relay.pipeline.outlet import Outlet
from relay.spill.delivery import Delivery
from relay.spill.directory import SpillDirectory
from relay.spill.sink import Resumed, SpillSink
from relay.stages.base import StageSettings
from relay.stages.stage import Turn
from relay.units import show_size
from relay.ways import Ways

log = logging.getLogger("relay.spill")


class Spills:
    """Makes the sinks that read through logs; owns the directories and the reading engines until `close`.

    Made before routes open; `close` after they have ended. Pipelines on any engine may ask it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._directories: dict[str, SpillDirectory] = {}
        self._readers: dict[str, Engine] = {}
        self._claimed: set[tuple[str, str]] = set()
        self._lent: dict[tuple[str, str], Log] = {}  # those on disk, by where they lie
        self._made: defaultdict[str, WeakSet[Log]] = defaultdict(
            WeakSet
        )  # all that sinks write, by their routes

    def claim(self, path: str) -> SpillDirectory:
        """The directory at `path`, locked. Raises SinkError when it cannot be used."""
        key = os.path.realpath(path)
        with self._lock:
            if key not in self._directories:
                self._directories[key] = SpillDirectory(path)
            return self._directories[key]

    def sink(
        self,
        ways: Ways,
        engine: Engine,
        turn: Turn,
        outlet: Outlet,
        persistent: bool,
        patience: float | None = None,
    ) -> SpillSink:
        """A sink for this stream that reads through a log; for `patience` see Delivery.

        Raises SinkError when the directory cannot be used.
        """
        sink, slow = outlet.settings, outlet.slow
        assert sink is not None
        copy = ways.to_sink("file").method == "copy"
        standing = persistent and not outlet.per_turn
        drain = outlet.policy != "block"
        if slow.policy != "spill":
            rejoins = standing and sink.verb == "connect"
            delivery = Delivery(
                engine, turn.route, kept := self._note(turn, Log(largest=slow.buffer)), outlet.branch, sink, ways, turn,
                broken="rejoin" if rejoins else "fail", in_place=standing,
            )  # fmt: skip
            return SpillSink(
                engine, str(sink.address), kept, delivery, drain=drain, copy=copy, rejoins=rejoins
            )
        if slow.directory is None:
            kept, reader = self._note(turn, Log(largest=slow.max or 0)), engine
        else:
            kept = self._log(
                slow.directory,
                turn,
                sink,
                slow.max or 0,
                persistent=persistent,
                again=outlet.sink is not None,
            )
            reader = self._reader(turn.route)
        delivery = Delivery(
            reader, turn.route, kept, outlet.branch, sink, ways, turn, patience=patience, in_place=standing
        )
        made = SpillSink(engine, str(sink.address), kept, delivery, drain=drain, copy=copy)
        if outlet.sink is not None:
            made.follows()
        return made

    def _log(
        self, path: str, turn: Turn, sink: SinkSettings, largest: int, *, persistent: bool, again: bool
    ) -> Log:
        """The log on disk for a stream, or for all streams of a route that keeps its sinks.

        `again`: the disk failed under the last one; if that left it damaged it is kept, and a new one begun.
        """
        directory = self.claim(path)
        name = prefix(turn.route, sink)
        with self._lock:
            if not persistent:
                try:
                    name = directory.free_name(f"{name}.{turn.time}-{turn.id}")
                except OSError as error:  # too long a name, or a directory that may not be looked at
                    raise SinkError(
                        str(directory.path / name),
                        "naming a log in",
                        error.errno or 0,
                        hint(error.errno or 0),
                    ) from error
            key = (str(directory.path), name)
            lent = self._lent.get(key)
            if lent is not None and not lent.closed.is_set():
                raise SinkError(
                    str(directory.path / name), "opening the log in", 0,
                    "give each of them a directory of its own", reason="another sink of this relay uses it",
                )  # fmt: skip
            try:
                kept = directory.log(name, largest=largest)
            except SinkError as error:
                if not again or error.errno:
                    raise
                log.error("%s: %s; it is kept, and a new one begun", turn.route, error)
                key = (str(directory.path), directory.free_name(name))
                kept = directory.log(key[1], largest=largest)
            self._claimed.add(key)
            self._lent = {where: one for where, one in self._lent.items() if not one.closed.is_set()}
            self._lent[key] = kept
        self._note(turn, kept)
        if persistent:
            kept.go_on()
            if left := kept.end - max(kept.acknowledged, kept.start):
                _say_resumed(turn.route, sink, left)
        return kept

    def wait_for_ends(self, route: str, patience: float) -> bool:
        """Waits until every log that sinks of the route wrote is closed; False when that takes too long."""
        deadline = time.monotonic() + patience
        with self._lock:
            made = list(self._made[route])
        return all(kept.closed.wait(max(0.0, deadline - time.monotonic())) for kept in made)

    def _note(self, turn: Turn, kept: Log) -> Log:
        with self._lock:
            self._made[turn.route].add(kept)
        return kept

    def _reader(self, route: str) -> Engine:
        """The engine that reads the route's logs: reading a disk may wait, and then the chains should not."""
        with self._lock:
            if route not in self._readers:
                self._readers[route] = Engine(f"{route}-log")
                self._readers[route].start()
            return self._readers[route]

    def resume(
        self,
        home: Engine,
        route: str,
        stages: tuple[StageSettings, ...],
        sink: SinkSettings,
        slow: OnSlow,
        ways: Ways,
        turn: Callable[[], Turn],
        on_over: Callable[[Resumed], None],
    ) -> list[Resumed]:
        """Delivers what streams of an earlier run left in their logs; for a route with a log for each stream.

        A log of which nothing is left goes. One that cannot be opened is kept, and said.
        """
        if slow.directory is None:
            return []
        directory = self.claim(slow.directory)
        begun = []
        for name in directory.found():
            key = (str(directory.path), name)
            if not name.startswith(prefix(route, sink) + ".") or key in self._claimed:
                continue
            try:
                kept = directory.log(name)
            except SinkError as error:
                log.error("%s: %s", route, error, extra={"event": "error", "route": route})
                continue
            self._claimed.add(key)
            delivery = Delivery(self._reader(route), route, kept, stages, sink, ways, turn())
            if not delivery.left:
                kept.close()
                continue
            _say_resumed(route, sink, delivery.left)
            resumed = Resumed(home, kept, delivery, on_over)
            resumed.start()
            begun.append(resumed)
        return begun

    def unclaimed(self) -> list[str]:
        """Logs that no route claims: kept, and named for the operator."""
        return [
            str(directory.path / name)
            for directory in self._directories.values()
            for name in directory.found()
            if (str(directory.path), name) not in self._claimed
        ]

    def close(self) -> None:
        """Ends the reading engines and gives the directories up."""
        for engine in self._readers.values():
            engine.stop()
        for directory in self._directories.values():
            directory.close()


def _say_resumed(route: str, sink: SinkSettings, left: int) -> None:
    log.info(
        "%s: %s of an earlier run go on to %s",
        route,
        show_size(left),
        sink.address,
        extra={"event": "resume", "route": route, "backlog": left},
    )


def prefix(route: str, sink: SinkSettings) -> str:
    """How the logs of a route's sink are named: reduced to what is safe in a file name."""
    return fill_path("{route}.{name}", {"route": route, "name": str(sink.address)})
