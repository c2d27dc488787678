"""`relay doctor`: what it says was found by trying, so that whoever takes something away sees it in the answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doctored import DOCUMENTED, expected, needs, results, spent_budget, states
from faults import strace_inject
from forked import forked, needs_root
from jsonschema import Draft202012Validator
from peers import run

from relay.doctor import ability, ends, examine, path
from relay.doctor.ability import Ability, abilities
from relay.doctor.ends import Pages
from relay.doctor.path import cells
from relay.errors import KernelError
from relay.kernel import memfd

FILLED_BY_FILES = ("pipe", "unix", "tcp")


def doctor(*rules: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the document of `relay doctor --json`, with faults injected into its system calls."""
    argv: list[str | Path] = [sys.executable, "-m", "relay", "doctor", "--json"]
    done = run(strace_inject(argv, *rules) if rules else argv, patience=50)
    return done.returncode, json.loads(done.stdout)


def test_every_row_is_found_out() -> None:
    """On this kernel every path is as the facts say, with figures, in under 10 s, and nothing is amiss."""
    code, document = doctor()
    assert code == 0
    Draft202012Validator(DOCUMENTED).validate(document)
    assert results(document) == {cell: expected(*cell) for cell in cells()}
    counted = {"shared": "held", "copied": "none"}
    for row in document["matrix"]:  # what an anonymous page or a file's is referred to by, nobody tells
        apart = row["from"] in ("file", "process") or (
            row["to"] == "process" and row["from"] in FILLED_BY_FILES
        )
        assert row["references"] == (None if apart else counted[row["result"]])
    assert all(row["gb_s"] > 0 and row["cpu_s_per_gb"] > 0 for row in document["matrix"])


def test_the_four_ways_of_the_question() -> None:
    """Only a memfd that is passed shares memory with another process; the ways through a pipe all copy."""
    _code, document = doctor()
    found = results(document)
    assert {way: found["memory", "process", way] for way in path.TO_PROCESS["memory"]} == {
        "vmsplice+vmsplice": "copied",
        "vmsplice+read": "copied",
        "vmsplice+splice": "copied",
        "passed": "shared",
    }


@pytest.mark.parametrize("call", ["splice", "tee", "vmsplice", "sendfile"])
def test_a_call_that_a_sandbox_denies(call: str) -> None:
    """With one call denied its line says no and by whom, its rows are denied, the others go on; the exit code is 0."""
    code, document = doctor(f"{call}:error=EPERM")
    (line,) = [one for one in document["abilities"] if one["name"] == call]
    assert (line["state"], line["needed"]) == ("no", False)
    assert line["said"] == "EPERM, answered by a seccomp filter"
    found = results(document)
    assert {cell for cell, result in found.items() if result == "denied"} == {
        cell for cell in cells() if needs(call, *cell)
    }
    assert document["failures"] == []
    assert code == 0


def test_shared_is_only_said_where_a_change_shows(tmp_path: Path) -> None:
    """Where splice is answered ENOSYS the same rows cannot be shared: what is found depends on what happens."""
    _code, document = doctor("splice,sendfile,tee,vmsplice:error=ENOSYS")
    assert set(results(document).values()) == {"denied", "copied", "shared"}
    assert {way for (_s, _t, way), found in results(document).items() if found == "shared"} == {"passed"}


@pytest.mark.parametrize(
    ("call", "name"), [("epoll_create1", "epoll"), ("memfd_create", "memfd"), ("pipe2", "pipe")]
)
def test_what_relay_needs(call: str, name: str) -> None:
    """Without a call that relay cannot do without the exit code is 1, and its line says so."""
    code, document = doctor(f"{call}:error=EPERM")
    assert states(document)[name] == "no"
    assert next(one["needed"] for one in document["abilities"] if one["name"] == name)
    assert code == 1


