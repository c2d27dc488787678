"""A stream of blocks through shared memory: order, back-pressure, and who may write when."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import socket
import threading
from random import Random
from typing import Any

import pytest
from forked import forked
from leaks import descriptors
from peers import eventually
from shares import stream, take

from relay.errors import RelayBug
from relay.sharing.sink import ShareSink
from relay.sharing.source import ShareSource

numpy = pytest.importorskip("numpy", reason="numpy is missing: pip install -e '.[test]'")

PAGE = mmap.PAGESIZE


def test_ten_thousand_blocks_arrive_as_they_were_sent() -> None:
    """10,000 blocks of random sizes through two small slots to a slow process: all identical, in order."""
    near, far = socket.socketpair()
    random = Random(11)
    blocks = 10_000

    def child() -> list[Any]:
        near.close()
        digest, count, slow = hashlib.sha256(), 0, Random(3)
        with ShareSource(far) as source:
            for block in source:
                with block.view() as view:
                    if not slow.randrange(50):
                        ctypes.CDLL(None).sched_yield()
                        hashlib.sha256(bytes(200_000)).digest()  # behind now and then
                    digest.update(view)
                count += 1
        return [count, digest.hexdigest()]

    with forked(child) as other:
        far.close()
        digest = hashlib.sha256()
        pool = random.randbytes(1 << 17)
        most = 0
        with ShareSink(near, slots=2, slot_size=4 * PAGE) as sink:
            for _ in range(blocks):
                start = random.randrange(1 << 16)
                piece = pool[start : start + random.choice([0, 1, 100, PAGE, 3 * PAGE + 5, 4 * PAGE])]
                digest.update(piece)
                sink.send(piece)
                most = max(most, sink.under_way)
            sink.flush(timeout=30)
        assert other.answer() == [blocks, digest.hexdigest()]
        assert most == 2, "the sink never got ahead of the source: there was no back-pressure to test"


def test_arrays_keep_their_dtype_and_shape() -> None:
    """Every block tells its own dtype and shape, empty ones and booleans included."""
    arrays = [
        numpy.arange(6, dtype="f4").reshape(2, 3), numpy.zeros((0, 4)), numpy.array(True), numpy.array([1j]),
        numpy.array([[True, False]]), numpy.arange(10)[::-2],
    ]  # fmt: skip
    with stream(slots=3) as (sink, source):
        for array in arrays:
            sink.send(array)
            with take(source) as block:
                got = block.array()
                assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
                if got.size and got.dtype != bool:
                    assert not got.flags.writeable
                del got


def test_a_full_ring_holds_the_sender() -> None:
    """With every slot out a send waits, and says so when its time is up; nothing is sent then."""
    with stream(slots=2) as (sink, source):
        sink.send(b"one")
        sink.send(b"two")
        with pytest.raises(TimeoutError, match="no slot was given back"):
            sink.send(b"three", timeout=0.01)
        first, second = take(source), take(source)
        with pytest.raises(TimeoutError):
            sink.send(b"three", timeout=0)
        first.release()
        sink.send(b"four", timeout=5)
        third = take(source)
        assert (bytes(second.view()), bytes(third.view())) == (b"two", b"four")
        second.release()
        third.release()
        sink.flush(timeout=5)
        assert sink.under_way == 0


def test_a_slot_is_not_given_back_under_a_view() -> None:
    """release is a BufferError while an array or a slice of a view exists; the bytes stay; the sender waits."""
    with stream(slots=1) as (sink, source):
        sink.send(b"first")
        block = take(source)
        kept = block.array()[1:3]
        with pytest.raises(BufferError, match="drop them"):
            block.release()
        with pytest.raises(TimeoutError):
            sink.send(b"XXXXX", timeout=0.01)
        assert kept.tobytes() == b"ir"
        with pytest.raises(BufferError):
            source.close()
        del kept
        block.release()
        block.release()
        with pytest.raises(ValueError, match="given back"):
            block.view()
        sink.send(b"again", timeout=5)
        take(source).release()


def test_a_loop_that_keeps_an_array_is_told() -> None:
    """Iterating gives each block back; one that is still looked at stops the loop instead of changing."""
    with stream(slots=2) as (sink, source):
        sink.send(b"first")
        sink.send(b"second")
        kept = []
        with pytest.raises(BufferError, match="copy it"):
            kept.extend(block.array() for block in source)
        assert kept[0].tobytes() == b"first"
        kept.clear()


def test_a_dropped_block_comes_back_when_nobody_looks() -> None:
    """A block that was dropped with an array on it is given back once the array is gone, and not before."""
    with stream(slots=1) as (sink, source):
        sink.send(b"first")
        array = take(source).array()
        with pytest.raises(TimeoutError):
            source.receive(timeout=0)
        with pytest.raises(TimeoutError):
            sink.send(b"XXXXX", timeout=0.01)
        assert array.tobytes() == b"first"
        del array
        with pytest.raises(TimeoutError):
            source.receive(timeout=0)
        sink.send(b"again", timeout=5)
        take(source).release()


def test_made_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot filled as an array is sent at the end of its block; nothing is sent when the block fails."""
    with stream(slots=2) as (sink, source):
        with sink.slot((2, 3), "f4") as array:
            array[:] = 5
            del array
        with pytest.raises(ZeroDivisionError):
            with sink.slot(10) as array:
                array[:] = 1 // 0
        del array
        with sink.slot(3) as array:
            array[:] = 1
        assert take(source).array().tolist() == [[5, 5, 5], [5, 5, 5]]
        assert take(source).array().tolist() == [1, 1, 1]


