"""Shared memory from process to process: what arrives, what nobody can change, and senders who mean harm."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from descriptors import Descriptors
from forked import forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leaks import descriptors

import relay
from relay.errors import KernelError, ShareError
from relay.sharing import wire
from relay.sharing.content import Content
from relay.sharing.draft import Draft
from relay.sharing.shared import Shared, share

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE
ALL = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def through(fds: Descriptors, shared: Shared) -> Shared:
    """What is received of `shared` over a socket pair."""
    near, far = fds.unix_pair()
    shared.send(near)
    got = Shared.receive(far)
    assert got is not None
    return got


SAMPLES: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"some bytes",
    "one byte": lambda: b"x",
    "bytearray": lambda: bytearray(b"some bytes"),
    "array.array": lambda: array.array("d", [1.5, 2.5]),
    "cast": lambda: memoryview(bytes(24)).cast("i", (2, 3)),
    "strided": lambda: memoryview(b"abcdefgh")[::2],
    "ctypes": lambda: (ctypes.c_uint16 * 3)(1, 2, 3),
    "float32": lambda: numpy.arange(12, dtype="f4").reshape(3, 4),
    "fortran": lambda: numpy.asfortranarray(numpy.arange(12).reshape(3, 4)),
    "sliced": lambda: numpy.arange(100).reshape(10, 10)[::3, 1::2],
    "zero dimensions": lambda: numpy.array(3.5),
    "big-endian": lambda: numpy.arange(5, dtype=">i2"),
    "bool": lambda: numpy.array([True, False, True]),
    "complex": lambda: numpy.array([1 + 2j]),
    "text": lambda: numpy.array(["ab", "c"]),
    "bytes array": lambda: numpy.array([b"ab", b"c"]),
    "times": lambda: numpy.array(["2020-01-01", "2021-01-01"], "M8[ns]"),
    "void": lambda: numpy.zeros(3, "V5"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_dtype_and_shape_arrive(fds: Descriptors, name: str) -> None:
    """Every kind of buffer arrives as the array NumPy makes of it, read-only, and its memory is nobody's."""
    source = SAMPLES[name]()
    expected = (
        numpy.asarray(source) if not isinstance(source, bytes | bytearray) else numpy.frombuffer(source, "u1")
    )
    with share(source) as shared, through(fds, shared) as got:
        array = got.array()
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert array.tobytes() == expected.tobytes() == bytes(got) == got[:]
        assert len(got) == expected.nbytes
        assert not array.flags.writeable
        assert memoryview(got).readonly
        del array


def test_the_original_may_change(fds: Descriptors) -> None:
    """What happens to the buffer after `share` is not seen by anybody."""
    mine = numpy.ones(100_000)
    with share(mine) as shared, through(fds, shared) as got:
        mine[:] = 7
        array = got.array()
        assert (array == 1).all()
        del array


