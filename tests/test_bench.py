"""`relay bench`: the figures are those of bytes that moved, and the command says what it found."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from peers import eventually

from relay.bench import ends, report, survey, trial
from relay.bench.cell import (
    COUNTS,
    GIB,
    MIB,
    SIZES,
    Denied,
    Failed,
    Figures,
    Method,
    Outcome,
    Place,
    Row,
    catalogue,
    hops,
)
from relay.bench.trial import Bench, Interrupted
from relay.endpoints.file import FileSink
from relay.errors import RelayError, UsageError
from relay.kernel.probe import machine

TINY = 0.001  # seconds: a cell lasts until a few MiB went through in any case

FIGURES = {"type": ["number", "null"]}
PLACE = {
    "from": {"enum": ["pipe", "unix", "tcp", "file", "memory"]},
    "to": {"enum": ["pipe", "unix", "tcp", "file", "null"]},
    "sinks": {"enum": list(COUNTS)},
    "size": {"enum": list(SIZES)},
    "gib_s": FIGURES,
    "cpu_s_per_gib": FIGURES,
    "calls_per_gib": FIGURES,
}
METHOD = {"enum": ["splice", "sendfile", "vmsplice", "copy"]}
DOCUMENTED = {
    "type": "object",
    "required": ["machine", "cells", "auto"],
    "additionalProperties": False,
    "properties": {
        "machine": {
            "type": "object",
            "required": ["kernel", "cpu", "cpus", "python", "relay", "pinned", "seconds", "refused"],
        },
        "cells": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [*PLACE, "method"],
                "additionalProperties": False,
                "properties": {
                    **PLACE,
                    "method": METHOD,
                    "denied": {"type": "string"},
                    "failed": {"type": "string"},
                },
            },
        },
        "auto": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [*PLACE, "chose", "wrong"],
                "additionalProperties": False,
                "properties": {
                    **PLACE,
                    "chose": METHOD,
                    "wrong": {"type": "object", "additionalProperties": {"type": "number"}},
                },
            },
        },
    },
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """What cells run on."""
    made = Bench(tmp_path, TINY, lambda: False)
    yield made
    made.close()


def relay_bench(*arguments: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    """`relay bench` with these arguments, its files in `temporary`."""
    return subprocess.run(
        [sys.executable, "-m", "relay", "bench", "--seconds", "0.001", "--rounds", "1", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


def figures(gib_s: float, cpu: float, calls: float, used: str) -> Figures:
    """As if a GiB had gone."""
    return Figures(GIB, 1 / gib_s, cpu, round(calls), GIB, used)


# -- the cells


@pytest.mark.parametrize("hop", hops())
def test_every_cell_moves_its_bytes(bench: Bench, tmp_path: Path, hop: str) -> None:
    """On every hop each method moves at least what was measured to every sink, in the way it was asked to."""
    for place in catalogue([hop], quick=True):
        for method in place.methods:
            outcome = bench.run(place, method)
            assert isinstance(outcome, Figures), outcome
            assert outcome.used == method
            assert outcome.moved >= outcome.bytes > 0
            assert outcome.cpu_seconds > 0
            assert outcome.calls_made > 0
            assert outcome.seconds >= TINY
        auto = bench.run(place, "auto")
        assert isinstance(auto, Figures)
        assert auto.used in place.methods
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_fed(bench: Bench, size: int) -> None:
    """Pieces of every size come through, from a pipe by reference or by write and from a socket."""
    for source in ("pipe", "unix"):
        outcome = bench.run(Place(source, "pipe", 1, size), "splice")
        assert isinstance(outcome, Figures)
        assert outcome.moved % size == 0


def test_small_pieces_cost_more_calls(bench: Bench) -> None:
    """What is counted as system calls is: fed 512 bytes at a time it takes more of them than at 1 MiB."""
    small = bench.run(Place("unix", "null", 1, 512), "splice")
    large = bench.run(Place("unix", "null", 1, MIB), "splice")
    assert isinstance(small, Figures)
    assert isinstance(large, Figures)
    assert small.calls > 4 * large.calls
    assert large.calls >= GIB / MIB


def test_the_cpu_of_threads_that_write_files_counts(bench: Bench) -> None:
    """To a file the engine's own thread does less than half of the work; the figures have the other half, too."""
    to_file = bench.run(Place("memory", "file", 1, MIB), "copy")
    to_null = bench.run(Place("memory", "null", 1, MIB), "copy")
    assert isinstance(to_file, Figures)
    assert isinstance(to_null, Figures)
    assert to_file.cpu > 2 * to_null.cpu
    assert to_file.calls > GIB / MIB


