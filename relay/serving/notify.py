"""Words to the service manager that started relay: sd_notify, as systemd reads it.

Facts (man 3 sd_notify, 5 systemd.service): NOTIFY_SOCKET names a unix datagram socket, a path or, behind "@", an
abstract name. A datagram holds lines KEY=value. RELOADING=1 needs the MONOTONIC_USEC of its moment; READY=1 ends it.
WATCHDOG_USEC is the longest time between two WATCHDOG=1, for the process WATCHDOG_PID.

What this means here: the socket is connected once, when relay starts, before it gives up any right. A word that the
manager does not take is gone, and relay goes on.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping

log = logging.getLogger("relay.serve")

SPARE = 5  # seconds that ending may take beyond the drain


class Notifier:
    """Owns a datagram socket to the manager, if there is one; without, every word is for nobody.

    `watchdog`: seconds between two signs of life, None where none are wanted.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        place = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self._sock: socket.socket | None = None
        self.watchdog: float | None = None
        if not place.startswith(("/", "@")):
            return
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._sock.connect("\0" + place[1:] if place.startswith("@") else place)
        except OSError as error:
            log.warning("NOTIFY_SOCKET=%s: %s; nobody is told that relay is ready", place, error.strerror)
            self.close()
            return
        if usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid())):
            self.watchdog = int(usec) / 1e6

    def tell(self, **words: object) -> None:
        """One datagram with these lines; a line break in a value becomes a space."""
        if self._sock is None:
            return
        lines = [f"{key}={' '.join(str(value).split())}" for key, value in words.items()]
        try:
            self._sock.send("\n".join(lines).encode(errors="replace"))
        except OSError as error:
            log.debug("the service manager was not told %s: %s", lines[0], error.strerror)

    def ready(self, status: str) -> None:
        """relay serves; again after `reloading`."""
        self.tell(READY=1, MAINPID=os.getpid(), STATUS=status)

    def reloading(self) -> None:
        """The configuration is being read again."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell(RELOADING=1, MONOTONIC_USEC=usec, STATUS="reloading")

    def stopping(self, status: str, seconds: float) -> None:
        """relay drains, which takes `seconds` at most."""
        self.tell(STOPPING=1, STATUS=status, EXTEND_TIMEOUT_USEC=int((seconds + SPARE) * 1e6))

    def alive(self) -> None:
        """A sign of life."""
        self.tell(WATCHDOG=1)

    def close(self) -> None:
        """Says nothing more. Safe to call again."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