def test_an_array_that_outlives_its_slot_is_cut_off() -> None:
    """What is written through an array after its block was sent, or through a raw pointer, reaches nobody."""
    with stream(slots=1) as (sink, source):
        for number in range(5):
            with sink.slot(2 * PAGE) as array:
                array[:] = number
                raw = (ctypes.c_char * 100).from_address(array.ctypes.data)
            array[:] = 255
            raw[:] = b"\xff" * 100
            with take(source) as block:
                assert set(bytes(block.view())) == {number}
            del array


def test_every_receiver_gets_every_block() -> None:
    """One sink, several receivers: each gets all from when it joined, and the slowest holds a slot."""
    pairs = [socket.socketpair() for _ in range(4)]
    sink = ShareSink(*(near for near, _ in pairs[:3]), slots=2)
    sources = [ShareSource(far) for _, far in pairs]
    sink.send(b"first")
    sink.join(pairs[3][0])
    assert sink.receivers == 4
    sink.send(b"second")
    blocks = [take(source) for source in sources[:3]]
    assert {bytes(block.view()) for block in blocks} == {b"first"}
    for block in blocks[:2]:
        block.release()
    with pytest.raises(TimeoutError):
        sink.send(b"third", timeout=0.01)
    blocks[2].release()
    sink.send(b"third", timeout=5)
    sink.close()
    assert [bytes(block.view()) for source in sources[:3] for block in source] == [b"second", b"third"] * 3
    assert [bytes(block.view()) for block in sources[3]] == [b"second", b"third"]
    for source in sources:
        source.close()


def test_a_receiver_that_leaves_with_a_slot_takes_the_ring_along() -> None:
    """What a receiver had when it left is never written again: it may still be looked at somewhere."""
    pairs = [socket.socketpair() for _ in range(2)]
    sink = ShareSink(*(near for near, _ in pairs), slots=2)
    source = ShareSource(pairs[0][1])
    leaver = ShareSource(pairs[1][1])
    sink.send(b"first")
    take(source).release()
    kept = take(leaver).view()
    pairs[1][1].close()  # behind the back of its source
    for number in range(6):
        sink.send(b"later%d" % number, timeout=5)
        with take(source) as block:
            assert bytes(block.view()) == b"later%d" % number
    assert bytes(kept) == b"first"
    assert sink.receivers == 1
    kept.release()
    sink.close()
    source.close()
    leaver.close()


def test_larger_blocks_make_larger_slots() -> None:
    """A block larger than the slots goes through a new ring; blocks of the old one stay readable until released."""
    with stream(slots=2, slot_size=PAGE) as (sink, source):
        sink.send(b"small")
        small = take(source)
        for size in (PAGE, PAGE + 1, 100_000, 1 << 20):
            sink.send(bytes([size % 251]) * size, timeout=5)
            with take(source) as block:
                assert bytes(block.view()) == bytes([size % 251]) * size
        assert bytes(small.view()) == b"small"
        small.release()
        sink.flush(timeout=5)


def test_a_steady_stream_maps_nothing() -> None:
    """After the first block neither end maps, opens or closes anything more."""
    with stream(slots=2) as (sink, source):
        sink.send(b"x" * 1000)
        take(source).release()
        before = (descriptors(), _mappings())
        for _ in range(200):
            sink.send(b"y" * 1000)
            take(source).release()
        assert (descriptors(), _mappings()) == before


def _mappings() -> int:
    with open("/proc/self/maps") as file:
        return sum("relay-slots" in line for line in file)


def test_the_end_is_told_from_a_break() -> None:
    """close ends the stream; a sender that vanishes or fails is a ConnectionResetError, never an end."""
    with stream() as (sink, source):
        sink.send(b"x")
        sink.close()
        assert [bytes(block.view()) for block in source] == [b"x"]
        assert source.receive() is None
    with stream() as (sink, source):
        sink.send(b"x")
        with pytest.raises(TypeError), sink:
            sink.send("text")  # type: ignore[arg-type]
        take(source).release()
        with pytest.raises(ConnectionResetError):
            source.receive(timeout=5)


def test_a_sender_without_receivers_is_told() -> None:
    """When the last receiver is gone a send is a BrokenPipeError, a waiting one too."""
    with stream(slots=1) as (sink, source):
        sink.send(b"x")
        thread = threading.Thread(target=source.close)
        thread.start()
        with pytest.raises(BrokenPipeError):
            sink.send(b"y", timeout=10)
        thread.join()


def test_a_forked_sink_is_refused() -> None:
    """A child that inherited a sink cannot use it: both would write to the same slots."""
    with stream() as (sink, _source):
        sink.send(b"x")

        def child() -> str:
            try:
                sink.send(b"y")
            except RelayBug as error:
                return str(error)
            return "sent"

        with forked(child) as other:
            assert "forked" in other.answer()


def test_nothing_is_left_open() -> None:
    """Sinks and sources that were closed, or dropped, leave no descriptor and no mapping."""
    before = descriptors()
    for _ in range(20):
        with stream(slots=8) as (sink, source):
            sink.send(b"x" * 10_000)
            take(source).release()
    near, far = socket.socketpair()
    sink, source = ShareSink(near), ShareSource(far)
    sink.send(b"x")
    del sink, source, near, far
    eventually(lambda: descriptors() == before, "all descriptors closed")
    assert _mappings() == 0
