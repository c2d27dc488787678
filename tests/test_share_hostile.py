"""Senders who mean harm: what they send is refused, nothing faults, no descriptor stays."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import socket
import struct
from pathlib import Path

import pytest
from descriptors import Descriptors
from forked import forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leaks import descriptors

import relay
from relay.errors import ShareError
from relay.sharing import wire
from relay.sharing.content import Content
from relay.sharing.shared import Shared

PAGE = mmap.PAGESIZE
ALL = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def memfd(size: int, seals: int = ALL, *, holes: bool = False, flags: int = 0) -> int:
    """A memfd as a hostile sender makes it."""
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC | flags)
    if holes:
        os.ftruncate(fd, size)
    else:
        os.pwrite(fd, bytes(size), 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def header(
    size: int, dtype: str = "|u1", shape: tuple[int, ...] | None = None, kind: int = wire.KEEP
) -> bytes:
    """A header that no Content has looked at."""
    shape = (size,) if shape is None else shape
    fixed = struct.pack("<4sBBHQII32s", wire.MAGIC, kind, len(shape), len(dtype), size, 0, 0, dtype.encode())
    return (fixed + struct.pack(f"<{len(shape)}Q", *shape)).ljust(wire.HEADER, b"\0")


def refused(raw: bytes, fds_sent: list[int], match: str | None = None, **options: int) -> None:
    """`raw` with descriptors is refused by receive with ShareError, and nothing stays open."""
    near, far = socket.socketpair()
    with near, far:
        before = descriptors()
        socket.send_fds(near, [raw], fds_sent)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises(ShareError, match=match):
            Shared.receive(far, **options)
        assert descriptors() == before


def test_unsealed_memory_is_refused() -> None:
    """Each missing seal is named: what could shrink could fault, what could be written is not final."""
    for missing, name in (
        (fcntl.F_SEAL_WRITE, "WRITE"), (fcntl.F_SEAL_SHRINK, "SHRINK"), (fcntl.F_SEAL_GROW, "GROW"),
    ):  # fmt: skip
        fd = memfd(PAGE, ALL & ~missing)
        refused(header(PAGE), [fd], match=name)
        os.close(fd)
    fd = memfd(PAGE, 0)
    refused(header(PAGE), [fd], match="lacks the seals SHRINK, GROW, WRITE")
    os.close(fd)


def test_other_sizes_than_announced_are_refused() -> None:
    """A memfd smaller or larger than its header says is refused, by a byte or by terabytes."""
    for real, announced in ((PAGE, PAGE + 1), (PAGE, PAGE - 1), (1, PAGE), (PAGE, 1 << 29)):
        fd = memfd(real)
        refused(header(announced), [fd], match="were announced")
        os.close(fd)


def test_more_than_is_taken_is_refused() -> None:
    """Sizes beyond max_bytes, beyond what can be, and 0 are refused before anything is mapped."""
    fd = memfd(2 * PAGE)
    refused(header(2 * PAGE), [fd], match="max_bytes", max_bytes=PAGE)
    refused(header(0), [fd], match="between 1 and")
    refused(header(1 << 40), [fd], match="max_bytes")
    refused(header(1 << 63), [fd], match="than there can be")
    os.close(fd)


def test_holes_are_refused() -> None:
    """A terabyte of nothing, sealed, would be the receiver's memory when it reads: refused."""
    fd = memfd(1 << 40, holes=True)
    refused(header(1 << 40), [fd], match="holes", max_bytes=1 << 50)
    os.close(fd)
    size = 64 << 20  # each page that is written may be a huge one, as the machine is set
    fd = memfd(0, 0)
    os.pwrite(fd, bytes(PAGE), 0)
    os.pwrite(fd, bytes(PAGE), size - PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL)
    there = os.fstat(fd).st_blocks * 512
    assert 2 * PAGE <= there < size
    refused(header(size), [fd], match=f"{there} of its {size} bytes")
    os.close(fd)


def test_huge_pages_are_refused() -> None:
    """A memfd of hugetlbfs, whose pages can be missing when they are read, is refused."""
    try:
        fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        os.ftruncate(fd, 2 << 20)
    except OSError as error:
        pytest.skip(f"hugetlbfs is missing: {error}")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL)
    refused(header(2 << 20), [fd], match="huge pages")
    os.close(fd)


def test_other_descriptors_are_refused(fds: Descriptors, tmp_path: Path) -> None:
    """Files on disk, pipes, directories, sockets, devices and O_PATH are no memfds."""
    (tmp_path / "file").write_bytes(bytes(PAGE))
    one, _two = fds.unix_pair()
    for fd in (
        fds.open(tmp_path / "file", os.O_RDWR), fds.pipe().r, fds.open(tmp_path, os.O_RDONLY), one.fileno(),
        fds.open("/dev/zero", os.O_RDWR), fds.open(tmp_path / "file", os.O_PATH), fds.epoll().fileno(),
    ):  # fmt: skip
        refused(header(PAGE), [fd], match="no memfd|lacks the seals")


def test_the_wrong_number_of_descriptors_is_refused() -> None:
    """None, two, sixteen, or more than are taken: refused, and every one of them is closed."""
    fd = memfd(PAGE)
    refused(header(PAGE), [], match="0 descriptors")
    refused(header(PAGE), [fd, fd], match="2 descriptors")
    refused(header(PAGE), [fd] * 16, match="16 descriptors")
    refused(header(PAGE), [fd] * 100, match="lost on the way")
    os.close(fd)


