"""Facts about pages that cross from one process to another: which ways share them and which copy.

Memory is lent into a pipe, taken on in one of the ways there are, and then changed. What was shared shows the change,
what was copied does not. docs/memory.md is the answer that these experiments give.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket

import pytest
from descriptors import Descriptors, PipeEnds
from forked import forked
from peers import receive_exactly
from syscalls import NONBLOCK, Memory, vmsplice

import relay

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE


def can_lend() -> str:
    """Why memory cannot be lent here, or nothing."""
    with relay.Pipe() as pipe, relay.Arena(b"x") as arena:
        try:
            arena.lend(pipe, copy=False)
        except OSError as error:
            return f"vmsplice is refused here: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(can_lend()), reason=can_lend())


def lent(fds: Descriptors, memory: Memory) -> PipeEnds:
    """A pipe with references to all of `memory`, filled with `a`."""
    pipe = fds.pipe(1 << 20)
    memory[:] = b"a" * SIZE
    assert vmsplice(pipe.w, [memory.span()]) == SIZE
    return pipe


def test_lending_shares_up_to_the_pipe(fds: Descriptors) -> None:
    """In the pipe itself, and in whatever it is teed or spliced to, the pages are the lender's own."""
    with Memory(8) as memory:
        pipe, other, third = lent(fds, memory), fds.pipe(1 << 20), fds.pipe(1 << 20)
        assert relay.tee(pipe.r, other.w, SIZE) == SIZE
        assert os.splice(pipe.r, third.w, SIZE) == SIZE
        memory[:] = b"b" * SIZE
        assert os.read(other.r, SIZE) == os.read(third.r, SIZE) == b"b" * SIZE


def test_read_copies(fds: Descriptors) -> None:
    """read() into page-aligned memory of another process copies: the change comes too late."""
    with Memory(8, shared=True) as memory:  # private pages would part at the fork
        pipe = lent(fds, memory)
        go = fds.pipe(blocking=True)

        def reader() -> str:
            with Memory(8) as mine:
                assert os.readv(pipe.r, [mine]) == SIZE
                os.write(told.w, b"x")
                os.read(go.r, 1)
                return chr(mine[0])

        told = fds.pipe(blocking=True)
        with forked(reader) as child:
            os.read(told.r, 1)
            memory[:] = b"b" * SIZE
            os.write(go.w, b"x")
            assert child.answer() == "a"


def test_reverse_vmsplice_copies(fds: Descriptors) -> None:
    """vmsplice on the reading end fills user memory with copies, whatever its name says."""
    with Memory(8) as memory, Memory(8) as mine:
        pipe = lent(fds, memory)
        assert vmsplice(pipe.r, [mine.span()], NONBLOCK) == SIZE
        memory[:] = b"b" * SIZE
        assert mine[:] == b"a" * SIZE


def test_a_pipe_cannot_be_mapped(fds: Descriptors) -> None:
    """mmap of a pipe is ENODEV: its pages have no addresses to be had."""
    pipe = fds.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    assert libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, pipe.r, 0) == ctypes.c_void_p(-1).value
    assert ctypes.get_errno() == errno.ENODEV


def test_splice_into_a_mapped_memfd_copies(fds: Descriptors) -> None:
    """splice moves pages into a pipe, not into a file: a mapped memfd gets copies, with SPLICE_F_MOVE as well."""
    for flags in (0, 1):  # SPLICE_F_MOVE
        with Memory(8) as memory:
            pipe = lent(fds, memory)
            file = fds.memfd(bytes(SIZE))
            mapped = mmap.mmap(file, SIZE)
            assert os.splice(pipe.r, file, SIZE, flags=flags) == SIZE
            memory[:] = b"b" * SIZE
            assert mapped[:] == b"a" * SIZE
            mapped.close()


def test_process_vm_readv_copies() -> None:
    """Reading another process's memory by its address copies it too."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Memory(8) as memory, Memory(8) as mine:
        memory[:] = b"a" * SIZE

        class Piece(ctypes.Structure):
            _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

        near, far = Piece(*mine.span()), Piece(*memory.span())
        got = libc.process_vm_readv(os.getpid(), ctypes.byref(near), 1, ctypes.byref(far), 1, 0)
        if got < 0:
            pytest.skip(f"process_vm_readv is refused here: {os.strerror(ctypes.get_errno())}")
        assert got == SIZE
        memory[:] = b"b" * SIZE
        assert mine[:] == b"a" * SIZE


def test_a_pipe_that_is_passed_takes_the_pages_along(fds: Descriptors) -> None:
    """A pipe handed over a socket still refers to the lender's pages: shared until somebody reads them."""
    near, far = fds.unix_pair()
    with Memory(8) as memory:
        pipe = lent(fds, memory)
        socket.send_fds(near, [b"x"], [pipe.r])
        _, (received,), *_ = socket.recv_fds(far, 1, 1)
        fds.keep(received)
        memory[:] = b"b" * SIZE
        assert os.read(received, SIZE) == b"b" * SIZE


@pytest.mark.parametrize("how", ["passed", "inherited"])
def test_a_memfd_is_shared_for_good(fds: Descriptors, how: str) -> None:
    """A memfd that another process maps is the same memory, however often it changes: no way is shorter."""
    file = fds.memfd(b"a" * SIZE)
    mine = mmap.mmap(file, SIZE)
    near, far = fds.unix_pair(blocking=True)
    go = fds.pipe(blocking=True)

    def reader() -> str:
        number = file
        if how == "passed":
            _, (number,), *_ = socket.recv_fds(far, 1, 1)
        theirs = mmap.mmap(number, SIZE, prot=mmap.PROT_READ)
        found = ""
        for _ in range(3):
            os.read(go.r, 1)
            found += chr(theirs[SIZE - 1])
            far.send(b"x")
        return found

    with forked(reader) as child:
        socket.send_fds(near, [b"x"], [file] if how == "passed" else [])
        for letter in b"abc":
            mine[:] = bytes([letter]) * SIZE
            os.write(go.w, b"x")
            near.recv(1)
        assert child.answer() == "abc"
    mine.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_sockets_on_one_machine_share_until_they_are_received(fds: Descriptors, kind: str) -> None:
    """Spliced into a socket the pages stay the lender's, in the receiver's queue too; receiving copies."""
    with Memory(8) as memory:
        pipe = lent(fds, memory)
        near, far = fds.unix_pair() if kind == "unix" else fds.tcp_pair()
        assert relay.splice(pipe.r, near, SIZE, timeout=5) == SIZE
        memory[:] = b"b" * SIZE
        got = receive_exactly(far, SIZE)
        memory[:] = b"c" * SIZE
        assert got == b"b" * SIZE
