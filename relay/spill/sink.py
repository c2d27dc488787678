"""A sink that reads through a log: it holds nobody until the log is full, and loses nothing when it is away.

    chain -> ferry -> log (append)            on the ferry's thread
                      log -> sink (sendfile)  a pipeline of its own, on an engine that may wait for the disk

What is promised: every byte, in order, at least once. A new connection goes on with the first byte that the peer's
kernel had not acknowledged, so at most one send queue comes twice. The pump notes the acknowledged position into a
page of the log after every send, so that this holds after SIGKILL as well.

A `buffer` in front of a sink with another policy is such a log too, in memory: only that what a broken connection
had not acknowledged is lost, as it is without a buffer.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from functools import partial

from relay.endpoints.base import Sink
from relay.endpoints.ferry import Ferry
from relay.engine import Engine
from relay.errors import EndpointError
from relay.kernel import core
from relay.kernel.pipe import LARGEST_CAPACITY, Pipe
from relay.log.log import FULL, Log
from relay.log.segment import SEGMENT_NAME
from relay.spill.ages import Ages
from relay.spill.delivery import Delivery
from relay.stages.base import StageSettings

log = logging.getLogger("relay.spill")

PIECE = 256 * 1024  # bytes appended at a time where the log cannot be spliced to
NO_SPLICE = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


class SpillSink(Sink):
    """Where a spill's outlet stands: appends to the log; owns the ferry, and the log until its end is delivered.

    `drain`: once the log was full it is filled again when the sink has had all, so that a sink which is slower than
    the stream is found to be slow. `copy`: bytes go into the log by hand. `rejoins`: it is connected again by
    itself, without what was under way.
    """

    def __init__(
        self,
        engine: Engine,
        address: str,
        kept: Log,
        deliver: Delivery,
        *,
        drain: bool = False,
        copy: bool = False,
        rejoins: bool = False,
    ) -> None:
        self._gone = 0  # bytes taken that nobody will get
        self.delivery = deliver
        super().__init__(engine, address)
        self.log = kept
        self._drain = drain
        self._by_hand = copy
        self._rejoins = rejoins
        self._rest = b""
        self._ferry: Ferry | None = None
        self._stop = False
        self._untried = (
            False  # the disk failed under the one before: it takes nothing before a trial went well
        )
        self._disk_fails = False
        self._cut = ""
        self._appending = False
        self._delivering = True
        self._ages = Ages()
        self._note_earlier()
        self._begin = kept.end  # where what is given to it begins
        self._counts = kept.end  # from where on what is delivered is its own
        self.c.kind = core.FERRY
        deliver.on_done = self._all_delivered
        deliver.on_fail = lambda error: engine.post(lambda: self._undeliverable(error))

    # -- what it knows

    @property
    def moved(self) -> int:
        """Bytes that the sink's peer has, and those that were lost on the way to it."""
        return max(0, self.delivery.position - self._counts) + self._gone

    @property
    def lost(self) -> int:
        """Bytes that the sink will not get."""
        return self.delivery.lost + self._gone

    @lost.setter
    def lost(self, _count: int) -> None:
        """Nobody else counts them."""

    @property
    def method(self) -> str:
        """How bytes get out of the log."""
        return self.delivery.method

    @property
    def result_path(self) -> str:
        """Where a file behind the log can be found."""
        return self.delivery.path

    @property
    def backlog(self) -> int:
        """Bytes that wait in the log or on their way into it, those of an earlier run included."""
        return max(0, self._begin + int(self.c.moved) - self.delivery.position - self._gone)

    @property
    def reconnects(self) -> int:
        """How often it was connected again."""
        return self.delivery.reconnects

    @property
    def connects(self) -> tuple[float, ...]:
        """How long each connect behind the log took."""
        return self.delivery.connects

    @property
    def twice(self) -> int:
        """Bytes sent again after a connection broke."""
        return self.delivery.twice

    @property
    def away(self) -> bool:
        """Whether a sink that is connected again by itself is not there, or the disk of its log does not work."""
        return self._disk_fails or (self._rejoins and not self.delivery.connected)

    @property
    def age(self) -> float:
        """Seconds for which the oldest byte in its log has waited; 0 when none waits."""
        return self._ages.oldest(self.delivery.position) if self.backlog else 0.0

    def _note_earlier(self) -> None:
        """What an earlier run left in the log has waited for as long at least as nobody wrote to its first segment."""
        if self.log.directory is None or not self.delivery.left:
            return
        with contextlib.suppress(OSError, ValueError):
            first = min(path for path in self.log.directory.iterdir() if SEGMENT_NAME.fullmatch(path.name))
            since = max(0.0, time.time() - first.stat().st_mtime)
            self._ages.note(self.delivery.position, time.monotonic() - since)

    def unread(self) -> int:
        """What its sink says."""
        return self.delivery.unread()

    def follows(self) -> None:
        """Another that broke left bytes in the log: they are delivered, and counted, from here on."""
        self._counts = self.delivery.position
        self._untried = self.log.directory is not None

    # -- its life

    def open(self) -> None:
        """Starts to append and to deliver."""
        self._ferry = Ferry(self.engine, self.c, LARGEST_CAPACITY, self._append, self._appended)
        self.log.on_append = lambda: self.delivery.engine.post(self.delivery.more)
        self._appending = True
        self._ferry.start()
        self.delivery.engine.post(self.delivery.start)
        self.opened()

    def _append(self) -> None:
        """On the ferry's thread: every load goes to the log's tail, as there is room for it.

        When it is stopped, what the thread has goes to a log on disk as far as it fits, and nowhere otherwise.
        """
        assert self._ferry is not None
        while True:
            pipe, load = self._ferry.wait()
            if not load or (self._untried and not self._disk_works()):
                return
            while load:
                if self._stop and self.log.directory is None:
                    return
                room = self.log.wait_for_room(lambda: self._stop, drain=self._drain)
                if not room:
                    return
                count = self._put(pipe, min(room, load))
                if not count and self._stop:
                    return
                load -= count
            self._ferry.give_back()

    def _disk_works(self) -> bool:
        """On the ferry's thread, which has bytes in its hands: waits until the disk takes some; False when stopped."""
        while not self.log.try_disk():
            if not self._disk_fails:
                log.warning("%s: the disk of its log %s still fails", self.address, self.log.directory)
                self._disk_fails = True
            if self._stop:
                return False
        self._untried = self._disk_fails = False
        return True

    def _put(self, pipe: Pipe, most: int) -> int:
        """Appends up to `most` bytes of `pipe`; 0 when the disk has no room. Raises OSError, the log as it was."""
        try:
            if not self._by_hand:
                try:
                    count = pipe.splice_to(self.log.tail(), most)
                except OSError as error:
                    if error.errno not in NO_SPLICE:
                        raise
                    self._by_hand = True
            if self._by_hand:
                self._rest = self._rest or os.read(pipe.read_fd, min(most, PIECE))
                count = os.write(self.log.tail(), self._rest[:most])
                self._rest = self._rest[count:]
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.log.refused()
            return 0
        self._ages.note(self.log.end)
        self.log.appended(count)
        return count

    def _appended(self, _result: object, failed: BaseException | None) -> None:
        self._appending = False
        if failed is not None and self.state not in ("failed", "finished"):
            code = getattr(failed, "errno", 0) or 0
            self._gone = self._never_delivered() if self.log.directory is None else self._not_appended()
            if self._gone:
                log.warning("%s: its log failed: %d bytes are lost", self.address, self._gone)
            self.fail(
                self.error("appending to the log of", code, reason="" if code else str(failed))
                if self.log.directory is None or not self.delivery.left
                else self._kept("appending to the log of", code, str(failed))
            )
        elif self.state == "finishing":
            self.log.end_stream()
            self.delivery.engine.post(self.delivery.whole)
        elif self.state == "cutting":
            self.delivery.engine.post(partial(self.delivery.whole, torn=True))
        elif self._stop and self.log.directory is not None and (missing := self._not_appended()):
            log.warning("the log of %s takes no more: the last %d bytes are lost", self.address, missing)
        self._let_go()

    def _not_appended(self) -> int:
        return self._begin + int(self.c.moved) - self.log.end

    def _never_delivered(self) -> int:
        return self._begin + int(self.c.moved) - self.delivery.position

    def _kept(self, operation: str, code: int, reason: str) -> EndpointError:
        """The error of one that ends with bytes in a log on disk: it names the log."""
        where = f"{reason}; {self.backlog} bytes wait in {self.log.directory}"
        return self.error(operation, code, reason=where)

    def finish(self) -> None:
        """The stream is complete: the log gets the rest, and its delivery goes on until the sink has it all."""
        if self.state == "open" and self._ferry is not None:
            self.state = "finishing"
            self._ferry.end()

    def cut(self, reason: str) -> None:
        """The stream broke off: what is in the log goes its way all the same; then the receiver is told."""
        if self.state != "open" or self._ferry is None:
            self.abort(reason)
            return
        self.state = "cutting"
        self._cut = reason
        self._ferry.end()

    def _undeliverable(self, error: EndpointError) -> None:
        if self.state in ("failed", "finished"):
            return
        if self.log.directory is None:
            self._gone = self._never_delivered()
        elif self.backlog:
            error = self._kept("delivering to", 0, error.reason)
        self.fail(error)

    def _all_delivered(self) -> None:
        """On the delivering engine, where a disk may be waited for: the log goes."""
        self.log.close()
        self.engine.post(self._ended)

    def _ended(self) -> None:
        if self.state == "cutting":
            super().abort(self._cut)
        else:
            self.finished()

    def abort(self, reason: str) -> None:
        """Ends it; what is in a log on disk stays there for the next start, what is in memory is lost."""
        if self.state in ("failed", "finished"):
            return
        if self.log.directory is None:
            self._gone = self._never_delivered()
        if self.backlog:
            self.fail(self._kept("ending", 0, reason))
        else:
            super().abort(reason)

    def change(self, old: object, new: object) -> None:
        """A stage behind the log has other settings from now on."""
        assert isinstance(old, StageSettings)
        assert isinstance(new, StageSettings)
        self.delivery.engine.post(partial(self.delivery.change, old, new))

    def reopen(self) -> None:
        """The file behind the log was moved away."""
        self.delivery.engine.post(self.delivery.reopen)

    def unwire(self) -> None:
        """The pipeline is going away; the thread may still be at work."""
        super().unwire()
        if self._ferry is not None:
            self._ferry.release()

    def close(self) -> None:
        """Stops appending and delivering; a log on disk that is not empty is kept."""
        if self.closed:
            return
        self.closed = True
        if self.state == "finished":
            return
        self.c.failed = 1  # the pump gives it nothing more, even while its place is held for another
        self._stop = True
        self.log.wake_writer()
        if self._ferry is not None:
            self._ferry.end()
        self.delivery.engine.post(self._stop_delivery)

    def _stop_delivery(self) -> None:
        self.delivery.stop("relay ends")
        self.engine.post(self._delivery_stopped)

    def _delivery_stopped(self) -> None:
        self._delivering = False
        self._let_go()

    def _let_go(self) -> None:
        """Neither thread touches the log any more: what is on disk stays there."""
        if self._stop and not self._appending and not self._delivering:
            left = self.delivery.left
            if left and self.log.directory is not None:
                log.warning("%d bytes for %s wait in %s", left, self.address, self.log.directory)
            self.log.close(keep=bool(left))


