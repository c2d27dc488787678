"""The checksums of files that are being sent, each computed once however many addresses get the file.

One thread reads the files a second time, in the order in which they were begun and beside the sending: out of
the page cache, where the sending has them anyway.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from relay.endpoints.digest import digest_of_file
from relay.endpoints.file import Identity
from relay.sending.order import Order


class Summed(Protocol):
    """A file whose checksum is wanted; `seen` says whether a state of it is the one that is sent."""

    path: str
    shown: str

    @property
    def once(self) -> bool:
        """Whether it can be read only once: then its checksum is not found here."""

    def seen(self, identity: Identity) -> bool:
        """Whether this is the state that everybody else saw."""


class Checksums:
    """Owns the thread. `on_found(file)` is called on it for each file; `found` has the digest then."""

    def __init__(self, order: Order, on_found: Callable[[Summed], None]) -> None:
        self._order = order
        self._on_found = on_found
        self._todo: queue.SimpleQueue[Summed | None] = queue.SimpleQueue()
        self._begun: set[Summed] = set()
        self._found: dict[Summed, str] = {}
        self._why_not: dict[Summed, str] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def begin(self, document: Summed) -> None:
        """The file is being sent from now on. From any thread, any number of times; the first one counts."""
        if self._order.algorithm is None or document.once:
            return
        with self._lock:
            if document in self._begun or self._stopped:
                return
            self._begun.add(document)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
                self._thread.start()
        self._todo.put(document)

    def found(self, document: Summed) -> str | None:
        """The digest in hexadecimal, empty if it could not be computed, None as long as it is not there."""
        return self._found.get(document)

    def why_not(self, document: Summed) -> str:
        """Why the digest could not be computed."""
        return self._why_not.get(document, "the stream did not pass whole")

    def stop(self) -> None:
        """Gives up what is not computed yet and waits for the thread. Safe to call again."""
        with self._lock:
            self._stopped = True
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        order = self._order
        assert order.algorithm is not None
        while (document := self._todo.get()) is not None and not self._stopped:
            digest = ""
            try:
                digest, state = digest_of_file(
                    document.path, order.algorithm, offset=order.offset, length=order.length,
                    stopped=lambda: self._stopped,
                )  # fmt: skip
                if not document.seen(state):
                    digest, self._why_not[document] = "", "the file changed while it was sent"
            except OSError as error:
                self._why_not[document] = f"reading {document.path}: {os.strerror(error.errno or 0)}"
            self._found[document] = digest
            self._on_found(document)
