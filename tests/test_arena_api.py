"""Arenas: what lend takes and refuses, how much room there is, what is frozen, what stands in for a refused call."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from peers import payload
from piped import read

import relay
from relay.kernel import arena as arena_module
from relay.kernel import core

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE


def test_an_array_is_lent_and_the_arena_is_fresh_again(pipe: relay.Pipe) -> None:
    """What was written arrives; the next array in the same arena is zeroed and independent of it."""
    with relay.Arena(1 << 16) as arena:
        for number in range(50):
            array = arena.empty((16, 64), "<i4")
            assert not array.any()
            array[:] = number
            del array
            assert arena.waiting == 4096
            assert arena.lend(pipe) == 4096
            assert arena.waiting == 0
        got = numpy.frombuffer(read(pipe, 50 * 4096), "<i4").reshape(50, -1)
        assert (got == numpy.arange(50)[:, None]).all()
        assert arena.lent == 50 * 4096


def test_lend_refuses_while_views_exist_and_loses_nothing(pipe: relay.Pipe) -> None:
    """A view, a slice of one, an array, a slice of that, a cast: each holds the lend up, and is still valid."""
    keepers: list[Callable[[relay.Arena], Any]] = [
        lambda arena: arena.view(100),
        lambda arena: arena.view(100)[10:20],
        lambda arena: arena.view(100).cast("H"),
        lambda arena: arena.empty(100)[::2],
        lambda arena: arena.empty((5, 5), "f4").T.view("i4"),
        lambda arena: memoryview(arena.empty(100)),
        lambda arena: numpy.lib.stride_tricks.as_strided(arena.empty(100), (3,), (1,)),
    ]
    for keep in keepers:
        with relay.Arena(PAGE) as arena:
            kept = keep(arena)
            with pytest.raises(BufferError, match="drop the arrays and memoryviews"):
                arena.lend(pipe)
            assert arena.waiting == 100
            del kept
            assert arena.lend(pipe) == 100
    read(pipe, 100 * len(keepers))


def test_an_array_in_another_thread_cannot_be_lent_away(pipe: relay.Pipe) -> None:
    """An array that a thread holds makes lend refuse until that thread is done."""
    arena = relay.Arena(PAGE)
    made, done = threading.Event(), threading.Event()

    def work() -> None:
        array = arena.empty(PAGE)
        made.set()
        done.wait(10)
        array[:] = 7
        del array

    thread = threading.Thread(target=work)
    thread.start()
    made.wait(10)
    with pytest.raises(BufferError):
        arena.lend(pipe)
    done.set()
    thread.join()
    assert arena.lend(pipe) == PAGE
    assert read(pipe, PAGE) == b"\x07" * PAGE
    arena.close()


def test_pieces_arrive_in_order_whatever_the_pipe_takes() -> None:
    """Random pieces, more than 1024 of them, through a small pipe with short counts: nothing lost, in order."""
    random = Random(5)
    sizes = [random.choice([0, 1, 100, PAGE, PAGE + 1, 3 * PAGE - 7]) for _ in range(1500)]
    data = [random.randbytes(size) for size in sizes]
    arena = relay.Arena(sum(-(-size // PAGE) * PAGE for size in sizes))
    for piece in data:
        assert arena.write(piece) == len(piece)
    assert arena.waiting == sum(sizes)
    got = b""
    with relay.Pipe(4 * PAGE) as small:
        while arena.waiting:
            count = arena.lend(small)
            if arena.waiting:
                with pytest.raises(BufferError, match="still to be lent"):
                    arena.view(1)
            got += read(small, count)
    assert got == b"".join(data)
    arena.close()


def test_a_full_pipe_is_told(pipe: relay.Pipe) -> None:
    """lend never waits: a pipe that takes nothing is BlockingIOError, and nothing is lost."""
    arena = relay.Arena(4 << 20)
    arena.view(4 << 20).release()
    first = arena.lend(pipe)
    assert 0 < first < 4 << 20
    with pytest.raises(BlockingIOError):
        arena.lend(pipe)
    assert arena.waiting == (4 << 20) - first
    arena.close()


def test_room_is_told(pipe: relay.Pipe) -> None:
    """More than there is room for is a BufferError that says so; negative sizes and objects are refused."""
    with relay.Arena(2 * PAGE) as arena:
        arena.view(1).release()
        assert arena.room == PAGE
        with pytest.raises(BufferError, match="do not fit"):
            arena.view(PAGE + 1)
        with pytest.raises(ValueError, match="negative"):
            arena.view(-1)
        with pytest.raises(TypeError, match="Python objects"):
            arena.empty(3, object)
        assert arena.empty((0, 5), "f8").shape == (0, 5)
    with pytest.raises(ValueError, match="closed"):
        arena.view(1)


def test_a_frozen_arena_lends_again_and_cannot_be_written(pipe: relay.Pipe) -> None:
    """An arena made of content lends just that, any number of times, and gives no view."""
    content = payload(9, 3 * PAGE + 17)
    with relay.Arena(content) as arena:
        for _ in range(3):
            assert arena.lend(pipe) == len(content)
            assert arena.lend(pipe) == 0
            arena.rewind()
            assert read(pipe, len(content)) == content
        with pytest.raises(BufferError, match="frozen"):
            arena.view(1)
        with pytest.raises(BufferError, match="frozen"):
            arena.empty(1)
    with relay.Arena(b"") as empty:
        assert empty.lend(pipe) == 0


def test_content_is_copied_at_birth(pipe: relay.Pipe) -> None:
    """An arena made of a bytearray or an array has nothing to do with it any more."""
    mine = bytearray(b"mine" * PAGE)
    with relay.Arena(mine) as arena:
        mine[:] = b"your" * PAGE
        arena.lend(pipe)
        assert read(pipe, 4 * PAGE) == b"mine" * PAGE


class _Refusing:
    """The C core with one call that answers an errno."""

    def __init__(self, call: str, code: int) -> None:
        self.ffi = core.ffi
        self.lib = self
        self._call, self._code = call, code

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: -self._code) if name == self._call else getattr(core.lib, name)


def test_without_the_cut_by_the_kernel_it_is_a_copy(
    pipe: relay.Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mremap refuses to take pages away, they are copied: the raw pointer harms nobody either."""
    monkeypatch.setattr(arena_module, "core", _Refusing("relay_cut", errno.EINVAL))
    arena = relay.Arena(4 * PAGE)
    arena.empty(4 * PAGE)[:] = 3
    assert arena.lend(pipe) == 4 * PAGE
    arena.empty(4 * PAGE)[:] = 9
    assert read(pipe, 4 * PAGE) == b"\x03" * 4 * PAGE
    arena.close()


def test_where_lending_is_forbidden_it_writes(pipe: relay.Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that refuses vmsplice gets the same bytes by write, unless copying is refused too."""
    monkeypatch.setattr(arena_module, "core", _Refusing("relay_lend_pieces", errno.EPERM))
    content = payload(1, 5 * PAGE)
    with relay.Arena(8 * PAGE) as arena:
        arena.write(content)
        with pytest.raises(PermissionError):
            arena.lend(pipe, copy=False)
        assert arena.lend(pipe) == len(content)
        assert read(pipe, len(content)) == content
