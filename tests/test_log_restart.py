"""What an earlier run left of a log: torn, lost, changed, foreign; and directories of logs."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import payload, program
from segments import SEGMENT, closed_at_the_end, fill, read, segments

from relay.errors import SinkError
from relay.log.log import Log
from relay.spill.directory import SpillDirectory

# --- what an earlier run left -----------------------------------------------------------------------------


@pytest.fixture
def logs() -> Iterator[list[Log]]:
    """Logs that are closed, and kept, when the test ends."""
    with closed_at_the_end() as made:
        yield made


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
    code = (
        "import sys; from pathlib import Path; from relay.log.log import Log; "
        "Log(Path(sys.argv[1])).close(keep=True)"
    )
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


def test_what_a_killed_relay_had_not_quite_removed_goes(tmp_path: Path) -> None:
    """Empty directories of logs go when the next relay has the lock; logs, and what is somebody else's, stay."""
    for name in (
        "r.tcp-127.0.0.1-9.20260101T000000Z-1",
        "r.tcp-127.0.0.1-9",
        "r.x.20260101T000000Z-2",
        "lost+found",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "r.x.20260101T000000Z-2" / "cursor").write_bytes(b"")
    (tmp_path / "r.elsewhere").symlink_to(tmp_path / "lost+found")
    SpillDirectory(str(tmp_path)).close()
    stays = {"r.x.20260101T000000Z-2", "lost+found", "r.elsewhere", "lock"}
    assert {path.name for path in tmp_path.iterdir()} == stays


@pytest.mark.parametrize("killed_at", range(1, 6))
def test_a_log_is_found_or_gone_wherever_its_removal_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """A relay that is killed between any two steps of removing a log leaves one that the next finds, or an empty
    directory that goes."""
    directory = SpillDirectory(str(tmp_path))
    log = directory.log("r.x.20260101T000000Z-1")
    fill(log, b"x" * 100)
    steps = itertools.count(1)

    def until_killed(call: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: Any, **more: Any) -> None:
            if next(steps) >= killed_at:
                raise KeyboardInterrupt
            call(*arguments, **more)

        return step

    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir"):
            patched.setattr(os, name, until_killed(getattr(os, name)))
        with contextlib.suppress(KeyboardInterrupt):
            log.close()
    directory.close()
    again = SpillDirectory(str(tmp_path))
    names = again.found()
    assert {path.name for path in tmp_path.iterdir()} == {*names, "lock"}
    again.close()


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
