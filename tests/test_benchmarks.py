"""The benchmarks' harness: does it count the bytes and the CPU it says it counts?"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

# benchmarks/ is not installed. Last in the path: an installed relay must not be hidden by the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as command
from benchmarks import contender, duplex, floors, memory, page, proxies, start, table
from benchmarks import trial as trial_module
from benchmarks.catalogue import catalogue
from benchmarks.cell import GIB, MIB, Cell
from benchmarks.contender import Contender, Part, Place
from benchmarks.load import BenchmarkError, Process, compiled, kept
from benchmarks.series import Result, measured
from benchmarks.trial import Measure, Trial


@pytest.fixture(scope="module")
def load() -> Iterator[Path]:
    """The compiled load program."""
    with compiled() as program:
        yield program


def cell(name: str) -> Cell:
    """A cell of the catalogue, unpinned: tests may run where CPUs are few."""
    return replace(next(one for one in catalogue() if one.name == name), pinned=False)


def peer(of: Cell, name: str) -> Contender:
    """A contender of a cell; skips where its tools are not installed."""
    one = next(c for c in of.contenders if c.name == name)
    for tool in one.tools:
        if tool.version() is None:
            pytest.skip(f"{tool.name} is missing: install the Debian package {tool.package}")
    return one


def shell(script: str) -> Contender:
    """A contender that is one shell script, with the sinks as its arguments."""
    return Contender(
        "script", (contender.BASH,), lambda p: [Part(("sh", "-c", script, "sh", *map(str, p.fifos)))]
    )


def usage_of(load: Path, argv: list[str]) -> tuple[float, int, int]:
    """CPU seconds, exit code, and KiB of the largest process of a kept command."""
    with tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as sizes:
        process = Process(
            kept(load, argv, sizes.fileno()), cpus=None, stderr=report, pass_fds=(sizes.fileno(),)
        )
        try:
            usage = process.wait(30)
        finally:
            process.kill()
        sizes.seek(0)
        return usage.cpu, usage.code, int(sizes.read())


def test_cpu_of_grandchildren_counts(load: Path) -> None:
    """CPU burnt by both halves of a shell's pipeline, and by a process it leaves behind, is counted once."""
    burn = f"{shlex.quote(str(load))} burn"
    cpu, code, _ = usage_of(load, ["sh", "-c", f"({burn} 60 &); {burn} 80 | {burn} 100"])
    assert code == 0
    assert 0.24 <= cpu < 0.30


def test_resident_size_is_the_contenders_own(load: Path) -> None:
    """The size reported for a tiny program is not that of the Python that started it."""
    _, _, kib = usage_of(load, [str(load), "burn", "1"])
    assert 0 < kib < 8 * 1024


def test_exit_code_of_a_kept_command(load: Path) -> None:
    """The keeper passes on the exit code of its command, not of what that leaves behind."""
    assert usage_of(load, ["sh", "-c", "true & exit 7"])[1] == 7


def test_tiny_cell_with_tee(load: Path, tmp_path: Path) -> None:
    """tee delivers verified bytes to four fifos, and the table has its figures."""
    small = cell("pipe-4pipes")
    small = replace(small, contenders=(peer(small, "tee"),))
    results = measured(small, Trial(load, small, tmp_path), 1, 4 * MIB, lambda _: None)
    assert [result.failure for result in results] == [""]
    assert results[0].runs[0].size == 4 * MIB
    assert results[0].runs[0].cpu > 0
    assert "GNU tee" in table.markdown(small, 4 * MIB, 1, results)


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("file-tcp", "socat -b 1M"),
        ("file-tcp", "Python socket.sendfile"),
        ("file-tcp", "nginx, sendfile"),
        ("tcp-4tcp", "mbuffer -s 1M"),
        ("tcp-4tcp", "Python asyncio"),
        ("tcp-file", "socat -b 1M"),
        ("tcp-file", "Python asyncio"),
        ("file-8tcp", "8 nc"),
        ("file-8tcp", "mbuffer -s 1M"),
        ("file-8tcp", "Python socket.sendfile, 8 threads"),
        ("tcp-16tcp", "mbuffer"),
        ("pipe-16pipes-64k", "tee"),
        ("unix-4unix", "socat | tee >(socat)..."),
        ("unix-4unix-64k", "Python asyncio"),
        ("tcp-3files", "nc | tee"),
        ("tcp-3files", "mbuffer -s 1M"),
        ("tcp-3files", "Python asyncio"),
    ],
)
def test_tiny_cell_of_every_kind(load: Path, tmp_path: Path, name: str, who: str) -> None:
    """Every kind of end works and every peer delivers: each sink's bytes are verified, then timed."""
    small = cell(name)
    one = peer(small, who)
    trial = Trial(load, small, tmp_path)
    trial.verify(one, MIB + 1, trial.digest(MIB + 1))
    run = trial.run(one, MIB)
    assert run.seconds >= 0
    assert run.cpu > 0


