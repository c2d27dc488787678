"""What a sending shows on the way: bars on a terminal, lines elsewhere, JSON on request."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import peers
import pytest
from peers import PATIENCE, refused_address

from relay.sending.progress import (
    Bars,
    JsonLines,
    Lines,
    Rates,
    Standing,
    make_progress,
    seconds_left,
    show_seconds,
)

RELAY = [sys.executable, "-m", "relay", "send"]
COLOUR = re.compile(rb"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;)[0-9;]*m")


def standing(**fields: object) -> Standing:
    """One address half way through the first of two files."""
    usual = {
        "address": "tcp://h:1", "stream": "big", "number": 1, "streams": 2, "bytes": 512, "total": 1024,
        "sent": 512, "whole": 2048, "seconds": 60.0,
    }  # fmt: skip
    return Standing(**{**usual, **fields})  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file that takes a second and a half at 2 MB/s."""
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(3_000_000))
    return path


def on_terminal(argv: list[str | Path], **environment: str) -> tuple[int, bytes, bytes]:
    """Runs it with stderr on a terminal of its own: exit code, stdout, and what the terminal was given."""
    master, slave = pty.openpty()
    shown = b""
    try:
        termios.tcsetwinsize(slave, (24, 100))
        clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
        options = {**clean, "TERM": "xterm-256color", **environment}
        with peers.running(argv, stdout=subprocess.PIPE, stderr=slave, env=options) as process:
            os.close(slave)
            slave = -1
            while True:
                peers.wait_for(master)
                try:
                    shown += os.read(master, 65536)
                except OSError:  # EIO: nobody has the terminal open any more
                    break
            said, _ = process.communicate(timeout=PATIENCE)
            return process.returncode, said, shown
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)


def test_a_terminal_shows_a_bar_for_each_sink(data: Path) -> None:
    """With auto, stderr a terminal: coloured bars, one an address, at 100% in the end; results on stdout."""
    code, said, shown = on_terminal([*RELAY, data, "--to", "null:", "--to", "tcp://127.0.0.1:1"])
    assert code == 1
    assert len(said.decode().splitlines()) == 2
    text = shown.decode()
    assert "━" in text
    assert "null:" in text
    assert "tcp://127.0.0.1:1" in text
    assert "2.9/2.9 MiB" in text
    assert COLOUR.search(shown)


def test_a_bar_moves(data: Path) -> None:
    """Between the beginning and the end the bar shows some of the bytes, a rate and the time left."""
    code, _, shown = on_terminal([*RELAY, data, "--to", "null:", "--rate", "2MB/s"])
    assert code == 0
    assert len(set(re.findall(rb"\d+\.\d/2\.9 MiB", shown))) > 2
    assert b"MB/s" in shown
    assert re.search(rb"0:00:0[01]", shown)


def test_no_color_is_obeyed(data: Path) -> None:
    """NO_COLOR: bars without colour."""
    code, _, shown = on_terminal([*RELAY, data, "--to", "null:"], NO_COLOR="1")
    assert code == 0
    assert "━" in shown.decode()
    assert not COLOUR.search(shown)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(data: Path) -> None:
    """TERM=dumb: no bar, no escape sequence."""
    code, _, shown = on_terminal([*RELAY, data, "--to", "null:", "--rate", "2MB/s"], TERM="dumb")
    assert code == 0
    assert b"\x1b" not in shown
    assert b"data.bin -> null:: " in shown


def test_results_follow_the_bars_on_the_same_terminal(data: Path) -> None:
    """With stdout on a terminal too the result comes after the last bar, whole."""
    script = 'exec "$@" >&2'
    code, _, shown = on_terminal(["sh", "-c", script, "sh", *RELAY, data, "--to", "null:", "--rate", "9MB/s"])
    assert code == 0
    assert re.search(rb"data\.bin -> null:: 3000000 bytes in [^\x1b]*delivered\r\n$", shown)


def test_warnings_pass_above_the_bars(data: Path) -> None:
    """What is logged while bars are shown is a line of its own."""
    to = ["--to", refused_address(), "--to", "null:"]
    _, _, shown = on_terminal([*RELAY, data, *to, "--rate", "3MB/s", "--wait", "600ms"])
    assert re.search(rb"warning: send: connecting to tcp://[^\r]*\r\n", shown)
    assert shown.index(b"\xe2\x94\x81") < shown.index(b"warning: send")