def test_the_calls_of_threads_that_write_files_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file's thread calls is in the figure: without it fewer are counted."""
    place = Place("pipe", "file", 1, MIB)
    whole = bench.run(place, "copy")
    monkeypatch.setattr(FileSink, "calls", 0)
    without = bench.run(place, "copy")
    assert isinstance(whole, Figures)
    assert isinstance(without, Figures)
    assert whole.calls > without.calls + GIB / MIB


def test_missing_bytes_are_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a sink got a byte less than went in, there are no figures but an error with both counts."""
    real = ends.Receivers.counts

    def short(self: ends.Receivers) -> list[int] | None:
        got = real(self)
        return None if got is None else [got[0] - 1, *got[1:]]

    monkeypatch.setattr(ends.Receivers, "counts", short)
    with pytest.raises(
        RelayError, match=r"pipe-unix to 4, 65536 bytes, splice: fed (\d+), moved \1, and sinks"
    ):
        bench.run(Place("pipe", "unix", 4, 65536), "splice")


def test_what_is_denied_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that this machine refuses makes its cells denied, with the errno; auto goes on without it."""
    monkeypatch.setattr(trial, "machine", lambda: replace(machine(), vmsplice=errno.EPERM))
    place = Place("memory", "null", 1, MIB)
    refused = bench.run(place, "vmsplice")
    assert refused == Denied("vmsplice is refused here (EPERM)")
    auto = bench.run(place, "auto")
    assert isinstance(auto, Figures)
    assert auto.used == "copy"