def test_what_a_server_does_not_have_is_a_failure(load: Path, tmp_path: Path) -> None:
    """An answer that is no 200 is not counted as bytes that were moved: the run fails, and says what the answer was."""
    small = cell("file-tcp")
    nginx = peer(small, "nginx, sendfile")
    elsewhere = replace(
        nginx, parts=lambda place: nginx.parts(replace(place, file=tmp_path / "none" / "file"))
    )
    with pytest.raises(BenchmarkError, match="404"):
        Trial(load, small, tmp_path).run(elsewhere, MIB)


def test_relay_delivers_in_every_kind_of_cell(load: Path, tmp_path: Path) -> None:
    """relay's own command of each kind delivers what was sent to every sink."""
    for name in ("file-8tcp", "unix-4unix-64k", "tcp-3files"):
        small = cell(name)
        (relay,) = [one for one in small.contenders if one.is_relay]
        trial = Trial(load, small, tmp_path)
        trial.verify(relay, MIB + 1, trial.digest(MIB + 1))


@pytest.mark.parametrize("name", ["socat -b 1M", "mbuffer -s 1M", "Python asyncio"])
def test_a_run_whose_port_was_taken_is_made_on_another(
    load: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Somebody listens where the contender was to: the run is made once more on another port, and counts."""
    small = cell("tcp-file")
    one = peer(small, name)
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = iter([other.getsockname()[1], trial_module.free_port()])
        monkeypatch.setattr(trial_module, "free_port", lambda: next(ports))
        run = Trial(load, small, tmp_path).run(one, MIB)
    assert run.size == MIB
    assert list(ports) == []


def test_a_port_that_somebody_has_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that somebody listens at nor one of a connection in TIME_WAIT, which a strict peer could not have."""
    listened, lingering, free = (trial_module.free_port() for _ in range(3))
    with socket.create_server(("127.0.0.1", lingering)) as server:
        with socket.create_connection(("127.0.0.1", lingering)) as client:
            ours, _ = server.accept()
            ours.close()  # whoever closes first keeps the port for a minute
            assert client.recv(1) == b""
    with socket.create_server(("127.0.0.1", listened)):
        monkeypatch.setattr(trial_module, "_PORTS", iter([listened, lingering, free]))
        assert trial_module.free_port() == free


def test_small_chunks_are_fed_as_such(load: Path) -> None:
    """A feeder of 64 KiB chunks writes so many bytes at a time, and a digest notices chunks out of order."""
    argv = [str(load), "feed", str(256 * 1024), str(64 * 1024)]
    whole = subprocess.run(argv, capture_output=True, check=True).stdout
    chunks = [whole[at : at + 64 * 1024] for at in range(0, len(whole), 64 * 1024)]
    assert len(set(chunks)) == 4
    assert [int.from_bytes(chunk[:8], "little") for chunk in chunks] == [0, 1, 2, 3]


def test_lost_bytes_are_a_failure(load: Path, tmp_path: Path) -> None:
    """A contender that gives one sink a byte less is reported with the sink and both counts."""
    trial = Trial(load, cell("pipe-4pipes"), tmp_path)
    script = 'head -c 1023 > "$1"; : > "$2"; : > "$3"; : > "$4"'
    with pytest.raises(BenchmarkError, match="sink 0 got 1023 of 1024 bytes"):
        trial.run(shell(script), 1024)


def test_changed_bytes_are_a_failure(load: Path, tmp_path: Path) -> None:
    """A contender that delivers the right number of wrong bytes does not pass the verification."""
    trial = Trial(load, cell("pipe-4pipes"), tmp_path)
    script = 'tr "\\000" "\\001" | tee "$1" "$2" "$3" > "$4"'
    with pytest.raises(BenchmarkError, match="sink 0 got other bytes"):
        trial.verify(shell(script), 8192, trial.digest(8192))


def test_failing_contender_is_named(load: Path, tmp_path: Path) -> None:
    """A contender's exit code and last words are in the failure."""
    trial = Trial(load, cell("tcp-4tcp"), tmp_path)
    with pytest.raises(BenchmarkError, match=r"exit code 3 from: sh -c .*: no luck"):
        trial.run(shell("echo no luck >&2; exit 3"), 1024)


def test_missing_peer_names_its_package() -> None:
    """A peer that is not installed is left out with the name of its Debian package."""
    tool = contender.Tool("nothing", "nothing-at-all", ("nothing-by-that-name",), "")
    absent = Contender("nothing", (tool,), lambda _: [])
    with pytest.raises(LookupError, match="nothing-at-all"):
        absent.version()


def test_every_relay_command_follows_the_contract() -> None:
    """In each cell relay comes first, by a command that names every sink of the cell."""
    for one in catalogue():
        relay = one.contenders[0]
        place = Place(
            listen=9000,
            file=Path("/f"),
            ports=tuple(range(1, one.sinks + 1)),
            fifos=tuple(Path(f"/p{n}") for n in range(one.sinks)),
            paths=tuple(Path(f"/p{n}") for n in range(one.sinks)),
            output=Path("/o"),
        )
        (part,) = relay.parts(place)
        assert relay.is_relay
        assert part.argv[1:3] == ("-m", "relay")
        assert part.argv.count("--to") == one.sinks


def test_losses_are_said_plainly() -> None:
    """Where relay is slower, dearer and above its target, the table says loss and missed."""
    one = cell("pipe-4pipes")
    relay, tee = (
        Result(
            c, "1", [Measure(GIB, seconds, cpu, 1024, seconds, 0.0)], [Measure(0, 0.1, 0.1, 1024, 0.1, 0.0)]
        )
        for c, seconds, cpu in zip(one.contenders, (2.0, 1.0), (0.5, 0.4), strict=False)
    )
    text = table.markdown(one, GIB, 1, [relay, tee])
    assert "relay moves 0.50 times the GiB/s of the fastest peer, `tee` (loss)" in text
    assert "relay costs 1.25 times the CPU of the cheapest peer, `tee` (loss)" in text
    assert "at most 0.2 of the CPU of `tee`: missed, 1.250" in text
    assert "Goal, at most 0.1 of the CPU: missed, 1.25 (1.33 without start-up); at least 8 times" in text


def test_a_goal_is_also_said_beside_those_it_was_set_for() -> None:
    """A goal that somebody else keeps relay from is missed, and met beside the tools that it names."""
    one = cell("file-8tcp")
    results = [
        Result(c, "1", [Measure(GIB, 1.0, cpu, 1024, 1.0, 0.0)], [Measure(0, 0.1, 0.0, 1024, 0.1, 0.0)])
        for c, cpu in zip(one.contenders, (0.6, 1.0, 1.0, 1.0, 0.5), strict=True)
    ]
    assert [r.contender.tools for r in results][4] == (contender.PYTHON,)
    text = table.markdown(one, GIB, 1, results)
    assert "- Goal, at most 0.7 of the CPU: missed, 1.20 (1.20 without start-up); at least 1.3 times" in text
    assert (
        "- Beside mbuffer, OpenBSD nc alone, for which it was set, at most 0.7 of the CPU: met, 0.60 (0.60 without "
        "start-up); at least 1.3 times the GiB/s: missed, 1.00." in text
    )


def test_what_misses_a_goal_by_little_is_not_rounded_to_it() -> None:
    """A figure that two digits would make the goal itself has as many as it takes; the goal itself has two."""
    assert [table._beyond(cpu, 0.1) for cpu in (0.103, 0.0996, 0.1, 0.25)] == [
        "0.103",
        "0.0996",
        "0.10",
        "0.25",
    ]


def test_command_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """--list names the cells a pattern picks; a pattern that picks none is refused with all names."""
    assert command.main(["--list", "--only", "file-*"]) == 0
    assert "file-tcp-unpinned" in capsys.readouterr().out
    assert command.main(["--only", "no-such-cell"]) == 2
    assert "pipe-4pipes" in capsys.readouterr().err


def test_command_end_to_end(tmp_path: Path) -> None:
    """`python -m benchmarks` writes the same table to stdout and to its file, and each run to the JSON."""
    peer(cell("pipe-4pipes"), "tee")
    options = ["--only", "pipe-4pipes-unpinned", "--size", "1MiB", "--directory", str(tmp_path)]
    outputs = [
        "--json",
        str(tmp_path / "j"),
        "--markdown",
        str(tmp_path / "m"),
        "--plot",
        str(tmp_path / "p"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, *outputs],
        capture_output=True,
        text=True,
        check=False,
        cwd=contender.ROOT,
    )
    assert done.stdout.strip() == (tmp_path / "m").read_text().strip(), done.stderr
    assert "`python -m benchmarks --runs 5 --only pipe-4pipes-unpinned --size 1MiB`" in done.stdout
    contenders = json.loads((tmp_path / "j").read_text())["cells"][0]["contenders"]
    tee = next(one for one in contenders if one["name"] == "tee")
    assert [run["size"] for run in tee["runs"]] == [MIB] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j", "m", "p"]
    drawn = {path.name: path.read_text() for path in (tmp_path / "p").iterdir()}
    assert sorted(drawn) == ["pipe-4pipes-unpinned.svg", "ratios.svg"]
    assert "![pipe-4pipes-unpinned](p/pipe-4pipes-unpinned.svg)" in done.stdout
    speeds = f"{tee['gib_s']['median']:.2f} ({tee['gib_s']['least']:.2f} to {tee['gib_s']['greatest']:.2f})"
    assert speeds in drawn["pipe-4pipes-unpinned.svg"]


@pytest.mark.parametrize("name", ["ping-100-64", "connects", "idle", "bulk"])
def test_conversations_through_relay_are_counted(load: Path, tmp_path: Path, name: str) -> None:
    """Every job of the two-way benchmarks runs through relay and gives figures for each of its columns."""
    job = replace(next(job for job in duplex.JOBS if job.name == name), connections=20)
    if job.kind == "bulk":
        job = replace(job, connections=1, size=64 * MIB)
    with compiled(duplex.TALK) as talk:
        figures = duplex.Trials(load, talk, tmp_path, 100).run(job, proxies.PROXIES[0])
    assert {key for key, _title, _show in job.columns} <= figures.keys()
    assert all(figures[key] > 0 for key in figures if key != "rss")


def test_the_bare_loops_deliver_and_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every floor, shortened: each loop's bytes are verified, and the table has a row of figures for it."""
    monkeypatch.setattr(floors, "PINGS", floors.PINGS[:2])  # few enough for any limit of descriptors
    assert floors.main(["--runs", "1", "--mib", "2", "--milliseconds", "20"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(floors.FLOORS) + len(floors.PINGS)
    for line in lines:  # so little takes next to no time: what the figures are says nothing
        assert re.search(r"\| -?\d+\.\d+( us)? \(.*\) \| \d+", line), line


def test_a_feeder_that_lends_sends_what_it_says(load: Path) -> None:
    """Eight chunks in turn, each page with its number: what is lost or out of order changes the digest."""
    argv = [str(load), "lend", str(10 * MIB + 5), str(MIB)]
    whole = subprocess.run(argv, capture_output=True, check=True).stdout
    assert len(whole) == 10 * MIB + 5
    numbers = [int.from_bytes(whole[at : at + 8], "little") for at in range(0, 10 * MIB, MIB)]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize(
    ("name", "tables"), [("benchmarks.md", page.TABLES), ("memory.md", ["machine", *memory.CELLS])]
)
def test_a_page_has_a_place_for_every_table(name: str, tables: Iterable[str]) -> None:
    """Each table has one place on its page, and each place a table."""
    text = (DOCS / name).read_text()
    places = re.findall(r"<!-- table: (\S+) -->", text)
    assert sorted(places) == sorted(tables)
    assert text.count(table.END) == len(places)


def test_a_table_is_written_where_it_belongs(tmp_path: Path) -> None:
    """A run writes its tables between their markers, and leaves everything else as it was."""
    text = "a\n\n<!-- table: machine -->\nold\n<!-- /table -->\n\nb\n<!-- table: unix-4unix -->\n<!-- /table -->\nc\n"
    target = tmp_path / "page.md"
    target.write_text(text)
    argv = [str(target), "--only", "machine", "--only", "unix-4unix", "--runs", "1", "--mib", "1"]
    assert page.main([*argv, "--json", str(tmp_path / "runs.json")]) == 0
    written = target.read_text()
    assert re.sub(r"(?s)(<!-- table: \S+ -->).*?(<!-- /table -->)", r"\1\2", written) == re.sub(
        r"(?s)(<!-- table: \S+ -->).*?(<!-- /table -->)", r"\1\2", text
    )
    assert "old" not in written
    assert "Machine: Linux" in written
    assert "| **`relay run`** | relay " in written
    raw = json.loads((tmp_path / "runs.json").read_text())
    assert raw["unix-4unix"]["size"] == MIB


def test_starting_is_measured_beside_its_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to start has a row; the two that have a goal say whether they met it, and more than that is missed."""
    monkeypatch.setitem(start.GOALS, "relay --help", 0)
    head, _rule, *rows = start.table(1).splitlines()
    assert head.startswith("| started |")
    goals = {row.split(" | ")[0].strip("| ").replace("`", ""): row.split(" | ")[3] for row in rows}
    assert list(goals) == list(start.CASES)
    assert goals["relay --help"] == "0 ms: missed |"
    assert goals["relay serve, ready"] in ("350 ms: met |", "350 ms: missed |")


def test_a_page_without_a_place_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says what to write, and the page is as it was."""
    target = tmp_path / "page.md"
    target.write_text("<!-- table: machine -->\n")
    assert page.main([str(target), "--only", "machine"]) == 2
    assert "<!-- /table -->" in capsys.readouterr().err
    assert target.read_text() == "<!-- table: machine -->\n"
