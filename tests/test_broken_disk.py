"""A disk that gives I/O errors, under a file sink, under a spill's directory and under a file source.

The errors are a device's own (device.py): EIO comes out of the kernel's ext4. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from device import Device, broken_disk
from flapping import Receiver
from peers import (
    PATIENCE,
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    received,
    run,
    send_all,
    tcp_listener,
)
from relays import Process, run_relay, serving

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Device, Path]]:
    """The device, whole so far, and the directory of the filesystem on it."""
    with broken_disk(tmp_path) as made:
        yield made


class Taker:
    """Takes one connection and reads it to its end, or until it is reset, on a thread; `got` is what came."""

    def __init__(self, listener: socket.socket | Receiver) -> None:
        self.got = bytearray()
        self.was_reset = False
        self._listener = listener
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        where = self._listener
        if isinstance(where, Receiver):
            eventually(lambda: where.listens, "it listens")
        with where.accept() if isinstance(where, Receiver) else accept(where) as sock:
            try:
                for piece in received(sock):
                    self.got += piece
            except ConnectionResetError:
                self.was_reset = True

    def __enter__(self) -> Taker:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.join(PATIENCE)


def serving_to(tee: str, there: str, more: str = "") -> str:
    """A route into `there`, with a tee."""
    return f"""
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: each}}
    stages: [{{tee: {tee}}}]
    sink: {{connect: "{there}"}}
{more}"""


def stream(
    served: Process, listener: socket.socket, data: bytes, fail: object, at: int
) -> tuple[bytes, bool]:
    """One stream; `fail` is called once `at` bytes of it have come out. What the other sink got, and whether the source
    was told that all is well."""
    with socket.create_connection(("127.0.0.1", served.port())) as source, accept(listener) as other:
        send_all(source, data[:at])
        got = b""
        while len(got) < at:
            got += other.recv(at - len(got))
        fail()  # type: ignore[operator] # a function
        send_all(source, data[at:])
        source.shutdown(socket.SHUT_WR)
        got += receive_all(other)
        other.close()
        try:
            return got, receive_all(source) == b""
        except ConnectionResetError:
            return got, False


@pytest.mark.parametrize(
    ("how", "policy"),
    [
        (", direct: true", "block"),
        (", direct: true", "drop"),
        (", fsync: close", "block"),
        (", fsync: close", "drop"),
        (", fsync: 1s", "block"),
    ],
)
def test_a_disk_that_breaks_under_a_file(
    disk: tuple[Device, Path], tmp_path: Path, how: str, policy: str
) -> None:
    """EIO fails that file alone, under its policy; what was written before stays, and is all that is counted."""
    device, place = disk
    data, at = payload(1, 6 * MIB), 3 * MIB
    part = place / "out.part"

    def fail() -> None:
        # what the disk has must be on it
        eventually(lambda: part.exists() and part.stat().st_size >= at - MIB, "the file has its part")
        run(["sync", part])
        device.fails_writes = True

    with tcp_listener() as (listener, there):
        config = serving_to(f'{{to: {{file: "{place}/out"{how}}}, on_slow: {policy}}}', there)
        with serving(config, tmp_path) as served:
            got, well = stream(served, listener, data, fail, at)
            (record,) = served.sessions()
            served.signal(15)
            assert served.wait() == 0
    device.fails_writes = False
    assert_same(got, data)
    failed, whole = record["sinks"]
    assert whole["result"] == "delivered"
    assert (failed["result"], record["result"]) == ("failed", "partial")
    assert f"{place}/out" in failed["reason"]
    assert "Input/output error (EIO); the device reports an error: see dmesg" in failed["reason"]
    assert failed["path"] == str(part)
    assert well is (policy == "drop")  # under block the stream has failed, which its source is told
    assert not (place / "out").exists()
    assert_same(part.read_bytes()[: at - MIB], data[: at - MIB])
    assert device.refused


@pytest.mark.parametrize("then", ["drop", "block"])
def test_a_disk_that_breaks_under_a_log(disk: tuple[Device, Path], tmp_path: Path, then: str) -> None:
    """A log whose disk cannot be read any more ends that sink with EIO; it names the log, the others go on."""
    device, place = disk
    data = payload(2, 6 * MIB)
    spill = f"{{policy: spill, directory: {place}/spill, then: {then}}}"

    def fail() -> None:
        (segment,) = (place / "spill").glob("r.*/0*")
        eventually(lambda: segment.stat().st_size == 3 * MIB, "the log has it")
        forget(segment)
        device.fails_reads = True
        away.up()

    with Receiver() as away, tcp_listener() as (listener, there):
        config = serving_to(f'{{to: {{connect: "{away.address}"}}, on_slow: {spill}}}', there)
        with serving(config, tmp_path) as served:
            got, well = stream(served, listener, data, fail, 3 * MIB)
            (record,) = served.sessions()
            served.signal(15)
            served.wait()
    device.fails_reads = False
    assert_same(got, data)
    failed, whole = record["sinks"]
    assert whole["result"] == "delivered"
    assert (failed["result"], failed["backlog"]) == ("failed", len(data))
    assert "EIO" in failed["reason"]
    assert f"wait in {place}/spill" in failed["reason"]
    assert well is (then == "drop")
    (segment,) = (place / "spill").glob("r.*/0*")
    assert_same(segment.read_bytes(), data)


def test_a_disk_that_takes_no_more_under_a_log(disk: tuple[Device, Path], tmp_path: Path) -> None:
    """What the log had in memory is delivered although its disk has broken: nothing is missing."""
    device, place = disk
    data = payload(4, 6 * MIB)
    spill = f"{{policy: spill, directory: {place}/spill}}"

    def fail() -> None:
        device.fails_writes = True
        (segment,) = (place / "spill").glob("r.*/0*")
        with segment.open("rb") as opened, pytest.raises(OSError, match="Input/output error"):
            os.fsync(opened.fileno())
        away.up()

    with Receiver() as away, tcp_listener() as (listener, there):
        config = serving_to(f'{{to: {{connect: "{away.address}"}}, on_slow: {spill}}}', there)
        with serving(config, tmp_path) as served, Taker(away) as taker:
            got, well = stream(served, listener, data, fail, 3 * MIB)
            served.sessions()
            served.signal(15)
            assert served.wait() == 0
    assert well
    assert_same(got, data)
    assert_same(bytes(taker.got), data)


def forget(path: Path) -> None:
    """Its pages are on the disk alone."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextlib.contextmanager
