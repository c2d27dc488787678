"""Memory shared by two ends in one process: what one gives, as the other one has it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from descriptors import Descriptors

from relay.sharing.shared import Shared
from relay.sharing.sink import ShareSink
from relay.sharing.source import ShareSource


def through(fds: Descriptors, shared: Shared) -> Shared:
    """What is received of `shared` over a socket pair."""
    near, far = fds.unix_pair()
    shared.send(near)
    got = Shared.receive(far)
    assert got is not None
    return got


@contextlib.contextmanager
def stream(**options: Any) -> Iterator[tuple[ShareSink, ShareSource]]:
    """A sink and its source in one process; both are closed at the end."""
    near, far = socket.socketpair()
    sink, source = ShareSink(near, **options), ShareSource(far)
    try:
        yield sink, source
    finally:
        sink.close()
        source.close()


def take(source: ShareSource) -> Any:
    """The next block; fails where there should be one and is none."""
    block = source.receive(timeout=10)
    assert block is not None
    return block