def test_elsewhere_there_are_plain_lines(data: Path) -> None:
    """With stderr no terminal: a line a second without escape sequences, results on stdout."""
    ended = peers.run([*RELAY, data, "--to", "null:", "--rate", "1MB/s"])
    assert ended.returncode == 0
    line = ended.stderr.decode().splitlines()[0]
    assert re.fullmatch(r".*data\.bin -> null:: \S+ MiB of 2\.9 MiB \(\d+%\), \S+ [KM]iB/s, \d s left", line)
    assert "\x1b" not in ended.stderr.decode() + ended.stdout.decode()


def test_json_progress_is_for_programs(data: Path) -> None:
    """Every line on stderr is JSON: progress every half second, then one result for each sink."""
    words = ["--to", "null:", "--to", refused_address(), "--rate", "750kB/s", "--progress", "json"]
    ended = peers.run([*RELAY, data, *words, "--checksum", "crc32c"])
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stderr.decode().splitlines()]
    progress = [line for line in lines if line["event"] == "progress"]
    assert len(progress) >= 2
    counts = [line["bytes"] for line in progress]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert {line["total"] for line in progress} == {3_000_000}
    results = {line["result"]: line for line in lines if line["event"] == "result"}
    assert set(results) == {"delivered", "failed"}
    good = results["delivered"]
    assert (good["file"], good["address"], good["bytes"]) == (str(data), "null:", 3_000_000)
    assert good["method"] == "splice"
    assert good["checksum"].startswith("crc32c=")
    assert "ECONNREFUSED" in results["failed"]["reason"]


def test_none_shows_nothing_but_results(data: Path) -> None:
    """`--progress none`: stderr stays empty, the result line is on stdout."""
    ended = peers.run([*RELAY, data, "--to", "null:", "--rate", "2MB/s", "--progress", "none"])
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"delivered" in ended.stdout


def test_rich_is_not_loaded_without_a_terminal(data: Path) -> None:
    """What draws bars is imported only where bars are drawn."""
    code = "import sys, relay.sending.sending as s; s.send([sys.argv[1]], ['null:']); sys.exit('rich' in sys.modules)"
    assert peers.run([sys.executable, "-c", code, data]).returncode == 0


def test_rates_are_averaged() -> None:
    """Nothing is known at first; then the rate lies near what moved."""
    rates = Rates()
    assert rates.of(0, 0) == 0
    assert rates.of(0, 10**9) > 0
    assert rates.of(1, 10**9) == 0


def test_time_left_is_said_only_where_it_is_known() -> None:
    """It needs a size and a rate."""
    assert seconds_left(standing(), 512.0) == 3
    assert seconds_left(standing(), 0.0) is None
    assert seconds_left(standing(whole=None), 512.0) is None
    assert seconds_left(standing(sent=4096), 512.0) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1:00"), (187, "3:07"), (3753, "1:02:33")]
)
def test_seconds_are_shown_as_people_read_them(seconds: float, text: str) -> None:
    """Seconds, minutes, hours."""
    assert show_seconds(seconds) == text


def test_what_is_not_under_way_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """An address that is done or was just begun gets no line; a stream without size no percentage."""
    lines = Lines(sys.stdout)
    lines.show([standing(stream=""), standing(seconds=0.1)])
    assert capsys.readouterr().err == ""
    lines.show([standing(total=None, whole=None)])
    assert capsys.readouterr().err == "big -> tcp://h:1: 512 B, 0 B/s, 1 of 2\n"


def test_a_json_result_is_not_doubled_where_results_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """When stdout is a sink, stderr holds JSON alone."""
    JsonLines(sys.stderr).result("for people", {"bytes": 1})
    assert json.loads(capsys.readouterr().err) == {"event": "result", "bytes": 1}


@pytest.mark.parametrize(
    ("kind", "made"), [("auto", Lines), ("plain", Lines), ("json", JsonLines), ("bar", Bars)]
)
def test_each_kind_has_its_class(kind: str, made: type) -> None:
    """Under a test runner stderr is no terminal, so auto means lines."""
    assert type(make_progress(kind, io.StringIO())) is made


def test_bars_give_the_log_back(capsys: pytest.CaptureFixture[str]) -> None:
    """While bars stand, log lines go through them; afterwards where they went before."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("relay").addHandler(handler)
    try:
        bars = Bars(io.StringIO())
        before = handler.stream
        bars.start()
        assert handler.stream is not before
        bars.stop()
        bars.stop()
        assert handler.stream is before
    finally:
        logging.getLogger("relay").removeHandler(handler)
    assert "\x1b" in capsys.readouterr().err