def test_nobody_can_write(fds: Descriptors) -> None:
    """Neither end can write to the memory, make it writable, cut it, or map it for writing."""
    with share(b"final" * 1000) as shared, through(fds, shared) as got:
        for one in (shared, got):
            with pytest.raises(TypeError):
                one[0] = 1
            with pytest.raises(TypeError):
                one.write(b"x")
            with pytest.raises((TypeError, ValueError)):
                one.resize(1)
            with pytest.raises(PermissionError):
                os.pwrite(one.fileno(), b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(one.fileno(), 0)
            with pytest.raises(PermissionError):
                mmap.mmap(one.fileno(), 10)
            array = one.array()
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
            del array
        assert bytes(got) == b"final" * 1000


def test_it_is_the_same_memory(fds: Descriptors) -> None:
    """The receiver's pages are the sender's: one inode, no other memory behind it."""
    with share(bytes(1 << 20)) as shared, through(fds, shared) as got:
        mine, theirs = os.fstat(shared.fileno()), os.fstat(got.fileno())
        assert (mine.st_dev, mine.st_ino) == (theirs.st_dev, theirs.st_ino)


def test_many_receivers_and_onwards(fds: Descriptors) -> None:
    """One share goes to many, and a receiver hands it on; it lives on when its maker is gone."""
    shared = share(numpy.arange(1000))
    got = [through(fds, shared) for _ in range(20)]
    shared.close()
    onward = through(fds, got[0])
    for one in [*got, onward]:
        array = one.array()
        assert int(array.sum()) == 499_500
        del array
        one.close()


def test_to_another_process(fds: Descriptors) -> None:
    """A child receives an array and sends one back."""
    near, far = fds.unix_pair(blocking=True)
    numbers = numpy.random.default_rng(1).random((100, 50))

    def child() -> int:
        with Shared.receive(far) as got, share(got.array().T * 2) as back:  # type: ignore[union-attr]
            back.send(far)
        return 1

    with forked(child) as other:
        with share(numbers) as shared:
            shared.send(near)
        with Shared.receive(near) as got:  # type: ignore[union-attr]
            result = got.array()
            assert (result == numbers.T * 2).all()
            del result
        assert other.answer() == 1


def test_close_waits_for_views() -> None:
    """A Shared with an array on it cannot be closed under it; without, its descriptor is given back."""
    before = descriptors()
    shared = share(b"abc")
    array = shared.array()
    with pytest.raises(BufferError):
        shared.close()
    assert array.tobytes() == b"abc"
    del array
    shared.close()
    shared.close()
    with pytest.raises(ValueError, match="closed"):
        shared.fileno()
    assert descriptors() == before


def test_dropped_is_closed() -> None:
    """A Shared and a Draft that nobody closes give their descriptors back when they are collected."""
    before = descriptors()
    share(b"abc")
    Draft(10)
    array = share(b"abc").array()
    assert array.tobytes() == b"abc"
    del array
    assert descriptors() == before


def test_what_cannot_be_shared_is_told() -> None:
    """Nothing to map, Python objects, structures, masks, pointers: refused by name, without a descriptor left."""
    before = descriptors()
    with pytest.raises(ValueError, match="empty"):
        share(b"")
    for refused in (
        numpy.array([object()]), numpy.zeros(3, "i4,f4"), numpy.ma.masked_array([1, 2], [True, False]),
        (ctypes.c_void_p * 3)(), (ctypes.c_char_p * 3)(), "text", 5,
    ):  # fmt: skip
        with pytest.raises(TypeError):
            share(refused)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far, share(b"x") as shared, pytest.raises(ValueError, match="unix stream socket"):
        shared.send(near)
    with socket.socket() as tcp, pytest.raises(ValueError, match="unix stream socket"):
        Shared.receive(tcp)
    assert descriptors() == before


def test_the_end_is_none_and_waiting_is_the_sockets(fds: Descriptors) -> None:
    """An idle nonblocking socket is BlockingIOError, one with a timeout TimeoutError, a closed one None."""
    near, far = fds.unix_pair()
    with pytest.raises(BlockingIOError):
        Shared.receive(far)
    far.settimeout(0.01)
    with pytest.raises(TimeoutError):
        Shared.receive(far)
    near.close()
    assert Shared.receive(far) is None


def test_a_draft_is_filled_in_place(fds: Descriptors) -> None:
    """A draft's array becomes the shared one without a copy; it is not shared while anything looks at it."""
    with Draft((100, 200), "f4") as draft:
        array = draft.array()
        assert not array.any()
        array[:] = numpy.arange(200)
        with pytest.raises(BufferError, match="drop them"):
            draft.share()
        array[50] = 9
        inode = os.fstat(draft._pages.fileno()).st_ino
        del array
        with draft.share() as shared, through(fds, shared) as got:
            assert os.fstat(got.fileno()).st_ino == inode
            result = got.array()
            assert (result[:50] == numpy.arange(200)).all()
            assert (result[50] == 9).all()
            del result
        with pytest.raises(ValueError, match="closed, or shared already"):
            draft.share()


def inode(shared: Shared) -> int:
    """The number of its memfd."""
    return os.fstat(shared.fileno()).st_ino


@pytest.mark.parametrize(
    "shape", [(10,), (700, 1001), (3 << 20,)], ids=["a page", "an odd size", "huge pages"]
)
def test_an_array_that_was_made_for_it_is_taken_as_it_is(fds: Descriptors, shape: tuple[int, ...]) -> None:
    """`share` takes the pages of an array by `relay.empty`; its owner writes on, and nobody else sees that."""
    mine = relay.empty(shape, "f4")
    assert not mine.any()
    assert (mine.dtype, mine.shape) == ("float32", shape)
    mine[:] = 1
    before = mine.__array_interface__["data"]
    with share(mine) as shared, through(fds, shared) as got:
        theirs = got.array()
        assert (mine == 1).all()
        mine[:] = 2
        mine.reshape(-1)[-1] = 3
        assert (theirs == 1).all()
        assert (shared.array() == 1).all()
        assert (mine.reshape(-1)[:-1] == 2).all()
        assert mine.reshape(-1)[-1] == 3
        assert mine.__array_interface__["data"] == before
        with share(mine) as again, through(fds, again) as other:  # a copy: these pages were written to since
            assert inode(again) != inode(shared)
            assert other.array().tobytes() == mine.tobytes()
        assert (theirs == 1).all()
        del theirs


def test_no_copy_is_made_of_it() -> None:
    """What is shared is the memfd that the array was made in, and its descriptor goes along."""
    before = descriptors()
    draft = Draft((100, 100), "f8")
    number = os.fstat(draft._pages.fileno()).st_ino
    array = draft.array()
    del draft
    assert len(descriptors()) == len(before) + 1
    with share(array) as shared:
        assert inode(shared) == number
        assert len(descriptors()) == len(before) + 1
    del array
    assert descriptors() == before


def test_parts_and_other_orders_of_it_are_copied(fds: Descriptors) -> None:
    """Only the whole of such an array is taken: a part, or another order, is copied; the whole can be taken later."""
    array = relay.empty((40, 50), "i8")
    array[:] = numpy.arange(2000).reshape(40, 50)
    for part in (array[:20], array[20:], array[:, ::2], array.T, array.reshape(-1)[:-1]):
        with share(part) as shared, through(fds, shared) as got:
            assert (got.array() == part).all()
    array[0, 0] = -1
    with share(array.reshape(2000).view("u8")) as shared, through(fds, shared) as got:
        assert (got.dtype, got.shape) == ("<u8", (2000,))
        assert got.array()[0] == 2**64 - 1


def test_where_a_child_could_write_to_it_it_is_copied(fds: Descriptors) -> None:
    """An array that a forked process has, too, is copied: what either writes later, nobody receives."""
    array = relay.empty(5000)
    array[:] = 7
    go = fds.pipe(blocking=True)

    def child() -> int:
        os.read(go.r, 1)
        array[:] = 9
        return int(array.sum())

    with forked(child) as other, share(array) as shared, through(fds, shared) as got:
        array[0] = 8
        os.write(go.w, b"x")
        assert other.answer() == 45_000
        assert bytes(got) == bytes(shared) == b"\x07" * 5000
        assert array[0] == 8


def test_a_thread_that_writes_meanwhile_changes_nothing(fds: Descriptors) -> None:
    """While `share` takes an array another thread goes on: what it writes stays in the array and reaches nobody."""
    for _ in range(10):
        array = relay.empty(1 << 16, "i8")
        written, stop = [0], threading.Event()

        def write(array: Any = array, written: list[int] = written, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                written[0] += 1
                array[:] = written[0]

        thread = threading.Thread(target=write)
        thread.start()
        try:
            with share(array) as shared, through(fds, shared) as got:
                once = bytes(got)
                seen = written[0]
                while written[0] < seen + 3:
                    pass
                assert bytes(got) == once
        finally:
            stop.set()
            thread.join()
        assert (array == written[0]).all()


def test_a_stray_pointer_reaches_nobody(fds: Descriptors) -> None:
    """Somebody who kept the address of an array writes to his own copy of the page."""
    array = relay.empty(3 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(array))
    with share(array) as shared, through(fds, shared) as got:
        ctypes.memset(address, 0xFF, 2 * PAGE)
        assert bytes(got) == bytes(3 * PAGE)
        assert array.tobytes() == b"\xff" * 2 * PAGE + bytes(PAGE)


def test_a_draft_that_a_child_can_write_to_is_not_final(fds: Descriptors) -> None:
    """A fork with the draft mapped makes it EBUSY, told with the reason; when the child is gone it works."""
    with Draft(10) as draft:
        go = fds.pipe(blocking=True)
        with forked(lambda: len(os.read(go.r, 1))) as child:
            with pytest.raises(KernelError, match=r"EBUSY.*forked"):
                draft.share()
            view = draft.view()
            view[:3] = b"abc"
            view.release()
            os.write(go.w, b"x")
            child.answer()
            child.status()
            with draft.share() as shared:
                assert bytes(shared) == b"abc" + bytes(7)


def test_parts_that_nobody_wrote_are_zeros(fds: Descriptors) -> None:
    """A draft that was never touched arrives as zeros, and the receiver does not pay for its pages."""
    with Draft(1 << 20) as draft, draft.share() as shared, through(fds, shared) as got:
        assert bytes(got) == bytes(1 << 20)


# -- hostile senders: what they send is refused, nothing faults, no descriptor stays


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


WITHOUT_NUMPY = """
import array, os, socket, sys
sys.modules["numpy"] = None  # an import fails
import relay
near, far = socket.socketpair()
with relay.share(array.array("d", [1.5, 2.5])) as shared:
    shared.send(near)
with relay.Shared.receive(far) as got:
    assert (got.dtype, got.shape) == ("<f8", (2,))
    assert memoryview(got).cast("d").tolist() == [1.5, 2.5]
    try:
        got.array()
    except ImportError:
        print("no arrays")
with relay.Draft(10) as draft:
    with draft.view() as view:
        view[:3] = b"abc"
    assert bytes(draft.share()) == b"abc" + bytes(7)
with relay.ShareSink(near) as sink:
    sink.send(b"a block")
    with sink.slot(4) as view:
        view[:] = b"made"
blocks = [bytes(block.view()) for block in relay.ShareSource(far)]
assert blocks == [b"a block", b"made"], blocks
with relay.Arena(100) as arena, relay.Pipe() as pipe:
    with arena.view(4) as view:
        view[:] = b"lent"
    arena.lend(pipe)
    assert os.read(pipe.read_fd, 10) == b"lent"
print("done")
"""


def test_all_of_it_but_arrays_works_without_numpy() -> None:
    """Where NumPy is not installed, bytes are lent, shared and streamed all the same."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(relay.__file__).parent.parent)},
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["no arrays", "done"], done.stderr
