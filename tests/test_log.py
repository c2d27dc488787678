"""The log: a row of segments with cursors, in memory and on disk, and what an earlier run left of one."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import eventually, payload, program

from relay.errors import KernelError, SinkError
from relay.log import RESERVE, Cursor, Log, segment_size
from relay.spill.directory import SpillDirectory

SEGMENT = 4096


def fill(log: Log, data: bytes) -> None:
    """Appends all of `data`, as the writer does; fails where there is no room."""
    view = memoryview(data)
    while view:
        room = log.room()
        assert room, "there is no room"
        count = os.write(log.tail(), view[:room])
        log.appended(count)
        view = view[count:]


def read(log: Log, position: int, most: int = 1 << 30) -> bytes:
    """What the log has from `position` on, up to `most` bytes, as a reader finds it."""
    got = bytearray()
    while len(got) < most:
        start, available = log.extent(position + len(got))
        if not available:
            break
        fd = log.open_segment(start)
        got += os.pread(fd, min(available, most - len(got)), position + len(got) - start)
        os.close(fd)
    return bytes(got)


def segments(directory: Path) -> list[str]:
    """The names of the segments in a log's directory."""
    return sorted(path.name for path in directory.iterdir() if path.name.isdigit())


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where a log is kept: None is in memory."""
    return tmp_path / "log" if request.param == "disk" else None


@pytest.fixture
def logs() -> Iterator[list[Log]]:
    """Logs that are closed, and kept, when the test ends."""
    made: list[Log] = []
    yield made
    for log in made:
        log.close(keep=True)


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
    if os.geteuid():
        pytest.skip("mounting a small filesystem needs root")
    path = tmp_path / "disk"
    path.mkdir()
    size = RESERVE + (4 << 20)
    done = subprocess.run([program("mount"), "-t", "tmpfs", "-o", f"size={size}", "none", path], check=False)
    if done.returncode:
        pytest.skip("mount is not allowed here")
    yield path
    subprocess.run([program("umount"), path], check=True)


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


# --- what an earlier run left -----------------------------------------------------------------------------


def left_behind(path: Path, data: bytes, acknowledged: int = 0) -> None:
    """A log as a relay that was killed leaves it."""
    log = Log(path, segment=SEGMENT)
    cursor = log.cursor()
    fill(log, data)
    log.acknowledged_word()[0] = acknowledged
    cursor.advance(acknowledged)
    log.close(keep=True)


def test_a_log_goes_on_where_it_was_left(tmp_path: Path, logs: list[Log]) -> None:
    """What was appended is there, the reader stands where it had acknowledged, new bytes come behind."""
    data = payload(7, 6 * SEGMENT + 100)
    left_behind(tmp_path / "log", data[: 5 * SEGMENT + 50], SEGMENT + 9)
    logs.append(log := Log(tmp_path / "log", segment=SEGMENT))
    cursor = log.cursor()
    assert (cursor.position, log.start, log.end) == (SEGMENT + 9, SEGMENT, 5 * SEGMENT + 50)
    fill(log, data[log.end :])
    assert read(log, cursor.position) == data[SEGMENT + 9 :]


def test_an_empty_last_segment_is_no_damage(tmp_path: Path, logs: list[Log]) -> None:
    """Killed just after a segment was begun: the row ends there."""
    left_behind(tmp_path / "log", payload(8, 2 * SEGMENT))
    (tmp_path / "log" / f"{2 * SEGMENT:020d}").touch()
    logs.append(log := Log(tmp_path / "log", segment=SEGMENT))
    assert log.end == 2 * SEGMENT
    fill(log, b"more")
    assert read(log, 2 * SEGMENT) == b"more"


def test_a_torn_tail_heals(tmp_path: Path, logs: list[Log]) -> None:
    """Whatever prefix of the last write is in the file is in the log, and the next byte comes behind it."""
    data = payload(9, 2 * SEGMENT)
    left_behind(tmp_path / "log", data)
    with (tmp_path / "log" / f"{SEGMENT:020d}").open("r+b") as last:
        last.truncate(1234)
    logs.append(log := Log(tmp_path / "log", segment=SEGMENT))
    fill(log, b"on")
    assert read(log, 0) == data[: SEGMENT + 1234] + b"on"


def test_a_cursor_beyond_the_end_is_moved_into_it(tmp_path: Path, logs: list[Log]) -> None:
    """A power cut may keep the cursor's page and lose a segment's: the reader stands at the end."""
    left_behind(tmp_path / "log", payload(9, SEGMENT), SEGMENT)
    os.truncate(tmp_path / "log" / f"{0:020d}", 100)
    logs.append(log := Log(tmp_path / "log", segment=SEGMENT))
    assert log.cursor().position == log.end == 100


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_segment_is_refused_and_named(tmp_path: Path, gone: int) -> None:
    """Bytes that are not there are not skipped: the log says which, and what to do. Nothing is touched."""
    left_behind(tmp_path / "log", payload(10, 4 * SEGMENT))
    (tmp_path / "log" / f"{gone * SEGMENT:020d}").unlink()
    before = segments(tmp_path / "log")
    with pytest.raises(
        SinkError, match=f"begins at {(gone + 1) * SEGMENT}.*move the directory away"
    ) as caught:
        Log(tmp_path / "log", segment=SEGMENT)
    assert str(tmp_path / "log") in str(caught.value)
    assert segments(tmp_path / "log") == before


def test_a_changed_segment_is_refused(tmp_path: Path) -> None:
    """A segment that somebody made longer does not fit its row."""
    left_behind(tmp_path / "log", payload(10, 3 * SEGMENT))
    with (tmp_path / "log" / f"{SEGMENT:020d}").open("ab") as middle:
        middle.write(b"!")
    with pytest.raises(SinkError, match="segment 4096 ends at 8193, the next begins at 8192"):
        Log(tmp_path / "log", segment=SEGMENT)


def test_a_foreign_cursor_is_refused(tmp_path: Path) -> None:
    """A file that relay did not write is not overwritten."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "cursor").write_bytes(b"my notes" * 1000)
    with pytest.raises(SinkError, match="none of relay's"):
        Log(tmp_path / "log")
    assert (tmp_path / "log" / "cursor").read_bytes() == b"my notes" * 1000


