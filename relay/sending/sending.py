"""`relay send`: files or stdin, pushed to one address or many.

A file goes to each address at that address's own pace: a lane an address. What can be read only once (stdin,
a fifo) is teed: one lane for all addresses. What was asked for is carried out in order: a run of files, a
stream, the next run of files.

The main thread waits for news: a stream is over, a checksum is there, a signal came. Everything else happens
on the engines of the lanes, and what they tell is news (relay.news).
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from relay.endpoints.base import hint
from relay.errors import SinkError
from relay.journal.record import SessionRecord, SinkRecord
from relay.news import News
from relay.sending.checksums import Checksums, Summed
from relay.sending.lane import Document, Lane, Receiver
from relay.sending.order import Order, order
from relay.sending.progress import Progress, Standing, make_progress

log = logging.getLogger("relay.send")

ENDING = 1.5  # seconds that lanes have to end after a signal


class Sending:
    """One order carried out. `run` returns the exit code; it is called once, on the main thread if `signals` are its.

    `records` are those of the streams that are over, in the order of their ends.
    """

    def __init__(self, order: Order, progress: Progress, *, signals: bool = True) -> None:
        self.records: list[SessionRecord] = []
        self._order = order
        self._progress = progress
        self._signals = signals
        self._news: News[Callable[[], None]] = News()
        self._documents = [Document(path, order) for path in order.files]
        self._receivers = [Receiver(settings) for settings in order.to]
        self._lanes: list[Lane] = []
        self._running = 0
        self._before = 0
        self._signalled = 0
        self._deadline = 0.0
        self._checksums = Checksums(order, lambda summed: self._news.tell(lambda: self._tell_summed(summed)))
        self._unsummed: dict[Summed, list[tuple[SessionRecord, SinkRecord]]] = {}
        self._delivered = self._failed = 0
        self._source_failed = self._mismatch = False
        sizes = [document.expected for document in self._documents]
        self._whole = None if None in sizes else sum(size or 0 for size in sizes)
        self._shown_at = 0.0

    def run(self) -> int:
        """Sends everything, prints a line for each stream and address; see the exit codes of `relay send`."""
        self._news.listen(signals=self._signals)
        previous = self._catch_signals() if self._signals else {}
        try:
            first = True
            for documents in self._runs():
                if self._signalled:
                    break
                self._start(documents)
                if first:
                    self._progress.start()  # after the start: loading what draws bars takes a while
                    first = False
                    self._show()
                self._wait(lambda: self._running > 0)
                self._stop_lanes()
                self._before += len(documents)
            self._wait(lambda: bool(self._unsummed) and not self._signalled)
        except (
            BaseException
        ):  # KeyboardInterrupt, or whoever is told of the progress: nothing is left running
            self._progress = Progress(sys.stderr)
            self._end(signal.SIGINT, "the program that sends failed")
            self._wait(lambda: self._running > 0)
            self._stop_lanes()
            raise
        finally:
            self._checksums.stop()
            self._progress.stop()
            self._news.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._exit_code()

    def _runs(self) -> list[list[Document]]:
        """Files that follow each other run side by side on all lanes; what is teed runs alone."""
        runs: list[list[Document]] = []
        for document in self._documents:
            if document.once or not runs or runs[-1][0].once:
                runs.append([])
            runs[-1].append(document)
        return runs

    def _start(self, documents: list[Document]) -> None:
        groups = [self._receivers] if documents[0].once else [[receiver] for receiver in self._receivers]
        for number, group in enumerate(groups):
            try:
                lane = Lane(
                    f"send-{number}", self._order, documents, group,
                    self._checksums.begin,
                    lambda document, record: self._news.tell(lambda: self._tell_over(document, record)),
                    lambda _lane: self._news.tell(self._lane_done),
                )  # fmt: skip
            except OSError as error:
                self._stop_lanes()
                code = error.errno or 0
                raise SinkError(f"{len(groups)} addresses", "making threads for", code, hint(code)) from error
            self._lanes.append(lane)
        self._running = len(self._lanes)
        for lane in self._lanes:
            lane.start()

    def _stop_lanes(self) -> None:
        if not self._running:
            for lane in self._lanes:
                lane.close()
        self._lanes.clear()  # one that did not end in time is left to end with the process

    def _wait(self, on: Callable[[], bool]) -> None:
        """Takes news, and shows progress, while `on` says so."""
        while on():
            due = self._progress.interval
            left = None if due is None else max(0.0, self._shown_at + due - time.monotonic())
            if self._signalled:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    return
            news = self._news.wait(left)
            if news is None:
                self._show()
            else:
                news()
        self._show(last=True)

    def _show(self, *, last: bool = False) -> None:
        if not self._lanes or self._progress.interval is None:
            return
        standings: list[Standing] = []
        for lane in self._lanes:
            standings += lane.standings(self._whole, len(self._documents), self._before)
        self._progress.show(standings, last=last)
        self._shown_at = time.monotonic()

    # -- news

    def _lane_done(self) -> None:
        self._running -= 1

    def _tell_over(self, document: Document, record: SessionRecord) -> None:
        self.records.append(record)
        if record.source_failed:
            self._source_failed = True
            if not record.method and not document.complained:
                document.complained = True
                log.error("%s", record.reason)
        for sink in record.sinks:
            if sink.result == "failed":
                self._failed += 1
            else:
                self._delivered += 1
        digest = next((str(stage["digest"]) for stage in record.stages if "digest" in stage), "")
        for sink in record.sinks:
            if sink.result == "failed" or not self._order.algorithm or self._signalled:
                self._tell(document, record, sink, "")
            elif document.once:
                self._tell(document, record, sink, digest)
            elif (found := self._checksums.found(document)) is not None:
                self._tell(document, record, sink, found)
            else:
                self._unsummed.setdefault(document, []).append((record, sink))

    def _tell_summed(self, document: Summed) -> None:
        found = self._checksums.found(document) or ""
        for record, sink in self._unsummed.pop(document, ()):
            self._tell(document, record, sink, found)

    def _tell(self, document: Summed, record: SessionRecord, sink: SinkRecord, digest: str) -> None:
        """A line for one stream at one address, with its checksum where there is one."""
        order, name = self._order, document.shown
        method, why = record.crossing(sink)
        if order.method == method:
            why = ""
        elif order.method != "auto":
            why = why or record.why_method
        checksum = f"{order.algorithm}={digest}" if digest else ""
        text = checksum
        fields = {
            **sink.as_dict(), "event": "result", "file": name, "method": method,
            "bytes_per_second": round(sink.bytes / max(sink.seconds, 1e-9)),
        }  # fmt: skip
        if why:
            fields["why_method"] = why
        if checksum:
            fields["checksum"] = checksum
        if digest and order.digest and digest != order.digest:
            fields["expected"] = f"{order.algorithm}={order.digest}"
            text += f" and not {order.digest} as given"
            if not self._mismatch:
                log.error("%s: %s is %s, but %s was given", name, order.algorithm, digest, order.digest)
            self._mismatch = True
        elif order.algorithm and not digest and sink.result == "delivered" and not self._signalled:
            text = f"no {order.algorithm}: {self._checksums.why_not(document)}"
            self._source_failed = True
        self._progress.result(f"{name} -> {sink.as_line(method, why, text)}", fields)

    # -- ending

    def cancel(self) -> None:
        """From any thread: as SIGINT would end it."""
        self._news.tell(lambda: self._end(signal.SIGINT, "cancelled"))

    def _catch_signals(self) -> dict[int, Any]:
        """SIGPIPE is ignored: splice has no MSG_NOSIGNAL. The others are news."""

        def caught(number: int, _frame: FrameType | None) -> None:
            self._news.tell(lambda: self._end(number))

        found: dict[int, Any] = {}
        for ends in (signal.SIGINT, signal.SIGTERM):
            found[ends] = signal.signal(ends, caught)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            found[ignored] = signal.signal(ignored, signal.SIG_IGN)
        return found

    def _end(self, number: int, why: str = "") -> None:
        if self._signalled:
            return
        self._signalled = number
        self._deadline = time.monotonic() + ENDING
        for lane in self._lanes:
            lane.abort(why or f"interrupted by {signal.Signals(number).name}")
        for document in list(self._unsummed):
            self._tell_summed(document)  # delivered, and nobody waits for the checksum any more

    def _exit_code(self) -> int:
        """128 and the signal; 4 a source failed, 5 every sink did, 6 another checksum, 1 some sinks."""
        if self._signalled:
            return 128 + self._signalled
        if self._source_failed:
            return 4
        if self._failed and not self._delivered:
            return 5
        if self._mismatch:
            return 6
        return 1 if self._failed else 0


def send(
    files: Sequence[str] = (),
    to: Sequence[str] = (),
    *,
    method: str = "auto",
    rate: str | int | None = None,
    offset: str | int = 0,
    length: str | int | None = None,
    checksum: str = "",
    wait: str | float = 0.0,
    on_slow: str = "block",
    progress: str = "auto",
) -> int:
    """Sends `files` (`-` or none: stdin) to every address in `to`; returns the exit code of `relay send`.

    Amounts are numbers (bytes, bytes a second, seconds) or text with units. UsageError says what cannot be.
    Call it on the main thread: it handles SIGINT and SIGTERM.
    """
    wanted = order(
        files, to, method=method, rate=rate, offset=offset, length=length,
        checksum=checksum, wait=wait, on_slow=on_slow,
    )  # fmt: skip
    taken = any(sink.address.scheme == "stdio" or sink.address.number == 1 for sink in wanted.to)
    return Sending(wanted, make_progress(progress, sys.stderr if taken else sys.stdout)).run()
