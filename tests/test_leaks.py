"""The checks around every test: a leak fails the test that leaks, and says what it leaked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import leaks
from peers import run

LEAKY = '''
import os, socket, subprocess

def test_descriptor():
    """Leaks a pipe."""
    os.pipe()

def test_child():
    """Leaves a child."""
    subprocess.Popen(["sleep", "1000"]).returncode = 0

def test_foreign():
    """Closes what is not its own."""
    os.close(int(os.environ["FOREIGN"]))

def test_failing():
    """Fails, and leaks besides."""
    os.pipe()
    assert False, "its own failure"

def test_clean():
    """Gives everything back, one socket by closing it and one by dropping it."""
    near, far = socket.socketpair()
    near.close()
'''


def outcome_of(folder: Path, name: str) -> str:
    """What pytest prints for one test of LEAKY under this project's conftest."""
    here = Path(__file__).parent
    (folder / "test_leaky.py").write_text(LEAKY)
    (folder / "conftest.py").write_text("from house import no_leaks\n")
    (folder / "house.py").write_text((here / "conftest.py").read_text())
    paths = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    foreign = os.open("/dev/null", os.O_RDONLY)
    try:
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder)]
        ran = run(
            [*argv, "-c", os.devnull, f"{folder}/test_leaky.py::test_{name}"],
            env={**os.environ, "PYTHONPATH": paths, "FOREIGN": str(foreign)},
            pass_fds=[foreign],
            cwd=folder,
        )
    finally:
        os.close(foreign)
    return ran.stdout.decode()


def test_a_leaked_descriptor_is_named(tmp_path: Path) -> None:
    """A descriptor left open fails the test with its number and target."""
    said = outcome_of(tmp_path, "descriptor")
    assert "-> pipe:[" in said
    assert "was opened and not closed" in said
    assert "1 error" in said


def test_a_leaked_child_is_named(tmp_path: Path) -> None:
    """A child left running fails the test with its pid and command, and is ended."""
    said = outcome_of(tmp_path, "child")
    line = next(line for line in said.splitlines() if "was started and not waited for" in line)
    assert (
        "(sleep 1000)" in line or "([sleep])" in line
    )  # the kernel's name for it, while it is still starting
    assert not Path(f"/proc/{line.split()[line.split().index('child') + 1]}").exists()


def test_a_foreign_close_is_named(tmp_path: Path) -> None:
    """Closing a descriptor that was open before the test fails the test."""
    said = outcome_of(tmp_path, "foreign")
    assert "-> /dev/null belongs to somebody else and was closed" in said


def test_a_failure_is_reported_once(tmp_path: Path) -> None:
    """A test that fails by itself is not reported a second time for what its traceback keeps alive."""
    said = outcome_of(tmp_path, "failing")
    assert "its own failure" in said
    assert "1 failed in" in said


def test_a_clean_test_passes(tmp_path: Path) -> None:
    """A test that gives back what it took passes."""
    assert "1 passed in" in outcome_of(tmp_path, "clean")


def test_a_snapshot_sees_what_is_open() -> None:
    """The check compares targets, so a number that is used again for something else is noticed."""
    r, w = os.pipe()
    before = leaks.snapshot()
    assert before.descriptors[r].startswith("pipe:[")
    os.close(r)
    other = os.open("/dev/null", os.O_RDONLY)
    try:
        assert other == r, "the lowest free number is used first"
        assert leaks.leaks(before, foreign_closes=False) == [
            f"descriptor {r} -> /dev/null was opened and not closed"
        ]
        assert len(leaks.leaks(before)) == 2
    finally:
        os.close(other)
        os.close(w)
