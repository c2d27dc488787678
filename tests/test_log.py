"""The log: a row of segments with cursors, in memory and on disk; its bounds, a writer and readers at once."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import eventually, payload
from segments import SEGMENT, closed_at_the_end, fill, read, segments

from relay.errors import KernelError
from relay.log.log import RESERVE, Cursor, Log
from relay.log.segment import segment_size


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where a log is kept: None is in memory."""
    return tmp_path / "log" if request.param == "disk" else None


@pytest.fixture
def logs() -> Iterator[list[Log]]:
    """Logs that are closed, and kept, when the test ends."""
    with closed_at_the_end() as made:
        yield made


# --- segments and cursors ---------------------------------------------------------------------------------


def test_what_is_appended_is_read_across_segments(place: Path | None, logs: list[Log]) -> None:
    """Bytes come back as they were written, from any position, whatever segments they fell into."""
    data = payload(1, 10 * SEGMENT + 17)
    logs.append(log := Log(place, segment=SEGMENT))
    log.cursor()
    fill(log, data)
    assert (log.start, log.end) == (0, len(data))
    for position in (0, 1, SEGMENT - 1, SEGMENT, 5 * SEGMENT + 3, len(data)):
        assert read(log, position) == data[position:]


def test_a_segment_goes_when_every_cursor_has_passed_it(place: Path | None, logs: list[Log]) -> None:
    """The slowest reader keeps the row; a reader that leaves keeps nothing; the last segment stays."""
    logs.append(log := Log(place, segment=SEGMENT))
    slow, fast = log.cursor(), log.cursor()
    fill(log, payload(2, 5 * SEGMENT))
    fast.advance(5 * SEGMENT)
    assert log.start == 0
    slow.advance(2 * SEGMENT - 1)
    assert log.start == SEGMENT
    slow.advance(2 * SEGMENT)
    assert log.start == 2 * SEGMENT
    assert log.backlog() == 3 * SEGMENT
    slow.close()
    fast.advance(5 * SEGMENT)
    fill(log, b"x")
    fast.advance(5 * SEGMENT + 1)
    assert log.backlog() == 0
    assert log.start == 5 * SEGMENT
    if place:
        assert segments(place) == [f"{5 * SEGMENT:020d}"]


def test_a_cursor_never_goes_back(logs: list[Log]) -> None:
    """A position that was passed stays passed."""
    logs.append(log := Log(segment=SEGMENT))
    cursor = log.cursor()
    fill(log, payload(3, 3 * SEGMENT))
    cursor.advance(2 * SEGMENT)
    cursor.advance(SEGMENT)
    assert cursor.position == 2 * SEGMENT


def test_a_position_that_is_gone_is_said(logs: list[Log]) -> None:
    """Reading before the first segment names where the log begins."""
    logs.append(log := Log(segment=SEGMENT))
    cursor = log.cursor()
    fill(log, payload(3, 3 * SEGMENT))
    cursor.advance(2 * SEGMENT)
    with pytest.raises(KernelError, match="begins at 8192"):
        log.extent(0)


def test_a_descriptor_outlives_its_segment(place: Path | None, logs: list[Log]) -> None:
    """A reader that still has a segment open reads it after it was unlinked: nothing is cut or punched."""
    data = payload(4, 2 * SEGMENT)
    logs.append(log := Log(place, segment=SEGMENT))
    cursor = log.cursor()
    fill(log, data + b"x")
    fd = log.open_segment(0)
    cursor.advance(2 * SEGMENT)
    assert log.start == 2 * SEGMENT
    assert os.pread(fd, SEGMENT, 0) == data[:SEGMENT]
    os.close(fd)


# --- bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 7, 4096, 70000, 1 << 20, 64 << 20, 10 << 30])
def test_a_bound_has_at_least_two_segments(largest: int) -> None:
    """However small or large the bound, a segment fits twice, and in memory few are open."""
    for in_memory in (True, False):
        size = segment_size(largest, in_memory=in_memory)
        assert size >= 1
        assert largest == 1 or 2 * size <= largest
        assert not in_memory or largest < 1 << 20 or largest // size <= 8


