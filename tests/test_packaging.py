"""The sdist and the wheel, built as a packager does: from an exported tree without git or earlier builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

import pytest

import relay

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What the exported tree is without: other programs' folders, and whatever an earlier build or run left.
LEFTOVERS = re.compile(
    r"\.git|\.venv|\..*_cache|\.hypothesis|__pycache__|build|dist|relay-inbox|_pump\.c|.*\.(egg-info|so|o|pyc)"
)


class Built(NamedTuple):
    """What one build made: both files, and the paths inside them (of the sdist: below its top folder)."""

    sdist: Path
    wheel: Path
    in_sdist: set[str]
    in_wheel: set[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of the exported tree and the wheel made from it, with this environment's setuptools."""
    tree = tmp_path_factory.mktemp("export") / "tree"
    out = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, ignore=lambda _, names: {name for name in names if LEFTOVERS.fullmatch(name)})
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree],
        cwd=out,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    return Built(sdist, wheel, in_sdist, in_wheel)


def sources(*folders: str) -> set[str]:
    """The files of the exported tree under `folders`, as paths from its root."""
    found = (
        path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()
    )
    return {str(path) for path in found if not any(LEFTOVERS.fullmatch(part) for part in path.parts)}


def test_one_wheel_serves_every_python_from_3_11(built: Built) -> None:
    """The wheel is tagged cp311-abi3 and its C core is an abi3 library."""
    assert re.fullmatch(r"splice_relay-[\w.]+-cp311-abi3-linux_\w+\.whl", built.wheel.name)
    assert [name for name in built.in_wheel if name.endswith(".so")] == ["relay/kernel/_pump.abi3.so"]


def test_the_wheel_holds_what_runs(built: Built) -> None:
    """Modules, the typing marker and every configuration are in the wheel; C sources and tests are not."""
    assert {name for name in sources("relay") if not name.endswith((".c", ".h"))} <= built.in_wheel
    assert "relay/py.typed" in built.in_wheel
    configs = {Path(name).name for name in sources("configs") if name.endswith(".yaml")}
    assert "default.yaml" in configs
    assert configs <= {Path(name).name for name in built.in_wheel if name.startswith("relay/")}
    assert {name.split("/")[0] for name in built.in_wheel if ".dist-info/" not in name} == {"relay"}
    assert not [name for name in built.in_wheel if name.endswith((".c", ".h", ".o"))]


def test_the_sdist_holds_the_whole_project(built: Built) -> None:
    """Sources in C and Python, configurations, tests, documents and CI are all in the sdist."""
    wanted = sources("relay", "configs", "tests", "docs", "benchmarks", ".ci")
    wanted |= {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Dockerfile",
        ".dockerignore",
        "pyproject.toml",
        "setup.py",
    }
    assert wanted - built.in_sdist == set()
    assert not [name for name in built.in_sdist if name.endswith((".so", ".o", ".pyc"))]


def test_the_version_is_the_same_everywhere(built: Built) -> None:
    """pyproject.toml, relay.__version__, the wheel and the image's label agree."""
    with zipfile.ZipFile(built.wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        fields = HeaderParser().parsestr(archive.read(metadata).decode())
    label = re.search(r'image\.version="([^"]+)"', (ROOT / "Dockerfile").read_text())
    assert label is not None
    assert {PROJECT["version"], relay.__version__, fields["Version"], label[1]} == {PROJECT["version"]}
    assert fields["Name"] == "splice-relay"
    assert fields["License-Expression"] == "Apache-2.0"


def test_the_wheel_installs_the_command(built: Built) -> None:
    """The wheel's one entry point is the command relay."""
    with zipfile.ZipFile(built.wheel) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        assert archive.read(entry).decode().split() == ["[console_scripts]", "relay", "=", "relay.cli:main"]
