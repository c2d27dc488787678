"""What tests do with pipes of relay's."""

from __future__ import annotations

import os

import relay


def read(pipe: relay.Pipe, size: int) -> bytes:
    """Exactly `size` bytes out of a pipe that holds them, or will."""
    found = b""
    while len(found) < size:
        found += os.read(pipe.read_fd, size - len(found))
    return found
