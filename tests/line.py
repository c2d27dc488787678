"""A pipeline on an engine that the test turns by hand: a source, a row of teeing nodes, a sink for each."""

from __future__ import annotations

import dataclasses
import select
import socket
from collections.abc import Sequence
from typing import Any

from descriptors import Descriptors
from peers import PATIENCE, eventually
from rig import NAMES

from relay.endpoints.ferry import Ferry
from relay.engine import Engine
from relay.kernel import core

END = int | socket.socket


@dataclasses.dataclass
class File:
    """A sink that may block: a ferry's thread writes to `fd`, by read and write if `copy`."""

    fd: int
    copy: bool = False
    capacity: int = 65536


class Line:
    """Borrows its descriptors; `events` are (what, who, errno), who being "pipeline", "node0" or "sink0".

    `close` unregisters everything and waits for the ferries' threads.
    """

    def __init__(
        self,
        engine: Engine,
        fds: Descriptors,
        source: END | bytes,
        sinks: Sequence[END | File],
        *,
        capacity: int = 65536,
        copy: bool = False,
    ) -> None:
        self.engine = engine
        self.events: list[tuple[str, str, int]] = []
        self.failures: list[BaseException | None] = []
        self.c = core.new("pipeline", token=self._hear("pipeline"))
        self.source = self._source(fds, source)
        self.source.reads = self.c
        self.c.source = self.source
        self.nodes: list[Any] = []
        self.sinks: list[Any] = []
        self.ferries: list[Ferry] = []
        self._buffers: list[Any] = []
        for number, sink in enumerate(sinks):
            ends = fds.pipe(capacity)
            node = core.new(
                "node", token=self._hear(f"node{number}"), pipe_r=ends.r, pipe_w=ends.w, capacity=capacity,
                left=-1, align=1, tee_copies=int(copy), out_copies=int(copy), stash_size=65536,
            )  # fmt: skip
            self._buffers.append(core.buffer(65536))
            node.stash = self._buffers[-1]
            self.nodes.append(node)
            self.sinks.append(self._sink(sink, number))
            node.sink = self.sinks[-1]
        for node, following in zip(self.nodes, self.nodes[1:], strict=False):
            node.next = node.after = following
        self.c.head, self.c.nodes = self.nodes[0], len(self.nodes)
        if copy:
            self.source.method = core.COPY
        self._register(self.source, select.EPOLLIN | select.EPOLLRDHUP)
        engine.ready(self.c)

    def _hear(self, who: str) -> int:
        return self.engine.register(lambda what, error, _mask: self.events.append((NAMES[what], who, error)))

    @staticmethod
    def _source(fds: Descriptors, source: END | bytes) -> Any:
        if isinstance(source, bytes):
            end = core.new_end(fds.memfd(source), core.INSTANT)
            end.offset, end.left, end.readable = 0, len(source), 1
            return end
        end = core.new_end(source if isinstance(source, int) else source.fileno())
        end.is_socket = int(isinstance(source, socket.socket))
        return end

    def _sink(self, sink: END | File, number: int) -> Any:
        end = core.new_end()
        end.token = self._hear(f"sink{number}")
        end.writes = self.c
        if isinstance(sink, File):
            target = sink

            def work() -> None:
                ferry.carry(target.fd, copy=target.copy)

            def ended(_done: object, error: BaseException | None) -> None:
                self.failures.append(error)
                self.engine.ready(
                    self.c
                )  # its thread's last answer may come after it is taken off the engine

            ferry = Ferry(self.engine, end, target.capacity, work, ended)
            self.ferries.append(ferry)
            ferry.start()
            return end
        end.fd = sink if isinstance(sink, int) else sink.fileno()
        end.is_socket = int(isinstance(sink, socket.socket))
        self._register(end, select.EPOLLOUT)
        return end

    def _register(self, end: Any, mask: int) -> None:
        if end.kind == core.POLLED and self.engine.add_end(end, mask):
            end.kind, end.readable, end.writable = core.INSTANT, 1, 1

    def turn(self, timeout: float = 0.0) -> None:
        """One turn of the engine."""
        self.engine.turn(timeout)

    def until(self, what: str, who: str = "pipeline") -> int:
        """Turns until that event has come; the errno it carried."""
        return next(error for w, name, error in self.turned(what, who) if (w, name) == (what, who))

    def turned(self, what: str, who: str) -> list[tuple[str, str, int]]:
        """Turns until that event has come; all events so far."""

        def turn() -> bool:
            self.turn(0.05)
            return any((w, name) == (what, who) for w, name, _ in self.events)

        eventually(turn, f"{what} of {who}", patience=PATIENCE)
        return self.events

    def end_ferries(self) -> None:
        """No more will come to the files: waits until their threads have ended."""
        for ferry in self.ferries:
            ferry.end()

        def turn() -> bool:
            self.turn(0.05)
            return len(self.failures) == len(self.ferries)

        eventually(turn, "the threads of the ferries have ended")

    def close(self) -> None:
        """Takes everything off the engine. Safe to call again."""
        if len(self.failures) < len(self.ferries):
            self.end_ferries()
        self.engine.forget(self.c)
        for end in (self.source, *self.sinks):
            if end.kind == core.POLLED:
                self.engine.drop_end(end)
                end.kind = 0
