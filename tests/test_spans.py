"""Files fed out of a ring: their threads are handed spans of it, which nobody writes over before they come back."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from descriptors import Descriptors
from peers import PATIENCE, assert_same, connected, eventually, payload, read_all, send_all
from relays import Relay

from relay.kernel import core
from relay.kernel.ring import Pool, Reader, Ring

MIB = 1 << 20
EVENTS = 64


class Thread:
    """The thread's side of a ferry, by hand: it takes and gives back when it is told to."""

    def __init__(self, fds: Descriptors, data: bytes) -> None:
        self.knock, self.answer = (fds.keep(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2))
        self.c = core.new("ferry", fd=-1, method=core.SPLICE, knock=self.knock, answer=self.answer)
        self.end = core.new_end(kind=core.FERRY)
        self.end.ferry = self.c
        self.reader = Reader(self.end, 1.0)
        self.reader.c.stays, self.reader.c.ferry = 1, self.c
        self.done = 0
        self._data = data

    @property
    def has(self) -> bool:
        """Whether it was handed anything."""
        return bool(self.c.turn[self.c.away] == core.lib.RELAY_WITH_THREAD)

    def give_back(self) -> None:
        """Looks at what it was handed first of all, however long ago that was."""
        load = int(core.lib.relay_ferry_wait(self.c))
        span = bytes(core.ffi.buffer(self.c.span[self.c.away], load))
        assert_same(span, self._data[self.done : self.done + load])
        self.done += load
        core.lib.relay_ferry_give_back(self.c)

    def answered(self) -> bool:
        """Whether it told the engine since the last look."""
        try:
            os.eventfd_read(self.answer)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize("seed", range(30))
def test_a_span_stays_as_it_was_until_it_comes_back(fds: Descriptors, seed: int) -> None:
    """By random schedules: every thread finds its bytes in order and unchanged, a sink beside them gets all, and each
    step is taken because something woke the pump for it."""
    chance = random.Random(seed)
    data = chance.randbytes(300_000)
    source, beside = fds.pipe(), fds.pipe()
    ring = Ring(28_672, 0, 1, 4096)
    threads = [Thread(fds, data) for _ in range(chance.choice([1, 2, 3]))]
    other = core.new_end(beside.w)
    other.writable = 1
    engine = core.new("engine", epoll=-1, budget=1 << 20)
    node = core.new("node", pipe_r=-1, pipe_w=-1, left=-1, align=1)
    end = core.new_end(source.r, core.POLLED, core.COPY)
    end.readable = 1
    pipeline = core.new("pipeline", head=node, nodes=1, source=end, ring=ring.c)
    batch = chance.choice([0, 8192])
    ring.c.batch, ring.c.hold_ns, ring.c.quick, ring.c.least, ring.c.need = batch, 100_000, 1, 1, 1
    reader = Reader(other, 1.0)
    reader.c.stays = 1
    for each in [*(thread.reader for thread in threads), reader]:
        ring.join(each)
    out = core.ffi.new("struct relay_event[]", EVENTS)
    got = bytearray()
    given = steps = 0
    woken = True
    while True:
        steps += 1
        assert steps < 200_000, "nothing wakes the pump any more"
        if woken or pipeline.queued or pipeline.wake_ns:
            pipeline.queued = 0
            engine.ready_first = engine.ready_last = core.ffi.NULL
            core.lib.relay_sweep(engine, pipeline, out, EVENTS)
            woken = False
        what = chance.randrange(4)
        if what == 0 and given < len(data):
            piece = data[given : given + chance.choice([1, 700, 9000, 40_000])]
            try:
                given += os.write(source.w, piece)
                end.readable, woken = 1, True
            except BlockingIOError:
                pass
            if given == len(data):
                fds.close(source.w)
                end.readable, woken = 1, True
        elif what == 1:
            thread = chance.choice(threads)
            if thread.has:
                thread.give_back()
            woken |= thread.answered()
        elif what == 2:
            piece = os.read(beside.r, 5000) if select.select([beside.r], [], [], 0)[0] else b""
            got += piece
            if piece:
                other.writable, woken = 1, True
        if all(thread.done == len(data) for thread in threads) and len(got) == len(data):
            break
    assert_same(got, data)
    assert all(thread.reader.c.done for thread in threads)
    ring.close()