class Resumed:
    """What an earlier run left in a log, on its way to the sink; owns the log.

    `on_over(resumed)` is called once, on `home`, when all of it was delivered or it was stopped.
    """

    def __init__(
        self, home: Engine, kept: Log, delivery: Delivery, on_over: Callable[[Resumed], None]
    ) -> None:
        self._home = home
        self._log = kept
        self._delivery = delivery
        self._on_over = on_over
        self._over = False
        delivery.on_done = delivery.on_fail = self._ended

    @property
    def left(self) -> int:
        """Bytes still to be delivered."""
        return self._delivery.left

    def start(self) -> None:
        """Delivers; a stream whose end is not in the log is cut off where the log ends."""
        engine, torn = self._delivery.engine, self._log.ended_at != self._log.end
        engine.post(self._delivery.start)
        engine.post(partial(self._delivery.whole, torn=torn))

    def stop(self, reason: str) -> None:
        """Ends it where it stands; what is left stays in the log, which is named. From any thread."""
        self._delivery.engine.post(partial(self._stop, reason))

    def _stop(self, reason: str) -> None:
        if self._over:
            return
        self._delivery.stop(reason)
        if self.left:
            log.warning("%s: %d bytes wait in %s", reason, self.left, self._log.directory)
        self._ended()

    def _ended(self, error: EndpointError | None = None) -> None:
        if error is not None:
            log.error("%s; %d bytes wait in %s", error, self.left, self._log.directory)
        self._over = True
        self._log.close(keep=bool(self._delivery.left))
        self._home.post(lambda: self._on_over(self))
