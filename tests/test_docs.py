"""What the documents tell people to type works as printed.

In README.md and docs/*.md an HTML comment right before a fence says what it is for: `<!-- run -->` runs it,
`<!-- file: NAME -->` saves it as NAME. The fences of a document share a scratch directory, in order.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKER = re.compile(r"<!-- (?:(run)|file: ([\w.-]+)) -->")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A marked fence: `text` to run, or to save as `file` if that is not empty; `line` is its marker's."""

    line: int
    file: str
    text: str


def marked_blocks(text: str) -> list[Block]:
    """The marked fences of a document; ValueError for a marker without a fence or a fence without an end."""
    lines = text.splitlines()
    blocks: list[Block] = []
    number = 0
    while number < len(lines):
        fence = re.match(r"(`{3,})", lines[number])
        marker = MARKER.fullmatch(lines[number])
        if marker:
            number += 1
            fence = re.match(r"(`{3,})", lines[number]) if number < len(lines) else None
            if fence is None:
                raise ValueError(f"line {number}: no fence after {marker[0]}")
        if fence:
            start = number + 1
            while (number := number + 1) < len(lines) and lines[number].strip() != fence[1]:
                pass
            if number == len(lines):
                raise ValueError(f"line {start}: a fence without an end")
            if marker:
                blocks.append(Block(start - 1, marker[2] or "", "\n".join(lines[start:number]) + "\n"))
        number += 1
    return blocks


def run_blocks(blocks: list[Block], scratch: Path, env: dict[str, str]) -> None:
    """Saves and runs `blocks` in order in `scratch`; AssertionError tells the first that fails."""
    for block in blocks:
        if block.file:
            (scratch / block.file).write_text(block.text)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=scratch,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, f"line {block.line}: exit {done.returncode}\n{block.text}\n{done.stdout}"


def runnable() -> list[Path]:
    """The documents that have something to run."""
    return [path for path in DOCUMENTS if any(not block.file for block in marked_blocks(path.read_text()))]


@pytest.mark.parametrize("document", runnable(), ids=lambda path: path.name)
def test_a_documents_commands_work(document: Path, tmp_path: Path) -> None:
    """The commands that a document marks as runnable succeed, in order, in an empty directory."""
    binaries = Path(sys.executable).parent
    if shutil.which("relay", path=str(binaries)) is None:
        pytest.skip(f"no relay command in {binaries}: pip install -e '.[test]' puts it there")
    run_blocks(
        marked_blocks(document.read_text()),
        tmp_path,
        {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
    )


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_a_documents_links_lead_somewhere(document: Path) -> None:
    """Every link into the repository names a file that is there."""
    links = [link.partition("#")[0] for link in LINK.findall(document.read_text())]
    local = [link for link in links if link and "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_readme_has_the_blocks_that_ci_runs() -> None:
    """README.md marks its install, watch, send and test commands, each followed by a fence of one command."""
    lines = (ROOT / "README.md").read_text().splitlines()
    for name in ("install", "watch", "send", "test"):
        at = lines.index(f"<!-- {name} -->")
        assert lines[at + 1] == "```sh"
        assert lines[at + 3] == "```"


SAMPLE = """\
text
<!-- file: a.txt -->
```yaml
one
two
```
```sh
false # not marked
```
````md
<!-- run -->
```sh
false # inside another fence
```
````
<!-- run -->
```sh
grep -c . a.txt > count
test "$(cat count)" = 2
```
"""


def test_marked_fences_are_found_and_others_left_alone() -> None:
    """Marked fences come with line, name and text; unmarked ones and markers inside a fence do not count."""
    assert marked_blocks(SAMPLE) == [
        Block(2, "a.txt", "one\ntwo\n"),
        Block(16, "", 'grep -c . a.txt > count\ntest "$(cat count)" = 2\n'),
    ]


@pytest.mark.parametrize(
    "text", ["<!-- run -->\n", "<!-- run -->\n\n```sh\n```\n", "<!-- run -->\n```sh\ntrue\n"]
)
def test_a_marker_that_marks_nothing_is_an_error(text: str) -> None:
    """A marker without a fence right after it, and a fence without an end, are errors: nothing goes unrun."""
    with pytest.raises(ValueError, match=r"line [12]: (no fence after|a fence without an end)"):
        marked_blocks(text)


def test_blocks_share_a_directory_and_a_failing_one_is_told(tmp_path: Path) -> None:
    """Saved files are there for the commands that follow; a failing one is told, line and output."""
    run_blocks(marked_blocks(SAMPLE), tmp_path, dict(os.environ))
    assert (tmp_path / "count").read_text() == "2\n"
    with pytest.raises(AssertionError, match=r"line 7: exit 3(.|\n)*said so"):
        run_blocks([Block(7, "", "echo said so; (exit 3); true\n")], tmp_path, dict(os.environ))
