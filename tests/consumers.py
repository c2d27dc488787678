"""Whoever takes what a `shared` sink hands out."""

from __future__ import annotations

import contextlib
import socket
import threading

from relay.sharing.source import ShareSource


class Consumer:
    """Listens at `path` and takes one stream; `most` blocks are kept at once, `stop` bytes are enough."""

    def __init__(self, path: str, *, stop: int | None = None) -> None:
        self.got = bytearray()
        self.ended = ""
        self.connected = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._listener.settimeout(20)
        self._stop = stop
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        with contextlib.suppress(TimeoutError):
            connection, _ = self._listener.accept()
            self.connected = True
            try:
                with ShareSource(connection) as source:
                    for block in source:
                        with block.view() as view:
                            self.got += view
                        if self._stop is not None and len(self.got) >= self._stop:
                            block.release()
                            self.ended = "left"
                            return
                self.ended = "end"
            except ConnectionResetError:
                self.ended = "broken"

    def wait(self) -> bytes:
        """What was received when the stream was over."""
        self._thread.join(20)
        self._listener.close()
        return bytes(self.got)
