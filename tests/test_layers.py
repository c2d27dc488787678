"""The house rules that an import or a line count can break."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

RELAY = Path(__file__).resolve().parent.parent / "relay"
LONGEST_FILE = 450

# Floor by floor, the ground floor last. A unit is a file or a folder directly under relay/. It imports from
# its floor and from those below, and never in a circle. A new unit has to be given its floor here.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("aio",),
    ("transfers", "admin"),
    ("serving", "sending", "planning", "doctor", "bench"),
    ("confinement",),
    ("config", "duplex"),
    ("spill",),
    ("pipeline",),
    ("needs", "ways", "log", "news", "journal", "stages", "endpoints"),
    ("sharing",),
    ("engine", "backoff"),
    ("kernel",),
    ("settings", "units", "charts"),
    ("errors", "__init__"),
)
FLOOR_OF = {unit: len(FLOORS) - number for number, units in enumerate(FLOORS) for unit in units}
C_CORE = "_pump"


class Import(NamedTuple):
    """One import of `target` (a dotted name in relay) by `file`; `typing_only`: only type checkers see it."""

    file: Path
    line: int
    target: str
    typing_only: bool


def unit_of_file(file: Path, root: Path) -> str:
    """The unit a source file belongs to."""
    return file.relative_to(root).parts[0].removesuffix(".py")


def unit_of_target(target: str) -> str:
    """The unit a dotted name belongs to; the package itself is `__init__`."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Every import of relay in `file`, made absolute; `from relay import x` is `relay.x` if x is a module."""
    package = ["relay", *file.relative_to(root).parts[:-1]]
    tree = ast.parse(file.read_text(), str(file))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names]
            # What follows `import` may be a module or a thing within one; a module is told by its file.
            targets = [f"{base}.{name}" if is_module(f"{base}.{name}", root) else base for name in names]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target.split(".")[0] == "relay":
                yield Import(file, node.lineno, target, id(node) in typing_only)


def is_module(name: str, root: Path) -> bool:
    """Whether the dotted `name` is a file or a folder of relay, or its compiled core."""
    parts = name.split(".")
    if parts[0] != "relay":
        return False
    path = root.joinpath(*parts[1:])
    return path.is_dir() or path.with_name(path.name + ".py").is_file() or parts[-1] == C_CORE


def faults(root: Path) -> list[str]:
    """What breaks the rules of the floors under `root`, one line each."""
    found: list[str] = []
    beside: dict[str, set[str]] = {}
    within: dict[str, set[str]] = {}
    for file in sorted(root.rglob("*.py")):
        unit = unit_of_file(file, root)
        if unit not in FLOOR_OF:
            found.append(f"{file}: {unit} has no floor in FLOORS")
            continue
        for item in imports_of(file, root):
            place = f"{item.file}:{item.line}: {unit} imports {item.target}"
            target = unit_of_target(item.target)
            if unit == "__init__" and item.typing_only:
                continue  # the package's face names for type checkers what it loads when it is asked for
            if C_CORE in item.target.split(".") and unit != "kernel":
                found.append(f"{place}: only kernel may import the C core")
            elif target not in FLOOR_OF:
                found.append(f"{place}: {target} has no floor in FLOORS")
            elif FLOOR_OF[target] > FLOOR_OF[unit]:
                found.append(f"{place}: that is a floor above")
            elif FLOOR_OF[target] == FLOOR_OF[unit] and target != unit and not item.typing_only:
                beside.setdefault(unit, set()).add(target)
            elif target == unit and not item.typing_only and file.parent != root and file.stem != "__init__":
                # A folder's own face may know what is inside: it is what those outside see.
                module = ".".join(["relay", *file.relative_to(root).with_suffix("").parts])
                within.setdefault(module, set()).add(item.target)
    for neighbours in (beside, within):
        found.extend(f"{root}: {' -> '.join(circle)} is a circle" for circle in circles(neighbours))
    return found


def circles(beside: dict[str, set[str]]) -> list[list[str]]:
    """The circles among units of one floor or modules of one folder, each once, beginning with its least name."""
    found: list[list[str]] = []

    def follow(path: list[str]) -> None:
        for unit in sorted(beside.get(path[-1], ())):
            if unit == path[0]:
                found.append([*path, unit])
            elif unit not in path and unit > path[0]:
                follow([*path, unit])

    for start in sorted(beside):
        follow([start])
    return found


def write(root: Path, files: dict[str, str]) -> Path:
    """Lays out `files` (path: text) under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_imports_run_downward_only() -> None:
    """Imports go to the same floor or below, never in a circle, and only kernel imports the C core."""
    assert faults(RELAY) == []


@pytest.mark.parametrize("file", sorted(RELAY.rglob("*.py")), ids=lambda file: str(file.relative_to(RELAY)))
def test_a_file_is_short_enough_to_read(file: Path) -> None:
    """No source file reaches 450 lines."""
    assert len(file.read_text().splitlines()) < LONGEST_FILE


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"kernel/pipe.py": "from relay.engine import Engine"}, "a floor above"),
        ({"kernel/pipe.py": "def f():\n    import relay.engine"}, "a floor above"),
        ({"engine.py": "from . import pipeline", "pipeline/__init__.py": ""}, "a floor above"),
        ({"kernel/pipe.py": "from ..endpoints.tcp import x"}, "a floor above"),
        ({"errors.py": "from relay.kernel import pipe"}, "a floor above"),
        ({"engine.py": "from relay.kernel import _pump"}, "the C core"),
        ({"engine.py": "import relay.kernel._pump"}, "the C core"),
        ({"ways.py": "import relay.needs", "needs.py": "import relay.ways"}, "needs -> ways -> needs"),
        (
            {"spill/a.py": "import relay.spill.b", "spill/b.py": "from relay.spill import a"},
            "relay.spill.a -> relay.spill.b -> relay.spill.a",
        ),
        ({"manager.py": ""}, "has no floor"),
        ({"cli/main.py": "import relay.manager"}, "has no floor"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    """An upward import, a circle, a foreign import of the C core, a unit without a floor: all are found."""
    (line,) = faults(write(tmp_path, files))
    assert fault in line


@pytest.mark.parametrize(
    "files",
    [
        {
            "cli/serve.py": "from relay import __version__, errors, serving\nimport os",
            "serving/__init__.py": "",
            "errors.py": "",
        },
        {"kernel/pipe.py": "from relay.kernel import _pump\nfrom .. import errors\nfrom .a import x"},
        {
            "planning/plan.py": "from relay.engine import Engine",
            "engine.py": "from relay.kernel.pipe import Pipe",
        },
        {
            "ways.py": "import relay.needs",
            "needs.py": "import typing\nif typing.TYPE_CHECKING:\n    import relay.ways",
        },
    ],
)
def test_a_kept_rule_is_no_fault(tmp_path: Path, files: dict[str, str]) -> None:
    """Imports downward, sideways, inside a unit and for type checkers only are all allowed."""
    assert faults(write(tmp_path, files)) == []


def test_no_test_file_imports_from_another() -> None:
    """What several test files need is in a module beside them."""
    found = [
        f"{file.name}:{node.lineno}"
        for file in sorted(Path(__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(), str(file)))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("test_")
    ]
    assert found == []