def test_the_table_for_people() -> None:
    """Without --json there is a line an ability and a row a path, and what the two words mean."""
    done = run([sys.executable, "-m", "relay", "doctor"], patience=50)
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines() if isinstance(done.stdout, bytes) else done.stdout.splitlines()
    rows = [tuple(line.split()[:4]) for line in lines]
    for cell in cells():
        assert (*cell, expected(*cell)) in rows
    assert any(line.startswith("ok    splice") for line in lines)


def test_neither_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what arrives is neither what was sent nor what it was changed to, that is no result but a failure."""
    real = Pages.change

    def half(self: Pages) -> None:
        real(self)
        os.pwrite(self.fd, b"x", 100)

    monkeypatch.setattr(Pages, "change", half)
    with pytest.raises(KernelError, match="neither what was sent"):
        path.examine("file", "pipe", "splice", tmp_path, 0.001)


def test_two_evidences_that_disagree_are_a_failure() -> None:
    """Where the bytes say one thing and the references another, neither is believed."""
    row = path.Found("memfd", "pipe", "splice", "shared")
    assert row.agreeing(True).references == "held"
    assert row.agreeing(None).references is None
    for result, held in (("shared", False), ("copied", True)):
        with pytest.raises(KernelError, match="the bytes say"):
            path.Found("memfd", "pipe", "splice", result, 1.0).agreeing(held)  # type: ignore[arg-type]


def test_a_failure_is_told_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that goes wrong is named under `failures`; every other row is there."""
    real = path.examine

    def one_fails(source: Any, to: Any, way: str, directory: Path, seconds: float) -> path.Found:
        if (source, to, way) == ("tcp", "tcp", "splice"):
            raise KernelError("no luck")
        return real(source, to, way, directory, seconds)

    monkeypatch.setattr(path, "examine", one_fails)
    assert examine.doctor(as_json=True, seconds=0.0) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["failures"] == ["tcp to tcp by splice: no luck"]
    assert len(document["matrix"]) == len(list(cells())) - 1


def test_small_pages_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory that is shared has small pages only, the switch is named, or that memory is in pieces."""
    monkeypatch.setattr(ability, "_mapped_huge", lambda _fd: 0)
    for switch, hint in (("never", "shmem_enabled"), ("deny", "shmem_enabled"), ("always", "2 MiB is free")):
        monkeypatch.setattr(memfd, "huge_pages", lambda switch=switch: switch)
        (line,) = [each for each in abilities() if each.name == "huge pages in memfds"]
        assert (line.state, line.needed) == ("less", False)
        assert hint in line.hint


def test_missing_is_only_what_is_needed() -> None:
    """What relay can do without is not missing, what it needs is."""
    able = [
        Ability("a", "no", ""),
        Ability("b", "no", "", needed=True),
        Ability("c", "less", "", needed=True),
    ]
    assert examine.missing(able) == ["b"]


@needs_root
def test_an_unprivileged_user_with_the_budget_used_up() -> None:
    """With no pipe pages left for the user, size and budget are less, and every path is still found out."""

    def as_user() -> Any:
        with spent_budget():
            done = {one.name: one.state for one in abilities()}
            found = []
            for cell in cells():
                if cell[0] in ("memory", "pipe") and cell[1] in ("pipe", "unix", "process"):
                    found.append((*cell, path.examine(*cell, Path("/tmp"), 0.0).result))
        return done, ends.piece(), found

    with forked(as_user) as child:
        done, piece, found = child.answer()
    assert (done["pipe size"], done["pipe budget"], done["splice"]) == ("less", "less", "yes")
    assert piece == 2 * 4096
    assert {tuple(row[:3]): row[3] for row in found} == {
        cell: expected(*cell)
        for cell in cells()
        if cell[0] in ("memory", "pipe") and cell[1] in ("pipe", "unix", "process")
    }


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No file stays, and no process."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-m", "relay", "doctor", "--json"],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert list(tmp_path.iterdir()) == []
