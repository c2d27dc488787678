"""The source `shared`, and producers who mean harm, or break off."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from leaks import descriptors
from peers import assert_same, eventually
from producers import STREAM, Taking, serving

from relay.kernel import memfd
from relay.sharing import wire
from relay.sharing.content import Content
from relay.sharing.sink import ShareSink


def test_a_producer_that_breaks_off(tmp_path: Path) -> None:
    """A connection without an end is no whole stream: the source has failed, and the file stays unfinished."""
    with Taking(tmp_path / "in", str(tmp_path / "out")) as taking:
        sink = ShareSink(taking.connect())
        sink.send(STREAM)
        sink.part()
        outcome = taking.outcome()
    assert outcome.code == 4
    assert "the producer went away before the end of the stream" in outcome.records[0].reason
    assert not (tmp_path / "out").exists()
    assert_same((tmp_path / "out.part").read_bytes(), STREAM)


def writable_ring() -> tuple[wire.Header, int]:
    """A ring without seals."""
    fd = memfd.make("test")
    memfd.reserve(fd, 8192)
    return wire.Header(wire.RING, 4096, wire.ANY, 2), fd


def holes() -> tuple[wire.Header, int]:
    """Final memory that is all holes."""
    fd = memfd.make("test")
    os.ftruncate(fd, 1 << 20)
    memfd.seal(fd, memfd.SIZE | memfd.WRITE)
    return wire.Header(wire.FINAL, 1 << 20, Content("|u1", (1 << 20,)), wire.NO_SLOT, 1), fd


def not_final() -> tuple[wire.Header, int]:
    """Memory of its own that its sender can still write to."""
    fd = memfd.make("test")
    memfd.reserve(fd, 4096)
    memfd.seal(fd, memfd.SIZE | memfd.FUTURE_WRITE)
    return wire.Header(wire.FINAL, 4096, Content("|u1", (4096,)), wire.NO_SLOT, 1), fd


def shorter() -> tuple[wire.Header, int]:
    """Final memory that is shorter than announced: reading it would go past its end."""
    fd = memfd.make("test")
    memfd.reserve(fd, 4096)
    memfd.seal(fd, memfd.SIZE | memfd.WRITE)
    return wire.Header(wire.FINAL, 8192, Content("|u1", (8192,)), wire.NO_SLOT, 1), fd


def no_ring() -> tuple[wire.Header, int]:
    """A block in a slot of a ring that never came."""
    return wire.Header(wire.BLOCK, 10, Content("|u1", (10,)), 0, 1), -1


def a_file() -> tuple[wire.Header, int]:
    """A ring that is a file on disk."""
    fd = os.open("/bin/sh", os.O_RDONLY)
    return wire.Header(wire.RING, 4096, wire.ANY, 1), fd


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (writable_ring, "lacks the seals"),
        (holes, "has holes"),
        (not_final, "lacks the seals WRITE"),
        (shorter, "8192 were announced"),
        (no_ring, "a block in slot 0 of a ring of 0"),
        (a_file, "no memfd"),
    ],
)
def test_a_hostile_producer(message: Any, said: str, tmp_path: Path) -> None:
    """What no ShareSink would send fails the stream and says why; nothing of it was read."""
    before = len(descriptors())
    with Taking(tmp_path / "in", str(tmp_path / "out")) as taking:
        with taking.connect() as sock:
            header, fd = message()
            wire.send(sock, header, fd)
            outcome = taking.outcome()
            assert sock.recv(1) == b""
        if fd >= 0:
            os.close(fd)
    assert outcome.code == 4
    assert said in outcome.records[0].reason
    assert outcome.records[0].bytes == 0
    assert len(descriptors()) == before


def test_noise_is_refused(tmp_path: Path) -> None:
    """Bytes that are no message, and a message in pieces, are refused at once."""
    for noise in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<4sB", b"RLY1", 2)):
        with Taking(tmp_path / "in", str(tmp_path / "out")) as taking, taking.connect() as sock:
            sock.sendall(noise)
            outcome = taking.outcome()
        assert outcome.code == 4
        assert "a message of" in outcome.records[0].reason


def test_announcements_without_end_hold_nobody(tmp_path: Path) -> None:
    """A producer that sends rings and no blocks, on and on, leaves the engine to others."""
    done = threading.Event()

    def flood(sock: socket.socket) -> None:
        header, fd = writable_ring()
        memfd.seal(fd, memfd.SIZE | memfd.FUTURE_WRITE)
        with contextlib.suppress(OSError), sock:
            while not done.is_set():
                wire.send(sock, header, fd)
        os.close(fd)

    config = {
        "engines": 1,
        "routes": {
            "bad": {"source": {"shared": f"unix://{tmp_path}/bad"}, "sink": "null:"},
            "good": {"source": {"shared": f"unix://{tmp_path}/good"}, "sink": str(tmp_path / "{id}")},
        },
    }
    with serving(config) as records:
        bad, good = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        bad.connect(str(tmp_path / "bad"))
        flooding = threading.Thread(target=flood, args=(bad,))
        flooding.start()
        good.connect(str(tmp_path / "good"))
        with ShareSink(good) as sink:
            sink.send(STREAM)
            sink.flush(timeout=20)
        eventually(lambda: any(record.route == "good" for record in records), "the other route's stream ends")
        done.set()
        flooding.join(20)
    assert next(record for record in records if record.route == "good").result == "delivered"
