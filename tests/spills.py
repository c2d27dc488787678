"""A route whose tee has a log, a stream into it, and what the record says of the tee's sink."""

from __future__ import annotations

import socket
import threading
from typing import Any

from flapping import Receiver
from peers import send_all
from relays import Relay

from relay.journal.record import SinkRecord

MIB = 1 << 20


def tee(receiver: Receiver, slow: dict[str, Any], sink: str, **more: Any) -> dict[str, Any]:
    """A route whose tee goes to `receiver`, and whose chain to `sink`."""
    branch = {"to": {"connect": receiver.address}, "on_slow": slow, **more}
    return {"source": {"listen": "tcp://127.0.0.1:0"}, "stages": [{"tee": branch}], "sink": sink}


def branch_record(relay: Relay) -> SinkRecord:
    """What the session's record says of the tee's sink."""
    record = relay.wait()
    assert record is not None
    return record.sinks[0]


def sending(source: socket.socket, data: bytes) -> Any:
    """A thread that sends all of `data` and ends the stream."""

    def send() -> None:
        send_all(source, data)
        source.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread
