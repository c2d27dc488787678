"""Memory that is lent: whatever a program does in Python afterwards, the reader's bytes are those at the lend."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from descriptors import Descriptors
from forked import forked
from peers import payload, receive_exactly
from piped import read

import relay
from relay.kernel import arena as arena_module
from relay.kernel import core

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE


@pytest.fixture
def pipe() -> Iterator[relay.Pipe]:
    """A pipe of 1 MiB, as far as it is granted."""
    with relay.Pipe() as made:
        yield made


def test_import_is_lazy() -> None:
    """`import relay` loads neither the C core, NumPy, nor anything else of relay, and names what it has."""
    code = (
        "import sys, relay; print([m for m in sys.modules if m.startswith('relay.') or m == 'numpy']);"
        "assert {'Arena', 'share', 'splice'} <= set(dir(relay)); relay.Arena; print('numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(relay.__file__).parent.parent)},
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = relay.nonsense  # type: ignore[attr-defined]


def test_every_public_name_leads_somewhere() -> None:
    """Each name in relay.__all__ can be had, and has a docstring."""
    for name in relay.__all__:
        found = getattr(relay, name)
        assert name == "__version__" or found.__doc__, name


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


def attack_by_array(arena: relay.Arena) -> Callable[[], None]:
    """A raw pointer to the memory, as a C extension could keep it: no export tells of it."""
    array = arena.empty(8 * PAGE)
    raw = (ctypes.c_char * (8 * PAGE)).from_address(array.ctypes.data)
    array[:] = 1

    def attack() -> None:
        raw[:] = b"\xff" * (8 * PAGE)

    return attack


def attack_by_released_base(arena: relay.Arena) -> Callable[[], None]:
    """The memoryview under an array is released, so that the array counts no more and can still be written."""
    array = arena.empty(8 * PAGE)
    array[:] = 1
    base = array
    while isinstance(base, numpy.ndarray):
        base = base.base
    base.release()

    def attack() -> None:
        array[:] = 255

    return attack


def attack_by_the_next_array(arena: relay.Arena) -> Callable[[], None]:
    """The arena's next array lies where the lent one was."""
    array = arena.empty(8 * PAGE)
    array[:] = 1
    del array

    def attack() -> None:
        arena.empty(8 * PAGE)[:] = 255

    return attack


def attack_by_closing(arena: relay.Arena) -> Callable[[], None]:
    """The memory is unmapped, and somebody else gets and fills what takes its place."""
    arena.empty(8 * PAGE)[:] = 1

    def attack() -> None:
        arena.close()
        gc.collect()
        others = [mmap.mmap(-1, 8 * PAGE) for _ in range(8)]
        for other in others:
            other[:] = b"\xff" * (8 * PAGE)

    return attack


def attack_by_resizing(arena: relay.Arena) -> Callable[[], None]:
    """The mapping inside is resized and written, which only a program that reaches for private names can."""
    arena.empty(8 * PAGE)[:] = 1

    def attack() -> None:
        memory = arena._map
        assert memory is not None
        memory.resize(16 * PAGE)
        memory[:] = b"\xff" * (16 * PAGE)

    return attack


ATTACKS = pytest.mark.parametrize(
    "attack",
    [
        attack_by_array,
        attack_by_released_base,
        attack_by_the_next_array,
        attack_by_closing,
        attack_by_resizing,
    ],
)


@ATTACKS
@pytest.mark.parametrize("hop", ["pipe", "pipe-pipe", "unix", "tcp"])
def test_a_reader_gets_what_was_lent(fds: Descriptors, attack: Any, hop: str, pipe: relay.Pipe) -> None:
    """Whatever is done to the memory after the lend, the bytes in the pipe, and past it, stay as they were."""
    size = 8 * PAGE
    arena = relay.Arena(size)
    strike = attack(arena)
    assert arena.lend(pipe) == size
    if hop == "pipe":
        strike()
        got = read(pipe, size)
    elif hop == "pipe-pipe":
        with relay.Pipe() as other:
            assert relay.splice(pipe, other, size) == size
            strike()
            got = read(other, size)
    else:
        near, far = fds.unix_pair() if hop == "unix" else fds.tcp_pair()
        assert relay.splice(pipe, near, size, timeout=5) == size
        strike()
        got = receive_exactly(far, size)
    assert got == b"\x01" * size
    del strike
    arena.close()


def test_threads_that_write_while_it_is_lent_change_nothing_afterwards(pipe: relay.Pipe) -> None:
    """With threads storing to the memory all the time, what is in the pipe does not change after the lend."""
    size = 64 * PAGE
    arena = relay.Arena(size)
    array = arena.empty(size)
    raw = (ctypes.c_char * size).from_address(array.ctypes.data)
    del array
    stop = threading.Event()

    def scribble(seed: int) -> None:
        pattern = bytes([seed]) * size
        while not stop.is_set():
            ctypes.memmove(raw, pattern, size)  # without Python's lock

    threads = [threading.Thread(target=scribble, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        with relay.Pipe() as copy:
            for _ in range(200):
                if not arena.waiting:
                    arena.view(size).release()
                assert arena.lend(pipe) == size
                assert relay.tee(pipe, copy, size) == size
                first = read(copy, size)
                assert read(pipe, size) == first
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    arena.close()


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


@pytest.mark.parametrize("who", ["child", "parent"])
def test_a_fork_changes_nothing_that_was_lent(who: str, pipe: relay.Pipe) -> None:
    """A child that inherited a writable view, and a parent that lends, cannot write to each other's lends."""
    size = 8 * PAGE
    arena = relay.Arena(size)
    view = arena.view(size)
    view[:] = b"\x01" * size
    go, went = os.pipe(), os.pipe()

    def child() -> None:
        os.read(go[0], 1)
        if who == "child":
            view[:] = b"\xff" * size
        else:
            view.release()
            assert arena.lend(pipe) == size
        os.write(went[1], b"x")

    with forked(child) as other:
        if who == "child":
            view.release()
            assert arena.lend(pipe) == size
        os.write(go[1], b"x")
        os.read(went[0], 1)
        other.answer()
        if who == "parent":
            view[:] = b"\xff" * size
        assert read(pipe, size) == b"\x01" * size
    view.release()
    arena.close()
    for fd in (*go, *went):
        os.close(fd)


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


class _Refusing:
    """The C core with one call that answers an errno."""

    def __init__(self, call: str, code: int) -> None:
        self.ffi = core.ffi
        self.lib = self
        self._call, self._code = call, code

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: -self._code) if name == self._call else getattr(core.lib, name)


def test_locked_memory_is_lent_as_well(pipe: relay.Pipe) -> None:
    """Memory that mlockall keeps in place can be lent and replaced all the same."""

    def child() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(2):  # MCL_FUTURE
            return -ctypes.get_errno()
        arena = relay.Arena(4 * PAGE)
        arena.empty(4 * PAGE)[:] = 3
        arena.lend(pipe)
        arena.empty(4 * PAGE)[:] = 9
        return int(read(pipe, 4 * PAGE) == b"\x03" * 4 * PAGE)

    with forked(child) as other:
        answer = other.answer()
    if answer == -errno.EPERM or answer == -errno.ENOMEM:
        pytest.skip("locking memory is not permitted here: raise ulimit -l")
    assert answer == 1