def held_in_memory(path: Path, size: int) -> Iterator[None]:
    """The first `size` bytes are in the page cache in the block: what is only read the kernel may drop again."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), size) as held:
        first = ctypes.c_char.from_buffer(held)
        try:
            locked = libc.mlock(ctypes.byref(first), ctypes.c_size_t(size))
            assert locked == 0, os.strerror(ctypes.get_errno())
            yield
        finally:
            del first  # else the mapping cannot be closed


@pytest.mark.parametrize(
    ("command", "method"),
    [("run", "auto"), ("run", "copy")]
    + [("send", method) for method in ("auto", "sendfile", "splice", "vmsplice", "copy")],
)
def test_a_file_on_a_broken_disk(
    disk: tuple[Device, Path], tmp_path: Path, command: str, method: str
) -> None:
    """A file that cannot be read fails as source: what came before goes out, nobody takes it for whole, exit code 4."""
    device, place = disk
    file = place / "file"
    data = payload(3, 4 * MIB)
    file.write_bytes(data)
    forget(file)
    with held_in_memory(file, MIB), tcp_listener() as (listener, there):
        device.fails_reads = True
        if command == "run":
            argv = ["run", "--method", method, file, "--to", there, "--to", "copy"]
        else:
            argv = ["send", "--method", method, file, "--to", there, "--progress", "none"]
        with Taker(listener) as taker:
            done = run_relay(*argv, cwd=tmp_path, patience=PATIENCE)
    device.fails_reads = False
    said = done.stderr.decode()
    assert done.returncode == 4, said
    assert f"reading from {file}: Input/output error (EIO)" in said
    assert taker.was_reset
    assert_same(taker.got, data[: len(taker.got)])
    assert len(taker.got) >= MIB or command == "send"
    assert not (tmp_path / "copy").exists()
