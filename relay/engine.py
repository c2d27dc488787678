"""One thread with one epoll loop that turns many pipelines.

The inner loop is C (kernel/loop.c) and runs without the GIL: it waits, pumps every pipeline that is ready and
comes back only with what Python must decide, as events. Each event names its target by a token; a target is a
callback registered here. All callbacks, timers and posted calls run on the engine's own thread, so what
belongs to an engine needs no locks; other threads reach it by `post` alone.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from relay.errors import KernelError, RelayBug
from relay.kernel import core
from relay.kernel.exchange import Exchange
from relay.kernel.ring import Pool

log = logging.getLogger("relay.engine")

# (what, error, mask): one of core's event kinds, an errno or 0, and for WATCHED epoll's mask
Target = Callable[[int, int, int], None]
Answer = TypeVar("Answer")

SCRATCH = 1 << 20  # bytes a copying hop may read at once; shared by all pipelines of an engine
BUDGET = 4 << 20  # bytes one pipeline may read before the others have their turn
EVENTS = 16384  # room for 4 events a node: pipelines of up to 4,000 nodes
TIMERS = 1024  # so many are kept, cancelled ones among them, before these are looked for

# What to do when epoll cannot watch one more descriptor.
WATCH_HINTS = {
    errno.ENOSPC: "this user watches as many descriptors as it may: raise fs.epoll.max_user_watches (sysctl)",
    errno.ENOMEM: "the kernel has no memory left: free some, or raise the limit of the control group",
}


class Timer:
    """A call that is due at a monotonic time; `cancel` makes it nothing."""

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Callable[[], None]) -> None:
        self.due = due
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """The action will not run. Safe at any time on the engine's thread."""
        self.action = None


class Watch:
    """A descriptor whose readiness Python wants to hear of, level-triggered. Borrows `fd`."""

    __slots__ = ("_end", "_engine")

    def __init__(self, engine: Engine, fd: int, mask: int, action: Callable[[int], None]) -> None:
        self._engine: Engine | None = engine
        self._end = core.new("end", fd=fd, kind=core.WATCH)
        self._end.token = engine.register(lambda _what, _error, got: action(got))
        try:
            answer = int(core.lib.relay_watch(engine.c, self._end, mask))
            core.check(answer, "epoll_ctl", hint=WATCH_HINTS.get(-answer, ""))
        except KernelError:
            engine.forget_token(self._end.token)
            raise

    def close(self) -> None:
        """Stops watching; the descriptor stays open. Call it before the descriptor is closed."""
        if self._engine is not None:
            core.lib.relay_unwatch(self._engine.c, self._end)
            self._engine.forget_token(self._end.token)
            self._engine = None


