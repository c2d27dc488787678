"""Memory that is made where it is shared: it is handed over as it is, and who still writes to it reaches nobody."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import Any

import pytest
from descriptors import Descriptors
from forked import forked
from leaks import descriptors
from shares import through

import relay
from relay.errors import KernelError
from relay.sharing.draft import Draft
from relay.sharing.shared import Shared, share

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE


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