def test_a_lost_cursor_gives_everything_again(tmp_path: Path, logs: list[Log]) -> None:
    """Without its cursor a log begins with the first byte kept: at least once, never skipped."""
    data = payload(11, 3 * SEGMENT)
    left_behind(tmp_path / "log", data, SEGMENT + 1)
    (tmp_path / "log" / "cursor").unlink()
    logs.append(log := Log(tmp_path / "log", segment=SEGMENT))
    assert log.cursor().position == SEGMENT
    assert log.ended_at is None


def test_foreign_files_are_ignored_and_stay(tmp_path: Path) -> None:
    """Other names in a log's directory are nobody's business, also when the log is removed."""
    left_behind(tmp_path / "log", b"abc")
    for name in ("README", "0000", f"{SEGMENT:020d}.bak"):
        (tmp_path / "log" / name).write_text("mine")
    (tmp_path / "log" / f"{SEGMENT:020d}").mkdir()
    log = Log(tmp_path / "log", segment=SEGMENT)
    assert read(log, 0) == b"abc"
    log.close()
    left = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert left == ["0000", f"{SEGMENT:020d}", f"{SEGMENT:020d}.bak", "README"]


def test_the_end_of_a_stream_is_kept(tmp_path: Path, logs: list[Log]) -> None:
    """A stream that was whole is whole after a restart; bytes of another behind it take that back."""
    log = Log(tmp_path / "log", segment=SEGMENT)
    fill(log, b"whole")
    assert log.ended_at is None
    log.end_stream()
    log.close(keep=True)
    logs.append(log := Log(tmp_path / "log", segment=SEGMENT))
    assert log.ended_at == log.end == 5
    log.go_on()
    assert log.ended_at is None
    assert log.acknowledged == 0


def test_a_closed_log_is_gone_unless_kept(tmp_path: Path) -> None:
    """Closing removes every segment, the cursor and the directory."""
    log = Log(tmp_path / "log", segment=SEGMENT)
    log.cursor()
    fill(log, payload(1, 3 * SEGMENT))
    log.close()
    log.close()
    assert not (tmp_path / "log").exists()


def test_starting_opens_no_more_for_a_large_log(tmp_path: Path) -> None:
    """A log of 2 GiB is opened with the calls of one of 2 KiB: nothing of it is read, and one file is opened."""
    code = "import sys; from pathlib import Path; from relay.log import Log; Log(Path(sys.argv[1])).close(keep=True)"
    counts = []
    for size in (2 << 10, 2 << 30):
        path = tmp_path / str(size)
        Log(path).close(keep=True)
        os.truncate(path / f"{0:020d}", size)
        trace = tmp_path / "trace"
        subprocess.run(
            [program("strace"), "-f", "-o", trace, "-e", "trace=openat,read,pread64,mmap", "-P", path, "-P",
             path / f"{0:020d}", "-P", path / f"{size:020d}", "-P", path / "cursor",
             os.sys.executable, "-c", code, str(path)],
            check=True,
        )  # fmt: skip
        lines = [line for line in trace.read_text().splitlines() if str(path) in line or "read(" in line]
        counts.append(sum("openat(" in line for line in lines))
        assert not any("read(" in line or "pread64(" in line for line in lines)
    assert 0 < counts[0] <= counts[1] <= counts[0] + 1  # the larger one is full, so the next segment is begun


# --- directories of logs ----------------------------------------------------------------------------------


def test_one_relay_has_a_directory(tmp_path: Path) -> None:
    """A second one is refused with what to do; when the first is gone it may have it."""
    first = SpillDirectory(str(tmp_path / "spill"))
    with pytest.raises(SinkError, match=r"another relay uses it.*directory of its own"):
        SpillDirectory(str(tmp_path / "spill"))
    first.close()
    SpillDirectory(str(tmp_path / "spill")).close()


def test_a_directory_without_a_parent_is_refused(tmp_path: Path) -> None:
    """A slip in a path makes no tree of directories."""
    with pytest.raises(SinkError, match="its parent must exist"):
        SpillDirectory(str(tmp_path / "no" / "spill"))


def test_logs_are_found_by_what_they_hold(tmp_path: Path) -> None:
    """A log is a directory with a cursor or a segment; a name that is taken gets a number."""
    directory = SpillDirectory(str(tmp_path))
    for name in ("a", "b"):
        log = directory.log(name)
        fill(log, b"x")
        log.close(keep=True)
    (tmp_path / "b" / "cursor").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    assert directory.found() == ["a", "b"]
    assert directory.free_name("c") == "c"
    assert directory.free_name("a") == "a-2"
    directory.close()


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
