"""Checks of upstreams: every now and then a connection of relay's own, and a question where one is configured.

What this means here: checks live on the route's home engine, where nothing they do blocks, and use no session's
connection. The time between two is jittered, so that several relays, and the upstreams of one, do not keep step. A
check for which this machine had no descriptor or no port says nothing about the upstream.
"""

from __future__ import annotations

import errno
import random
import select
import socket
from collections.abc import Callable

from relay.duplex.upstream import BLAMELESS, Upstream, in_words
from relay.duplex.upstreams import Upstreams
from relay.endpoints.awaited import Awaited
from relay.endpoints.connecting import Connecting
from relay.endpoints.proxy_header import own
from relay.endpoints.settings import SinkSettings
from relay.engine import Engine, Timer
from relay.errors import KernelError

JITTER = 0.2  # of the time between two checks
ANSWER = 64 << 10  # bytes of an answer that are looked at


class Probe:
    """One check under way. `done(why)` is called once: empty when it went well, None when it says nothing. `close` ends
    it silently."""

    def __init__(
        self, engine: Engine, upstream: Upstream, sink: SinkSettings, done: Callable[[str | None], None]
    ) -> None:
        health = sink.health
        assert health is not None
        self._engine = engine
        self._health = health
        # an upstream that wants to be told of peers is told that there is none
        header = own(sink.proxy_protocol) if sink.proxy_protocol is not None else b""
        self._says = header + (health.send or "").encode()
        self._done: Callable[[str | None], None] | None = done
        self._awaited = Awaited()
        self._got = bytearray()
        self._expected = (health.expect or "").encode()
        self._awaited.timer = engine.later(health.timeout, self._too_late)
        self._connecting: Connecting | None = None
        connecting = Connecting(engine, [upstream.place], self._connected, timeout=health.timeout)
        if self._done is not None and self._awaited.sock is None:
            self._connecting = connecting

    def _connected(self, sock: socket.socket | None, code: int) -> None:
        self._connecting = None
        if self._done is None:  # too late
            if sock is not None:
                sock.close()
            return
        if sock is None:
            self._finish(None if code in BLAMELESS else in_words(code))
            return
        self._awaited.sock = sock
        try:
            if self._says:
                sock.send(self._says)
            if not self._expected:
                self._finish("")
                return
            self._awaited.watch = self._engine.watch(sock.fileno(), select.EPOLLIN, self._readable)
        except OSError as error:
            self._finish(in_words(error.errno or errno.EIO))
        except KernelError:
            self._finish(None)

    def _readable(self, _mask: int) -> None:
        assert self._awaited.sock is not None
        try:
            piece = self._awaited.sock.recv(ANSWER)
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(in_words(error.errno or errno.EIO))
            return
        self._got += piece
        if self._expected in self._got:
            self._finish("")
        elif not piece:
            self._finish(f"it closed the connection; {self._heard()}")
        elif len(self._got) > ANSWER:
            self._finish(self._heard())

    def _heard(self) -> str:
        said = bytes(self._got[:60]).decode(errors="replace")
        heard = f"it said {said!r}" if said else "it said nothing"
        return f"{heard}, {self._health.expect!r} was expected"

    def _too_late(self) -> None:
        said = f"; {self._heard()}" if self._awaited.sock is not None else ""
        self._finish(f"no answer within {self._health.timeout:g} s{said}")

    def _finish(self, why: str | None) -> None:
        done, self._done = self._done, None
        self.close()
        if done is not None:
            done(why)

    def close(self) -> None:
        """Ends it, without a verdict if there was none. Safe to call again."""
        self._done = None
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        self._awaited.close()


class Checks:
    """Checks every upstream of a route to `sink`, which says how, until `stop`. All on `engine`, the route's home."""

    def __init__(
        self, engine: Engine, upstreams: Upstreams, sink: SinkSettings, chance: random.Random | None = None
    ) -> None:
        assert sink.health is not None
        self._engine = engine
        self._upstreams = upstreams
        self._sink = sink
        self._health = sink.health
        self._chance = chance or random.Random()
        self._timers: dict[Upstream, Timer] = {}
        self._probes: dict[Upstream, Probe] = {}
        self._tending: Timer | None = None
        self._stopped = False

    def start(self) -> None:
        """Looks names up, and checks from now on."""
        self._upstreams.on_change = self._sync
        self._tend()

    def _tend(self) -> None:
        """Names age while no session asks for them."""
        if not self._stopped:
            self._tending = self._engine.later(self._health.every, self._tend)
            self._upstreams.ready(self._engine, self._sync)

    def _sync(self) -> None:
        """The upstreams may be others than before."""
        if self._stopped:
            return
        listed = set(self._upstreams)
        for one in [one for one in (*self._timers, *self._probes) if one not in listed]:
            self._drop(one)
        for one in listed - self._timers.keys() - self._probes.keys():
            self._wait(one, self._chance.uniform(0, min(self._health.every, 1.0) * JITTER))

    def _wait(self, one: Upstream, seconds: float) -> None:
        self._timers[one] = self._engine.later(seconds, lambda: self._check(one))

    def _check(self, one: Upstream) -> None:
        del self._timers[one]
        began = self._engine.now
        verdict: list[str | None] = []

        def done(why: str | None) -> None:
            verdict.append(why)
            self._probes.pop(one, None)
            if why is not None:
                self._upstreams.checked(one, why, began, self._health.fall, self._health.rise)
            self._wait(one, self._health.every * self._chance.uniform(1 - JITTER / 2, 1 + JITTER / 2))

        probe = Probe(self._engine, one, self._sink, done)
        if not verdict:
            self._probes[one] = probe

    def _drop(self, one: Upstream) -> None:
        if one in self._timers:
            self._timers.pop(one).cancel()
        if one in self._probes:
            self._probes.pop(one).close()

    def stop(self) -> None:
        """Checks no more. Safe to call again."""
        self._stopped = True
        if self._tending is not None:
            self._tending.cancel()
            self._tending = None
        for one in [*self._timers, *self._probes]:
            self._drop(one)