def test_at_the_limit_of_open_files_it_is_told() -> None:
    """A receiver that can open nothing more is told that a descriptor was lost, and where to look."""
    near, far = socket.socketpair()
    fd = memfd(PAGE)
    with near, far:
        socket.send_fds(near, [header(PAGE)], [fd])

        def child() -> str:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            try:
                Shared.receive(far)
            except ShareError as error:
                return str(error)
            return "received"

        with forked(child) as other:
            assert "ulimit -n" in other.answer()
    os.close(fd)


def test_a_message_in_pieces_is_refused_at_once() -> None:
    """Half a header keeps nobody waiting for the other half."""
    fd = memfd(PAGE)
    refused(header(PAGE)[:100], [fd], match=f"100 bytes instead of {wire.HEADER}")
    refused(b"G", [fd], match="1 bytes")
    refused(b"GET / HTTP/1.1\r\n\r\n".ljust(wire.HEADER), [fd], match="begins with")
    os.close(fd)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("|O", (512,)), ("|O8", (512,)), ("<f4", (1025,)), ("<f4", (1 << 62, 1 << 62)), ("<f4", (0, 1 << 63)),
        ("<i3", (4,)), ("|V0", (1,)), ("|S0", (4096,)), ("|b2", (2048,)), ("<f8,<f8", (256,)), ("u1", (4096,)),
        ("<M8[" + "9" * 20 + "s]", (512,)), ("|u1[s]", (4096,)), ("<U99999999999", (1,)), ("\u0661", (4096,)),
        ("{'names'", (4096,)), ("", (4096,)), ("|u1", ()), ("|u1", (1,) * 33), ("|V4294967296", (1,)),
    ],
)  # fmt: skip
def test_dtypes_and_shapes_that_make_no_sense_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    """Objects, sizes that overflow, shapes of other sizes, spellings of other worlds: refused before mapping."""
    fd = memfd(PAGE)
    raw = header(PAGE, "|u1", shape[:32])
    word = dtype.encode()[:32]
    raw = raw[:5] + struct.pack("<BHQII32s", len(shape), len(word), PAGE, 0, 0, word) + raw[56:]
    refused(raw, [fd])
    os.close(fd)


def test_booleans_that_are_none_are_refused(fds: Descriptors) -> None:
    """NumPy counts booleans by adding them: an array of other bytes does not become one."""
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.pwrite(fd, b"\xff" * 64, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL)
    near, far = fds.unix_pair()
    socket.send_fds(near, [header(64, "|b1")], [fd])
    os.close(fd)
    with Shared.receive(far) as got, pytest.raises(ShareError, match="booleans"):  # type: ignore[union-attr]
        got.array()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_understood_or_refused(data: st.DataObject) -> None:
    """Headers with any field mutated give a header whose numbers agree, or ShareError, and nothing else."""
    raw = bytearray(header(24, "<f4", (2, 3)))
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.one_of(st.integers(0, 80), st.integers(0, wire.HEADER - 1)))
        raw[at] = data.draw(st.integers(0, 255))
    try:
        found = wire.parse(bytes(raw))
    except ShareError:
        return
    if found.kind in (wire.KEEP, wire.BLOCK):
        assert found.content.size == found.size
        if 0 < found.size < 1 << 20:
            content = Content(found.content.dtype, found.content.shape)
            content.array(bytes(found.size), final=True)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=wire.HEADER + 10), count=st.integers(0, 20))
def test_garbage_is_refused_and_leaks_nothing(raw: bytes, count: int) -> None:
    """Any bytes with any number of descriptors: ShareError or the end of the stream, all descriptors closed."""
    fd = memfd(1)
    near, far = socket.socketpair()
    with near, far:
        before = descriptors()
        if raw:
            socket.send_fds(near, [raw], [fd] * count)
        near.shutdown(socket.SHUT_WR)
        try:
            assert Shared.receive(far) is None
            assert not raw
        except ShareError:
            pass
        assert descriptors() == before
    os.close(fd)


def test_a_sender_that_changes_its_mind_cannot(fds: Descriptors) -> None:
    """After what it sent was taken, a sender can neither cut, write, nor punch it; reading goes on."""
    fd = memfd(16 * PAGE)
    near, far = fds.unix_pair()
    socket.send_fds(near, [header(16 * PAGE)], [fd])
    with Shared.receive(far) as got:  # type: ignore[union-attr]
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(PAGE)) == -1
        assert ctypes.get_errno() == errno.EPERM
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.close(fd)
        assert bytes(got) == bytes(16 * PAGE)


def test_a_stream_is_not_taken_for_a_share(fds: Descriptors) -> None:
    """Each kind of receiver says what it was sent instead."""
    near, far = fds.unix_pair()
    with relay.ShareSink(near) as sink:
        sink.send(b"x")
        far.close()
        with pytest.raises(BrokenPipeError):
            sink.send(b"y")
    near, far = fds.unix_pair()
    with relay.ShareSink(near) as sink:
        sink.send(b"x")
        with pytest.raises(ShareError, match="ShareSource"):
            Shared.receive(far)
