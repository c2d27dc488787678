"""Log lines on their way to stderr: a bounded queue, and a thread that writes.

Facts (man 7 pipe, 2 write): a write to a pipe that nobody reads blocks as soon as the pipe is full, and so does one
to a stopped terminal. O_NONBLOCK is no way out: stderr is shared with whoever started the program.

A thread that is woken for each line costs more than the line.

What this means here: whoever logs never writes. Lines that come close together are written together. Lines that do
not fit into the queue are counted, and the count is logged as soon as there is room. At the end of the program the
queue has a second to empty itself.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Any

MOST = 1 << 20  # letters of lines that may wait
PATIENCE = 1.0  # seconds to get rid of them at the end of the program
TOGETHER = 16 << 10  # letters of lines in one write, or one line that is longer
CLOSE = 0.005  # seconds within which lines are close together


class LineWriter:
    """Writes lines to the descriptor `fd`, which it borrows, from a daemon thread; `put` never blocks.

    `notice(count)` makes the line that says how many were lost.
    """

    def __init__(self, fd: int, notice: Callable[[int], str], most: int = MOST) -> None:
        self._fd = fd
        self._notice = notice
        self._most = most
        self._lines: deque[str] = deque()
        self._waiting = 0  # letters in the queue, the ends of lines among them
        self._lost = 0
        self._writing = False
        self._idle = False  # nobody has to be woken
        # reentrant: a signal's handler may log meanwhile; taken through its condition it costs thrice as much
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        threading.Thread(target=self._run, name="log-lines", daemon=True).start()

    def put(self, line: str) -> None:
        """Queues a line; one that does not fit is counted instead."""
        with self._lock:
            if self._waiting + len(line) >= self._most:
                self._lost += 1
                return
            if self._lost:
                self._confess()
            self._add(line)

    def flush(self, patience: float = PATIENCE) -> bool:
        """Waits until everything is written; False when that takes longer than `patience` seconds."""
        deadline = time.monotonic() + patience
        with self._changed:
            while self._lines or self._lost or self._writing:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._waiting += len(line) + 1
        if self._idle:
            self._idle = False
            self._changed.notify_all()

    def _confess(self) -> None:
        if self._lost:
            count, self._lost = self._lost, 0
            self._add(self._notice(count))

    def _run(self) -> None:
        last = 0.0
        while True:
            with self._changed:
                self._writing = False
                if not self._lines:
                    self._confess()
                while not self._lines:
                    self._idle = True
                    self._changed.notify_all()
                    self._changed.wait()
                self._idle = False
                self._writing = True
            if time.monotonic() - last < CLOSE and self._waiting < TOGETHER:
                time.sleep(CLOSE)
            with self._changed:
                text = "\n".join([*self._taken(), ""])
                self._waiting -= len(text)
            self._write(text.encode(errors="backslashreplace"))
            last = time.monotonic()

    def _taken(self) -> Iterator[str]:
        """Lines that are written together, taken out of the queue."""
        size = 0
        while self._lines and size < TOGETHER:
            size += len(self._lines[0]) + 1
            yield self._lines.popleft()

    def _write(self, raw: bytes) -> None:
        view = memoryview(raw)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # somebody else made it nonblocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:
                return  # nobody will ever read it: the line is gone, and relay goes on


class Lines(logging.StreamHandler[IO[str]]):
    """A handler whose lines are written from a thread of their own, as long as they go to the stream it was made for.

    A stream put in its place (that of a progress bar) is written to at once.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self._own = stream
        self._writer = LineWriter(stream.fileno(), self._notice)

    def _notice(self, count: int) -> str:
        said = logging.makeLogRecord(
            {
                "name": "relay.log",
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": "%d log lines were lost: nobody read them in time",
                "args": (count,),
                "event": "lines_lost",
                "count": count,
            }
        )
        return self.format(said)

    def put(self, line: str) -> bool:
        """A line that is formatted already; False when it goes somewhere else now, and `emit` is to be used."""
        if self.stream is not self._own:
            return False
        self._writer.put(line)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Formats the record here and now; its line follows when its turn comes."""
        if self.stream is not self._own:
            super().emit(record)
            return
        try:
            self._writer.put(self.format(record))
        except Exception as error:  # whatever a formatter met: the line says so, and relay goes on
            self._writer.put(f"a log line could not be made ({error!r}): {record.msg!r}")

    def close(self) -> None:
        """At the end of the program (logging.shutdown): lets the queue empty itself, for a second at most."""
        self._writer.flush()
        super().close()


def handler_for(stream: Any) -> logging.Handler:
    """Lines from a thread where `stream` has a descriptor; a plain handler where not; none where it is closed."""
    if stream is None:
        return logging.NullHandler()
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return logging.StreamHandler(stream)
    return Lines(stream)
