"""The units under deploy/systemd, as systemd itself sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from peers import program
from relays import ROOT, run_relay

from relay.kernel.confine import calls

UNITS = ROOT / "deploy" / "systemd"


@pytest.mark.parametrize("unit", [path.name for path in sorted(UNITS.glob("*.s*"))])
def test_the_units_that_are_shipped_are_right(unit: str, tmp_path: Path) -> None:
    """systemd itself finds nothing wrong with the example units, where relay is installed as they say."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    for path in UNITS.iterdir():
        text = path.read_text().replace("/usr/local/bin/relay", "/bin/true")
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        [analyze, "verify", "--man=no", tmp_path / unit.replace("@.", "@one.")],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    mine = [line for line in done.stderr.splitlines() if any(path.stem in line for path in UNITS.iterdir())]
    assert (done.returncode, mine) == (0, []), done.stderr


@pytest.mark.parametrize("config", [path.name for path in sorted(UNITS.glob("*.yaml"))])
def test_the_configurations_beside_the_units_are_right(config: str, tmp_path: Path) -> None:
    """relay check takes the configuration that each unit names."""
    done = run_relay("check", UNITS / config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_units_allow_every_call_that_relay_makes() -> None:
    """What SystemCallFilter= leaves, as systemd itself lists it, holds all that relay's own filter allows.

    But for changing owners: a unit has its user from the start, and the socket unit has SocketUser=.
    """
    analyze = program("systemd-analyze")

    def names(group: str) -> set[str]:
        said = subprocess.run(
            [analyze, "syscall-filter", "--no-pager", group], capture_output=True, text=True
        )
        found: set[str] = set()
        for line in said.stdout.splitlines()[1:]:
            word = line.strip()
            if word.startswith("@"):
                found |= names(word)
            elif word and not word.startswith("#"):
                found.add(word)
        return found

    for unit in sorted(UNITS.glob("*.service")):
        allowed: set[str] = set()
        for line in unit.read_text().splitlines():
            key, _equals, value = line.partition("=")
            if key == "SystemCallFilter":
                listed = [
                    names(word) if word.startswith("@") else {word} for word in value.lstrip("~").split()
                ]
                allowed = (
                    allowed - set.union(*listed) if value.startswith("~") else allowed | set.union(*listed)
                )
        assert "splice" in allowed
        missing = {name for name in calls() if name not in allowed}
        assert missing <= {"chown", "lchown", "fchown", "fchownat"}, (unit.name, missing)