def test_a_ring_that_threads_still_read_is_nobody_elses() -> None:
    """Memory comes back to the pool when the last thread that has a part of it has ended, not when its ring closes."""

    class Borrower:
        c = None

        def __init__(self) -> None:
            self.actions: list[Any] = []

        def afterwards(self, action: Any) -> None:
            self.actions.append(action)

    pool = Pool()
    ring = Ring.pooled(pool, 0, 0)
    assert ring is not None
    first, second = Borrower(), Borrower()
    ring.close([first, second])
    taken = [pool.take() for _ in range(7)]
    assert None not in taken
    assert pool.take() is None, "the eighth is with the threads"
    first.actions.pop()()
    assert pool.take() is None
    second.actions.pop()()
    assert pool.take() is not None
    pool.close()


def files(folder: Path, count: int, **more: Any) -> dict[str, Any]:
    """From a listening source to so many files."""
    stages = [{"tee": {"to": f"file://{folder}/f{number}"}} for number in range(1, count)]
    return {"source": "tcp://127.0.0.1:0", "stages": stages, "sink": f"file://{folder}/f0", **more}


@pytest.mark.parametrize("method", ["auto", "zero-copy", "copy"])
@pytest.mark.parametrize("size", [0, 1, 700_001, 9 * MIB + 13])
def test_several_files_get_all_and_the_record_says_how(tmp_path: Path, method: str, size: int) -> None:
    """Out of one read into memory, unless references are asked for: every file is whole, and so the record says."""
    data = payload(size, size)
    with Relay(files(tmp_path, 3, method=method)) as relay, connected(relay.bound[-1]) as source:
        chance = random.Random(size)
        view = memoryview(data)
        while view:
            cut = chance.choice([1, 1000, 65_536, MIB])
            send_all(source, bytes(view[:cut]))
            view = view[cut:]
        source.shutdown(socket.SHUT_WR)
        record = relay.wait()
    assert record is not None
    assert record.result == "delivered"
    for number in range(3):
        assert_same((tmp_path / f"f{number}").read_bytes(), data)
    way = "splice" if method == "zero-copy" else "copy"
    assert [sink.method for sink in record.sinks] == [way] * 3
    assert record.method == way
    assert [sink.bytes for sink in record.sinks] == [size] * 3


def test_a_file_that_is_given_up_gets_the_beginning_unchanged(tmp_path: Path) -> None:
    """Its thread hangs with what it was handed: others go on, and what it writes in the end is the stream's start."""
    os.mkfifo(tmp_path / "stuck")  # nobody reads it, so opening it takes until somebody does
    config = files(tmp_path, 2)
    config["stages"].append(
        {"tee": {"to": f"file://{tmp_path}/stuck", "on_slow": {"policy": "disconnect", "after": "50ms"}}}
    )
    data = payload(5, 24 * MIB)
    got = bytearray()
    with Relay(config) as relay, connected(relay.bound[-1]) as source:
        send_all(source, data)
        source.shutdown(socket.SHUT_WR)
        eventually(lambda: (tmp_path / "f0").exists() and (tmp_path / "f1").exists(), "the others are whole")
        with os.fdopen(os.open(tmp_path / "stuck", os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stuck:
            eventually(lambda: select.select([stuck], [], [], 0.1)[0], "the thread has opened it")
            os.set_blocking(stuck.fileno(), True)
            reading = threading.Thread(target=lambda: got.extend(read_all(stuck.fileno())))
            reading.start()
            reading.join(PATIENCE)
        record = relay.wait()
    assert record is not None
    stuck_record = {sink.sink: sink for sink in record.sinks}[str(tmp_path / "stuck")]
    assert stuck_record.bytes == len(got)
    assert stuck_record.bytes + stuck_record.dropped == len(data)
    for number in range(2):
        assert_same((tmp_path / f"f{number}").read_bytes(), data)
    assert 0 < len(got) < len(data)
    assert_same(bytes(got), data[: len(got)])