def test_tee_is_needed_for_several_sinks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tee one sink is still spliced to, four are not."""
    monkeypatch.setattr(trial, "machine", lambda: replace(machine(), tee=errno.ENOSYS))
    assert isinstance(bench.run(Place("pipe", "pipe", 1, 65536), "splice"), Figures)
    assert bench.run(Place("pipe", "pipe", 4, 65536), "splice") == Denied("tee is refused here (ENOSYS)")


def test_a_cell_can_be_broken_off(tmp_path: Path) -> None:
    """When it is to end, a cell ends at once: its pipeline is aborted and nothing stays behind."""
    made = Bench(tmp_path, 60.0, lambda: True)
    try:
        for hop in ("tcp-tcp", "file-file", "memory-unix", "pipe-pipe"):
            (place, *_) = catalogue([hop], quick=True)
            with pytest.raises(Interrupted):
                made.run(place, "copy")
    finally:
        made.close()
    assert list(tmp_path.iterdir()) == []


def test_cells_that_cannot_be_are_absent() -> None:
    """sendfile takes a file to one sink and nothing else, splice takes no memory."""
    with_sendfile = {(p.hop, p.sinks) for p in catalogue() if "sendfile" in p.methods}
    assert with_sendfile == {("file-pipe", 1), ("file-unix", 1), ("file-tcp", 1)}
    assert all("splice" not in place.methods for place in catalogue() if place.source == "memory")
    assert {place.sinks for place in catalogue()} == set(COUNTS)
    assert {place.size for place in catalogue(["tcp-tcp"])} == set(SIZES)


# -- what is told


def rows() -> list[Row]:
    """Two hops with figures that are easy to find again."""
    first: dict[Method, Outcome] = {
        "splice": figures(2.0, 0.25, 1000, "splice"),
        "copy": figures(1.0, 0.5, 2000, "copy"),
        "auto": figures(1.9, 0.2, 1111, "splice"),
    }
    second: dict[Method, Outcome] = {
        "vmsplice": Denied("vmsplice is refused here (EPERM)"),
        "copy": figures(4.0, 0.1, 10, "copy"),
        "auto": Failed("it broke"),
    }
    third: dict[Method, Outcome] = {
        "splice": figures(2.0, 0.3, 1000, "splice"),
        "copy": figures(2.0, 0.2, 1000, "copy"),
        "auto": figures(2.0, 0.6, 1000, "splice"),
    }
    return [
        Row(Place("pipe", "tcp", 4, 512), first),
        Row(Place("pipe", "tcp", 16, 65536), third),
        Row(Place("memory", "null", 1, MIB), second),
    ]


def test_the_table_has_every_figure_once() -> None:
    """Every place is a row of its hop, every figure stands under its method, what is missing says why."""
    out = io.StringIO()
    report.show("about", rows(), out)
    text = out.getvalue()
    lines = [line.split() for line in text.splitlines()]
    assert ["4", "512", "B", "2", "0.250", "1000", "1", "0.500", "2000"] in lines
    assert ["16", "64", "KiB", "2", "0.300", "1000", "2", "0.200", "1000"] in lines
    assert ["1", "1", "MiB", "denied", "4", "0.100", "10"] in lines
    assert [
        "pipe",
        "to",
        "tcp",
        "4",
        "512",
        "B",
        "splice",
        "1.9",
        "0.200",
        "1111",
        "chosen",
        "2.50",
        "x",
    ] in lines
    assert "vmsplice is denied on memory to null: vmsplice is refused here (EPERM)" in text
    assert "failed: it broke" in text


def test_a_wrong_choice_is_said_plainly() -> None:
    """Where auto took the dearer method the last lines say where, and what the cheapest would have cost."""
    said = report.sentences(rows())
    assert "auto chose another method than the cheapest, at more than 5% above it, in 1 of 2 places" in said
    assert "  pipe to 16 tcp, 64 KiB: splice costs 3.00 times what copy does" in said


def test_a_terminal_gets_lines_and_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the tables have frames and stress the least; with NO_COLOR they have no colour."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    report.show("about", rows(), out)
    assert "│     4 │  512 B │" in out.getvalue()
    assert "\x1b[1m0.250\x1b[0m" in out.getvalue()  # the least CPU is bold, which is no colour
    assert set(re.findall(r"\x1b\[([0-9;]*)m", out.getvalue())) == {"0", "1", "3"}


def test_json_has_the_documented_shape(tmp_path: Path) -> None:
    """`--json` prints one document of the documented shape: a cell a method, an entry of auto a place."""
    done = relay_bench("--only", "file-pipe", "--quick", "--json", temporary=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    Draft202012Validator(DOCUMENTED).validate(document)
    assert [cell["method"] for cell in document["cells"] if cell["sinks"] == 1] == [
        "splice",
        "sendfile",
        "vmsplice",
        "copy",
    ]
    assert [entry["sinks"] for entry in document["auto"]] == [1, 4]
    one = document["auto"][0]
    assert set(one["wrong"]) == {"splice", "sendfile", "vmsplice", "copy"} - {one["chose"]}
    assert list(tmp_path.iterdir()) == []


def test_the_plot_is_an_svg_with_a_bar_for_each_figure(tmp_path: Path) -> None:
    """`--plot` writes a well-formed SVG; every method and auto has a bar at every place."""
    done = relay_bench(
        "--only", "pipe-null", "--only", "memory-null", "--plot", str(tmp_path / "p.svg"), temporary=tmp_path
    )
    assert done.returncode == 0, done.stderr
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    bars = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert len(bars) == 3 * 3 + 3
    assert "pipe to null" in done.stdout


# -- how it ends


def test_wrong_usage_is_found_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hop or a plot that cannot be is exit code 2 at once; PNG without matplotlib names what to install."""
    done = relay_bench("--only", "tcp-pip", temporary=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "relay: no hop is called 'tcp-pip'; did you mean 'tcp-pipe'?\n"
    assert relay_bench("--plot", "x.pdf", temporary=tmp_path).returncode == 2
    assert relay_bench("--plot", str(tmp_path / "no" / "x.svg"), temporary=tmp_path).returncode == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install 'splice-relay\[plot\]'"):
        survey.survey(["pipe-null"], plot=tmp_path / "x.png")


def test_a_failed_cell_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What breaks one cell is told and leaves the others their figures; the exit code is 1."""
    real = Bench.run

    def run(self: Bench, place: Place, method: Method) -> Outcome:
        if method == "copy":
            raise RelayError("no luck")
        return real(self, place, method)

    monkeypatch.setattr(Bench, "run", run)
    assert survey.survey(["memory-null"], seconds=TINY, rounds=1, as_json=True, directory=tmp_path) == 1
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["method"], "failed" in cell) for cell in cells] == [("vmsplice", False), ("copy", True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    """A signal in the middle ends it with 130 or 143, with nothing on stdout and no file left."""
    running = subprocess.Popen(
        [sys.executable, "-m", "relay", "bench", "--seconds", "30"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        eventually(lambda: list(tmp_path.glob("relay-bench-*/1")), "the first cell at work")
        running.send_signal(number)
        out, err = running.communicate(timeout=20)
    finally:
        running.kill()
        running.communicate()
    assert (running.returncode, out, err) == (128 + number, "", "")
    assert list(tmp_path.iterdir()) == []
