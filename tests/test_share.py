"""Shared memory from process to process: what arrives, and that nobody can change it."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from descriptors import Descriptors
from forked import forked
from leaks import descriptors
from shares import through

import relay
from relay.sharing.draft import Draft
from relay.sharing.shared import Shared, share

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE


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
