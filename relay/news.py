"""News for the main thread: signals, and words from the engines' threads.

Facts (man 7 signal; CPython, Modules/signalmodule.c): a signal's Python handler runs between two bytecodes of the
main thread. One that arrives just before that thread goes to sleep on a lock is noted and wakes nobody: the handler
runs when the lock is given, which may be never. A byte written to the wake-up descriptor by the C handler is not
lost: whoever waits for that descriptor sees it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections import deque
from typing import Generic, TypeVar

Word = TypeVar("Word")


class News(Generic[Word]):
    """Owns a pipe and the process's signal wake-up descriptor, from `listen` to `close`. `tell` from any thread."""

    def __init__(self) -> None:
        self._words: deque[Word] = deque()
        self._read = self._write = -1
        self._previous = -1
        self._listening = False

    def listen(self, *, signals: bool = True) -> None:
        """On the main thread: signals wake `wait` from here on. On any, if they are not to."""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if signals:
            self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._listening = True

    def tell(self, word: Word) -> None:
        """Hands `word` to whoever waits. May be called from a signal handler."""
        self._words.append(word)
        with contextlib.suppress(OSError):  # full: it wakes all the same; closed: nobody waits any more
            os.write(self._write, b"\0")

    def wait(self, timeout: float | None = None) -> Word | None:
        """The next word; None when `timeout` seconds pass without one."""
        poll = select.poll()  # select(2) knows no descriptor above 1023
        poll.register(self._read, select.POLLIN)
        until = None if timeout is None else time.monotonic() + timeout
        while not self._words:
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not poll.poll(left):
                return None
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 4096)
        return self._words.popleft()

    def close(self) -> None:
        """Gives the wake-up descriptor back and closes the pipe. Safe to call again."""
        if self._listening:
            signal.set_wakeup_fd(self._previous)
            self._listening = False
        if self._read >= 0:
            write, self._write = self._write, -1
            read, self._read = self._read, -1
            os.close(write)
            os.close(read)
