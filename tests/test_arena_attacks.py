"""Memory that is lent: whatever a program does in Python afterwards, the reader's bytes are those at the lend."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from descriptors import Descriptors
from forked import forked
from peers import receive_exactly
from piped import read

import relay

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE


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