@pytest.mark.parametrize("largest", [1, 3, 1000, 64 << 10, 1 << 20])
def test_no_more_is_kept_than_the_bound(place: Path | None, logs: list[Log], largest: int) -> None:
    """A reader that is one byte behind the room it made never finds more kept, and the writer always goes on."""
    data = payload(5, 4 * largest + 5)
    logs.append(log := Log(place, largest=largest))
    cursor, got, written = log.cursor(), bytearray(), 0
    while len(got) < len(data):
        room = log.room()
        if room and written < len(data):
            written += (count := os.write(log.tail(), data[written : written + room]))
            log.appended(count)
            assert log.end - log.start <= largest
            continue
        piece = read(log, cursor.position, max(1, largest // 3))
        assert piece, "there is neither room nor anything to read"
        got += piece
        cursor.advance(cursor.position + len(piece))
    assert bytes(got) == data


def test_the_writer_waits_for_room_and_is_woken(logs: list[Log]) -> None:
    """A full log holds its writer until a segment was passed; one that drains, until all was."""
    for drain in (False, True):
        logs.append(log := Log(largest=2 * SEGMENT, segment=SEGMENT))
        cursor = log.cursor()
        fill(log, payload(6, 2 * SEGMENT))
        found: list[int] = []
        writer = threading.Thread(
            target=lambda log=log, drain=drain, found=found: found.append(
                log.wait_for_room(lambda: False, drain=drain, timeout=30)
            )
        )
        writer.start()
        if drain:
            eventually(lambda log=log: log._was_full, "the writer found it full")
        cursor.advance(SEGMENT)
        if drain:
            assert not found
            cursor.advance(2 * SEGMENT)
        writer.join(10)
        assert found == [SEGMENT]


def test_a_writer_that_is_stopped_waits_for_nobody(logs: list[Log]) -> None:
    """Stopped, it may write what it has in its hands, even beyond the bound."""
    logs.append(log := Log(largest=2 * SEGMENT, segment=SEGMENT))
    log.cursor()
    fill(log, payload(6, 2 * SEGMENT))
    assert log.wait_for_room(lambda: True) == SEGMENT


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own with 4 MiB more than what a log leaves free."""
    with disks.small_disk(tmp_path / "disk", RESERVE + (4 << 20)) as place:
        yield place


def test_a_log_leaves_the_disk_some_space(small_disk: Path, logs: list[Log]) -> None:
    """Room ends before the filesystem is full, and comes back when somebody makes space."""
    logs.append(log := Log(small_disk / "log"))
    log.cursor()
    assert 0 < log.room() <= 4 << 20
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(5 << 20))
    assert log.room() == 0
    ballast.unlink()
    assert log.room() > 3 << 20
    assert os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize >= RESERVE


# --- a writer and readers at once -------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 30),
    size=st.integers(1, 40 * SEGMENT),
    readers=st.integers(1, 3),
    largest=st.sampled_from([0, 2 * SEGMENT, 8 * SEGMENT]),
    on_disk=st.booleans(),
)
def test_readers_get_what_the_writer_wrote(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, readers: int, largest: int, on_disk: bool
) -> None:
    """Whatever the order of their steps: the bytes are the same, and none is gone before every cursor passed it."""
    data = payload(seed, size)
    path = tmp_path_factory.mktemp("log") / "log" if on_disk else None
    log = Log(path, largest=largest, segment=SEGMENT)
    cursors = [log.cursor() for _ in range(readers)]
    got: list[bytes] = [b""] * readers
    wrong: list[str] = []
    more = threading.Condition()

    def told() -> None:
        with more:
            more.notify_all()

    log.on_append = told

    def write() -> None:
        chance, written = random.Random(seed), 0
        while written < size:
            room = log.wait_for_room(lambda: bool(wrong), timeout=5)
            if not room:
                return
            piece = data[written : written + min(room, chance.randrange(1, 3 * SEGMENT))]
            count = os.write(log.tail(), piece)
            written += count
            log.appended(count)

    def take(number: int, cursor: Cursor) -> None:
        chance, pieces = random.Random(seed + number + 1), []
        try:
            while cursor.position < size:
                piece = read(log, cursor.position, chance.randrange(1, 2 * SEGMENT))
                if not piece:
                    with more:
                        if log.end == cursor.position:
                            more.wait(5)
                    continue
                pieces.append(piece)
                slowest = min(each.position for each in cursors)
                if log.start > slowest:
                    wrong.append(f"{log.start} is past {slowest}")
                cursor.advance(cursor.position + len(piece))
        except Exception as error:
            wrong.append(repr(error))
        got[number] = b"".join(pieces)

    threads = [threading.Thread(target=write)]
    threads += [threading.Thread(target=take, args=(n, cursor)) for n, cursor in enumerate(cursors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    log.close()
    assert not wrong
    assert all(piece == data for piece in got)
