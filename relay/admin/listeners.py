"""The admin sockets of a relay: a thread that accepts, and one for each client.

What this means for others: the data path's threads have no part in it. Clients are few (MOST), each has LONGEST
seconds to say what it wants, and as many to take the answer. When all places are taken the one that has kept its
request to itself the longest makes room for the next: who hangs harms nobody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from relay.endpoints.listening import Bound
from relay.errors import EndpointError
from relay.needs import CLIENTS

log = logging.getLogger("relay.admin")

MOST = CLIENTS  # at a time
LONGEST = 5.0  # seconds for a request to come, and for an answer to be taken
LEFT = 1 << 20  # bytes that are read of somebody who goes on after the answer
AGAIN = 0.2  # seconds until accepting is tried again when no descriptor is left
PATIENCE = 1.0  # seconds for the threads to end


@dataclass(eq=False)
class Client:
    """One connection. `local` came over a unix socket; `until` is when it is cut off, 0 while relay is at work for it.

    `asking`: its request is not complete.
    """

    sock: socket.socket
    local: bool
    until: float = field(default_factory=lambda: time.monotonic() + LONGEST)
    asking: bool = True

    def asked(self) -> None:
        """Its request is here: from now on relay is at work."""
        self.asking, self.until = False, 0.0

    def answered(self) -> None:
        """It is given its answer from now on."""
        self.until = time.monotonic() + LONGEST

    def leave(self) -> None:
        """Its answer is given: what it still sends is read and thrown away, or closing would take the answer back."""
        self.sock.shutdown(socket.SHUT_WR)
        left = LEFT
        while left > 0 and (piece := self.sock.recv(65536)):
            left -= len(piece)

    def cut(self) -> None:
        """Whoever waits for it sees the end. From any thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Listeners:
    """Owns listening sockets, their thread and their clients, from `start` to `close`.

    `talk(client)` runs on the client's own thread; its socket is closed when that returns. `local` are the sockets
    that only this machine's users reach by a path. `anew(bound)` listens once more where a unix socket did; it raises
    EndpointError.
    """

    def __init__(
        self,
        bounds: Sequence[Bound],
        talk: Callable[[Client], None],
        anew: Callable[[Bound], Sequence[Bound]] = lambda _bound: (),
    ) -> None:
        self._bounds = list(bounds)
        self._talk = talk
        self._anew = anew
        self._to_rebind = False
        self._lock = threading.Lock()
        self._clients: dict[Client, threading.Thread] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        return [bound.address for bound in self._bounds]

    def start(self) -> None:
        """Accepts from now on."""
        self._thread.start()

    def rebind(self) -> None:
        """A unix socket whose file was removed or replaced is bound anew, so that people find it again. From any
        thread, which does not wait for it."""
        self._to_rebind = True
        self._nudge()

    def close(self) -> None:
        """Closes the sockets, cuts the clients off and waits a moment for their threads. Safe to call again."""
        if self._closing:
            return
        self._closing = True
        self._nudge()
        if self._thread.ident is not None:
            self._thread.join()
        for bound in self._bounds:
            bound.close()
        with self._lock:
            clients = dict(self._clients)
        until = time.monotonic() + PATIENCE
        for client, thread in clients.items():
            if client.asking:
                client.cut()
            thread.join(max(0.0, until - time.monotonic()))
        os.close(self._wake)

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    # -- on the thread that accepts

    def _run(self) -> None:
        numbers = {bound.sock.fileno(): bound for bound in self._bounds}
        paused_until = 0.0
        while not self._closing:
            if self._to_rebind:
                self._to_rebind = False
                self._rebind()
                numbers = {bound.sock.fileno(): bound for bound in self._bounds}
            now = time.monotonic()
            left = self._cut_the_late(now)
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if self._has_room() and now >= paused_until:
                for number in numbers:
                    poll.register(number, select.POLLIN)
            elif now < paused_until:
                left = min(left, paused_until - now)
            for number, _event in poll.poll(left * 1000):
                if number == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                elif number in numbers and not self._accept(numbers[number]):
                    paused_until = time.monotonic() + AGAIN

    def _rebind(self) -> None:
        for old in [bound for bound in self._bounds if not bound.reachable]:
            try:
                fresh = self._anew(old)
            except EndpointError as error:  # somebody else listens there by now: it is tried again next time
                log.error("admin: %s", error, extra={"event": "error"})
                continue
            self._bounds.remove(old)
            self._bounds += fresh
            old.close()
            for bound in fresh:
                log.info(
                    "admin: listening on %s",
                    bound.address,
                    extra={"event": "admin", "address": bound.address},
                )

    def _cut_the_late(self, now: float) -> float:
        """Cuts off who is over its time; seconds until the next may be."""
        soonest = 3600.0
        with self._lock:
            for client in self._clients:
                if not client.until:
                    soonest = min(soonest, 1.0)  # its time begins when its answer does
                elif client.until <= now:
                    client.cut()
                    client.until = now + LONGEST
                else:
                    soonest = min(soonest, client.until - now)
        return soonest

    def _has_room(self) -> bool:
        """Whether one more can be talked to: if nobody asks for nothing, places that are all at work are waited for."""
        with self._lock:
            return len(self._clients) < MOST or any(client.asking for client in self._clients)

    def _make_room(self) -> None:
        with self._lock:
            if len(self._clients) >= MOST:
                late = [client for client in self._clients if client.asking]
                if late:
                    oldest = min(late, key=lambda client: client.until)
                    oldest.asking = False
                    oldest.cut()

    def _accept(self, bound: Bound) -> bool:
        """One client; False when no descriptor or no thread is left."""
        try:
            sock, _peer = bound.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return True
        except OSError:
            return False
        self._make_room()
        client = Client(sock, bound.key[0] == "unix")
        thread = threading.Thread(target=self._serve, args=(client,), name="admin-client", daemon=True)
        with self._lock:
            self._clients[client] = thread
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                del self._clients[client]
            sock.close()
            return False
        return True

    def _serve(self, client: Client) -> None:
        try:
            self._talk(client)
            client.leave()
        except OSError:
            pass  # it went away, or was cut off
        except Exception:
            log.exception("answering a client of the admin socket")
        finally:
            with self._lock:
                self._clients.pop(client, None)
            client.sock.close()
            self._nudge()
