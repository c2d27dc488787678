"""A ferry: one blocking end, one thread, two loads that change hands whole.

Facts (see kernel/ferry.c and kernel/loads.c): a pipe is locked while a splice on it blocks, and a write to a regular
file may block for seconds. So the engine fills a pipe that is its own, or a span of memory, hands it over, and does
not touch it until it comes back empty. While both are away the sink is slow.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import threading
from collections.abc import Callable
from typing import Any

from relay.engine import WATCH_HINTS, Engine
from relay.kernel import core
from relay.kernel.pipe import Pipe

BUFFER = 256 * 1024  # bytes copied at a time where the end cannot be spliced
MOST_MEMORY = 96 << 20  # bytes of memory that all ferries of one engine may have; further ones do with pipes
LARGE = 2 << 20  # bytes of a load in memory: few large ones wake threads less often,
FOR_LARGE = 32 << 20  # while no more than so much of that memory is taken;
SMALL = 512 << 10  # after that small ones are for many


class Ferry:
    """Owns both pipes and both eventfds until its thread has ended and `close` was called.

    `work` runs on the thread; it takes loads by `wait`/`give_back` or all of them by `carry`, and what it
    returns (or raises) is given to `then` on the engine's thread, after which the ferry closes itself."""

    def __init__(
        self,
        engine: Engine,
        end: core.Struct,
        capacity: int,
        work: Callable[[], Any],
        then: Callable[[Any, BaseException | None], None],
    ) -> None:
        self._engine = engine
        self._work = work
        self._then = then
        with (
            contextlib.ExitStack() as undo
        ):  # whoever has the first three must not keep them without the fourth
            first = Pipe(capacity)
            undo.callback(first.close)
            second = Pipe(capacity)
            undo.callback(second.close)
            self._knock = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._knock)
            self._answer = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.pop_all()
        self.pipes = (first, second)
        self.c = core.new("ferry", fd=-1, method=core.SPLICE, knock=self._knock, answer=self._answer)
        for i, pipe in enumerate(self.pipes):
            self.c.pipe_r[i], self.c.pipe_w[i] = pipe.read_fd, pipe.write_fd
        self._buffer: core.Struct = None
        self._afterwards: list[Callable[[], None]] = []
        self._memory: mmap.mmap | None = None
        self._end = end
        end.kind = core.FERRY
        end.ferry = self.c
        self._answered = core.new("end", fd=self._answer, kind=core.ANSWER)
        self._answered.writes = end.writes
        answer = int(core.lib.relay_watch(engine.c, self._answered, select.EPOLLIN))
        self._watched = answer == 0
        if answer:
            end.ferry, end.kind = core.ffi.NULL, core.POLLED
            self.close()
        core.check(answer, "epoll_ctl", hint=WATCH_HINTS.get(-answer, ""))
        self._thread = threading.Thread(target=self._run, name=f"{engine.name}-ferry", daemon=True)

    def have_memory(self) -> bool:
        """Gives it memory for two loads, which a source is read into straight; False if there is none.

        Pages that nothing was written to yet cost nothing: an idle stream has none. Only `carry` takes such loads.
        """
        if self._memory is not None or self._knock < 0:
            return self._knock >= 0
        room = LARGE if self._engine.ferried + 2 * LARGE <= FOR_LARGE else SMALL
        if self._engine.ferried + 2 * room > MOST_MEMORY:
            return False
        try:
            self._memory = mmap.mmap(-1, 2 * room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # a limit of the process (ulimit -v), or overcommit that is strict
            return False
        self._pointer = core.ffi.from_buffer("char[]", self._memory)
        self._engine.ferried += 2 * room
        self.c.memory, self.c.room = self._pointer, room
        return True

    def start(self) -> None:
        """Starts the thread. Raises OSError (EAGAIN) when none is to be had; the ferry is closed then."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._end.ferry = core.ffi.NULL
            self._end.kind = core.POLLED
            self.close()
            raise OSError(errno.EAGAIN, str(error)) from error

    def end(self) -> None:
        """No more will come: the thread finishes what it has. On the engine's thread."""
        if self._knock >= 0:
            core.lib.relay_ferry_end(self.c)

    def join(self, timeout: float) -> None:
        """Waits for the thread, which nothing may hold any more: what it returned is told on the engine soon."""
        self._thread.join(timeout)

    def release(self) -> None:
        """The pipeline is going away: the thread's answers wake nobody any more."""
        self._answered.writes = core.ffi.NULL
        if self._watched:
            self._watched = False
            core.lib.relay_unwatch(self._engine.c, self._answered)

    # -- on the ferry's thread

    def wait(self) -> tuple[Pipe, int]:
        """The next loaded pipe and its bytes; 0 bytes means the end."""
        load = int(core.lib.relay_ferry_wait(self.c))
        if load < 0:
            raise OSError(-load, os.strerror(-load))
        return self.pipes[self.c.away], load

    def wait_until(self, timeout: float | None, *, beside: int = -1) -> tuple[Pipe, int] | None:
        """As `wait`, but None after `timeout` seconds (None: never), when somebody nudged, or when the descriptor
        `beside` can be read."""
        if self.c.turn[self.c.away] != core.lib.RELAY_WITH_THREAD and not self.c.ending:
            poll = select.poll()
            poll.register(self._knock, select.POLLIN)
            if beside >= 0:
                poll.register(beside, select.POLLIN)
            ready = [fd for fd, _mask in poll.poll(None if timeout is None else timeout * 1000)]
            if self._knock not in ready:
                return None
            if self.c.turn[self.c.away] != core.lib.RELAY_WITH_THREAD and not self.c.ending:
                os.eventfd_read(self._knock)  # a nudge; a hand-over after this look knocks again
                return None
        return self.wait()

    def nudge(self) -> None:
        """Wakes the thread without giving it anything. From the engine's thread."""
        if self._knock >= 0:
            core.lib.relay_ferry_nudge(self.c)

    def give_back(self) -> None:
        """The pipe that `wait` gave is empty again."""
        core.lib.relay_ferry_give_back(self.c)

    def carry(self, fd: int, *, copy: bool) -> bool:
        """Carries every load to `fd` until the end (True), or until somebody nudged (False): then it is called again.

        Raises OSError with what the write answered. With `c.ahead`, blocks may be reserved up to `c.reserved`.
        """
        self.c.fd = fd
        if copy:
            self.c.method = core.COPY
        while True:
            if self.c.method == core.COPY and self._buffer is None:
                self._buffer = core.room(BUFFER)
                self.c.buffer, self.c.buffer_size = self._buffer, BUFFER
            answer = int(core.lib.relay_ferry_run(self.c))
            if answer in (0, -errno.EINTR):
                return answer == 0
            if not (self._buffer is None and self.c.method == core.COPY):
                raise OSError(-answer, os.strerror(-answer))

    def _run(self) -> None:
        try:
            result, failed = self._work(), None
        except BaseException as error:  # handed to `then`, whatever it is
            result, failed = None, error
        self._engine.post(lambda: self._ended(result, failed))

    def afterwards(self, action: Callable[[], None]) -> None:
        """Calls `action` on the engine's thread once its own thread has ended; at once if it has."""
        if self._knock < 0:
            action()
        else:
            self._afterwards.append(action)

    def _ended(self, result: Any, failed: BaseException | None) -> None:
        self._thread.join()
        for i in range(2):  # it failed, and what it had is nobody's any more
            self.c.load[i], self.c.turn[i] = 0, core.lib.RELAY_WITH_ENGINE
        self._then(result, failed)
        self.close()

    def close(self) -> None:
        """Closes the pipes and eventfds. The thread must have ended. Safe to call again."""
        if self._knock < 0:
            return
        self.release()
        for action in self._afterwards:
            action()
        self._afterwards.clear()
        for pipe in self.pipes:
            pipe.close()
        self.c.buffer, self.c.buffer_size = core.ffi.NULL, 0
        self._buffer = None  # at once: the collector may come late
        if self._memory is not None:
            self.c.memory = core.ffi.NULL
            core.ffi.release(self._pointer)
            self._engine.ferried -= len(self._memory)
            self._memory.close()
        os.close(self._knock)
        os.close(self._answer)
        self._knock = self._answer = -1
        for i in range(2):
            self.c.pipe_r[i] = self.c.pipe_w[i] = -1