class Engine:
    """Owns an epoll set, a wake-up eventfd and /dev/null; `start` gives it its thread, `stop` ends it.

    An exception from a callback is logged and the loop goes on: one stream's bug is not the others' end.
    """

    def __init__(self, name: str = "engine") -> None:
        self.name = name
        self._epoll = select.epoll()
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._scratch = core.buffer(SCRATCH)
        self.c = core.new(
            "engine",
            epoll=self._epoll.fileno(),
            null_fd=self._null,
            scratch=self._scratch,
            scratch_size=SCRATCH,
            budget=BUDGET,
        )
        self.rings = Pool()
        self.shared: dict[
            object, Any
        ] = {}  # what pipelines of this engine share, each kind under keys of its own
        self.ferried = 0  # bytes of memory that ferries have (endpoints/ferry.py), which share a bound
        self._events = core.ffi.new("struct relay_event[]", EVENTS)
        self._told = memoryview(core.ffi.buffer(self._events))
        self._tokens = itertools.count(1)
        self._targets: dict[int, Target] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._most_timers = TIMERS
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._waker = Watch(self, self._wake, select.EPOLLIN, self._woken)
        self._exchange: Exchange | None = None

    # -- from any thread

    def start(self) -> None:
        """Runs the loop on a thread of its own until `stop`."""
        self._thread = threading.Thread(target=self.run, name=self.name, daemon=True)
        self._thread.start()

    def post(self, action: Callable[[], None]) -> None:
        """Runs `action` on the engine's thread soon. May be called from any thread, and from a signal handler."""
        self._posted.append(action)
        # a full counter wakes it as well; a closed engine (ValueError: -1) has no use for it
        with contextlib.suppress(OSError, ValueError):
            os.eventfd_write(self._wake, 1)

    def call(self, action: Callable[[], Answer], patience: float = 30.0) -> Answer:
        """Runs `action` on the engine's thread, which is another one and runs, and waits for its answer or its error.

        Raises RelayBug when there is none within `patience` seconds.
        """
        answer: Future[Answer] = Future()

        def run() -> None:
            try:
                answer.set_result(action())
            except BaseException as error:  # whoever asked gets it, whatever it is
                answer.set_exception(error)

        self.post(run)
        try:
            return answer.result(patience)
        except FutureTimeout as error:
            if answer.done():
                raise  # it is the action's own
            raise RelayBug(f"{self.name} did not answer within {patience:g} s") from error

    @property
    def cpu_seconds(self) -> float:
        """What its thread has used of a CPU so far; 0 before it runs and after it ended."""
        thread = self._thread
        if thread is None or thread.ident is None or not thread.is_alive():
            return 0.0
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        except OSError:  # it has ended just now
            return 0.0

    def stop(self) -> None:
        """Ends the loop after what is posted has run, waits for the thread, closes the engine's descriptors."""
        self.post(self._stop)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self.close()

    def close(self) -> None:
        """Closes the engine's own descriptors. Pipelines must be gone. Safe to call again."""
        if self._wake >= 0:
            self._waker.close()
            os.close(self._wake)
            self._wake = -1
            self._epoll.close()
            self.rings.close()
            os.close(self._null)
            if self._exchange is not None:
                self._exchange.close()

    # -- on the engine's thread

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def register(self, target: Target) -> int:
        """A token for a C struct whose events go to `target`."""
        token = next(self._tokens)
        self._targets[token] = target
        return token

    def forget_token(self, token: int) -> None:
        """Events of that token are ignored from now on."""
        self._targets.pop(token, None)

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Runs `action` once, `seconds` from now."""
        if len(self._timers) >= self._most_timers:
            self._forget_cancelled()
        timer = Timer(time.monotonic() + seconds, action)
        heapq.heappush(self._timers, (timer.due, next(self._tokens), timer))
        return timer

    def _forget_cancelled(self) -> None:
        """A limit of hours leaves a timer behind with each connection that was there for a moment."""
        self._timers = [entry for entry in self._timers if entry[2].action is not None]
        heapq.heapify(self._timers)
        self._most_timers = max(TIMERS, 2 * len(self._timers))

    def watch(self, fd: int, mask: int, action: Callable[[int], None]) -> Watch:
        """Calls `action(mask)` whenever epoll says that `fd` is ready. Raises KernelError if epoll refuses."""
        return Watch(self, fd, mask, action)

    def work(self, blocking: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> None:
        """Runs `blocking` on a thread of its own, then `then(result, error)` here."""

        def run() -> None:
            try:
                result, failed = blocking(), None
            except BaseException as error:  # handed to `then`, whatever it is
                result, failed = None, error
            self.post(lambda: then(result, failed))

        try:
            threading.Thread(target=run, name=f"{self.name}-work", daemon=True).start()
        except RuntimeError as error:  # no thread is to be had
            refused = OSError(errno.EAGAIN, str(error))
            self.post(lambda: then(None, refused))

    def exchange(self) -> Exchange:
        """What this engine's duplex sessions share; made when the first asks for it."""
        if self._exchange is None:
            made = self._exchange = Exchange()
            made.c.token = self.register(lambda _what, _error, _mask: made.add_pipe())
            self.c.exchange = made.c
        return self._exchange

    def add_end(self, end: core.Struct, mask: int) -> int:
        """Registers a pipeline's end, edge-triggered: 0 or the errno (EPERM: epoll refuses such a file)."""
        return -int(core.lib.relay_watch(self.c, end, mask))

    def drop_end(self, end: core.Struct) -> None:
        """Unregisters a pipeline's end. Call it before its descriptor is closed."""
        if end.fd >= 0:
            core.lib.relay_unwatch(self.c, end)

    def ready(self, pipeline: core.Struct) -> None:
        """The pipeline is pumped in this round, whatever epoll says."""
        core.lib.relay_ready(self.c, pipeline)

    def forget(self, pipeline: core.Struct) -> None:
        """The pipeline is on no list of the engine any more and may be freed."""
        core.lib.relay_forget(self.c, pipeline)

    def run(self) -> None:
        """The loop itself, on the calling thread, until `stop`."""
        while not self._stopping:
            self.turn(self._until_due())

    def turn(self, timeout: float = -1.0) -> None:
        """Waits up to `timeout` seconds (-1: as long as it takes), then does all there is to do, once."""
        nanoseconds = -1 if timeout < 0 else int(timeout * 1e9)
        count = core.lib.relay_poll(self.c, nanoseconds, self._events, EVENTS)
        if count < 0:
            raise KernelError(
                f"epoll_wait: {os.strerror(-count)}", hint="the engine's descriptors were closed under it"
            )
        for token, what, error, mask in core.EVENT.iter_unpack(self._told[: count * core.EVENT.size]):
            target = self._targets.get(token)
            if target is not None:
                try:
                    target(what, error, mask)
                except Exception as failed:
                    self._complain(failed)
        self._run_due()
        while self._posted:
            self._call(self._posted.popleft())

    def _until_due(self) -> float:
        while self._timers and self._timers[0][2].action is None:
            heapq.heappop(self._timers)
        if self._posted:
            return 0.0
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1.0

    def _run_due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.action is not None:
                self._call(timer.action)

    def _call(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        log.exception("%s", RelayBug(f"{type(error).__name__} in a callback of {self.name}: {error}"))

    def _woken(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _stop(self) -> None:
        self._stopping = True
