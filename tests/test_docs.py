"""What the documents tell people to type works as printed: README.md and docs/, marked as tests/documents.py says."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

import pytest
from docker import docker
from documents import (
    DATA,
    DOCUMENTS,
    LINK,
    OF_CI,
    ROOT,
    Block,
    Fence,
    clone,
    commands,
    fences,
    marked_blocks,
    run_blocks,
)


def runnable() -> list[Path]:
    """The documents that have something to run."""
    return [
        path
        for path in DOCUMENTS
        if any(block.kind in ("run", "start") for block in marked_blocks(path.read_text()))
    ]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.timeout(400)  # a tutorial is many commands, and the image may have to be built
@pytest.mark.parametrize("document", runnable(), ids=_name)
def test_a_documents_commands_work(document: Path, tmp_path: Path) -> None:
    """The commands that a document marks succeed, in order, in an empty directory, and say what it shows."""
    blocks, env = marked_blocks(document.read_text()), commands(tmp_path)
    with contextlib.ExitStack() as cleanup:
        if any(re.search(r"^docker ", block.text, re.MULTILINE) for block in blocks):
            made = tmp_path.parent / f"{tmp_path.name}-docker"
            made.mkdir()
            env |= cleanup.enter_context(docker(made))
            env["PATH"] = f"{made}:{env['PATH']}"
        run_blocks(blocks, tmp_path, env)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=_name)
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


def test_the_tutorial_installs_relay_as_readme_does() -> None:
    """What the tutorial has people install is the beginning of README's first command, which .ci/run runs."""
    readme = (ROOT / "README.md").read_text().splitlines()
    command = readme[readme.index("<!-- install -->") + 2].removesuffix(" && relay serve")
    assert "pip install ." in command
    assert f"```sh\n{command}\n```" in (ROOT / "docs" / "tutorial.md").read_text()


# -- what runs them

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
<!-- start here: listening -->
```sh
echo listening
exec sleep 60
```
<!-- run within 5s -->
```sh
grep -c . a.txt > count
test "$(cat count)" = 2
echo "it has $(cat count) lines"
```
<!-- says -->
```
it has ... lines
```
<!-- stop here -->
"""


def test_marked_fences_are_found_and_others_left_alone() -> None:
    """Marked fences come with line, kind and text; unmarked ones and markers inside a fence do not count."""
    counting = 'grep -c . a.txt > count\ntest "$(cat count)" = 2\necho "it has $(cat count) lines"\n'
    assert marked_blocks(SAMPLE) == [
        Block(2, "file", "one\ntwo\n", name="a.txt"),
        Block(16, "start", "echo listening\nexec sleep 60\n", "listening", "here"),
        Block(21, "run", counting, "5"),
        Block(27, "says", "it has ... lines\n"),
        Block(31, "stop", "", name="here"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- run -->\n",
        "<!-- run -->\n\n```sh\n```\n",
        "<!-- run -->\n```sh\ntrue\n",
        "<!-- run with 1 for 600 -->\n```sh\nsleep 60\n```\n",
    ],
)
def test_a_marker_that_marks_nothing_is_an_error(text: str) -> None:
    """A marker without a fence right after it, a fence without an end, and words to replace that are not there are
    errors: nothing goes unrun."""
    with pytest.raises(ValueError, match=r"line [12]: (no fence after|a fence without|there is nothing to)"):
        marked_blocks(text)


def test_every_comment_that_looks_like_a_marker_is_one() -> None:
    """No document has a fence that a slip in its comment keeps from being run."""
    ours = re.compile(r"<!-- (run|start|stop|says|file|before|beside|on)\b.*-->")
    for document in DOCUMENTS:
        wanted = [line for line in document.read_text().splitlines() if ours.match(line)]
        assert len(wanted) == len(marked_blocks(document.read_text())), document


def is_run(fence: Fence, document: Path) -> bool:
    """Whether something runs what the fence has to type, or it has nothing of that kind."""
    marked = {block.line + 1 for block in marked_blocks(document.read_text())}
    if fence.line in marked or fence.language in DATA:
        return True
    if fence.comment == "<!-- as README -->":  # a test of its own compares the two
        return document.name == "tutorial.md"
    return document == ROOT / "README.md" and fence.comment in [f"<!-- {name} -->" for name in OF_CI]


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_every_command_in_a_document_is_run(document: Path) -> None:
    """Each fence is run as its marker says, or by .ci/run, or says by its language that it is nothing to type."""
    left = [fence for fence in fences(document.read_text()) if not is_run(fence, document)]
    assert [f"{_name(document)}:{fence.line}: {fence.language or 'no language'}" for fence in left] == []


def test_ci_runs_the_fences_that_are_left_to_it() -> None:
    """.ci/run reads each of README's fences that has a marker of its own."""
    script = (ROOT / ".ci" / "run").read_text()
    read = re.findall(r"readme_block (\w+)", script)
    for names in re.findall(r"for name in ([\w ]+); do readme_block", script):
        read += names.split()
    assert set(OF_CI) <= set(read)


LEAVES_EARLY = re.compile(
    r"(?<!\|)\|&?\s*(?:head\b|[efz]*grep\s(?:[^|]*\s)?(?:-[A-Za-z]*[qmlL]|--quiet|--silent|--max-count|--files)"
    r"|sed\s[^|]*[0-9;\s'{]q\b|awk\s[^|]*\bexit\b|read\b)"
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_no_pipe_ends_in_what_stops_reading(document: Path) -> None:
    """A reader that leaves early kills the writer, and with pipefail the command fails, now and then: none does."""
    early = [
        f"{_name(document)}:{block.line}: {found[0]}"
        for block in marked_blocks(document.read_text())
        if block.kind in ("run", "start", "before") and (found := LEAVES_EARLY.search(block.text))
    ]
    assert early == []


@pytest.mark.parametrize(
    ("text", "early"),
    [
        ("relay status | grep -q camera", True),
        ("relay status | grep -c -m1 camera", True),
        ("relay status |& egrep --quiet camera", True),
        ("seq 9 |head -n 1", True),
        ("seq 9 | sed -n '1p;q'", True),
        ("seq 9 | sed 5q | wc -l", True),
        ("seq 9 | awk '{ exit }'", True),
        ("grep -q camera relay.log || head -c 1M /dev/urandom > f", False),
        ("seq 9 | grep -c 1 | grep '-quarter'", False),
        ("until relay status | grep camera; do sleep 0.1; done", False),
    ],
)
def test_pipes_that_end_early_are_seen(text: str, early: bool) -> None:
    """The check knows the readers that leave before the end, and takes no other for one."""
    assert bool(LEAVES_EARLY.search(text)) == early


def test_what_a_marker_says_besides_is_heard() -> None:
    """Words are replaced, and where, how long, with what and beside whom is known; a marker inside a fence is text."""
    text = """\
<!-- on a machine with systemd -->
<!-- before: ip address add 10.0.0.2 dev lo -->
<!-- beside peer until listening on: nc -lv 9 -->
<!-- run in the clone within 9s if json with 1 for 600, --few for --all -->
```sh
measure --all 600
<!-- run -->
```
"""
    shortened = "measure --few 1\n<!-- run -->\n"
    assert marked_blocks(text) == [
        Block(1, "systemd", ""),
        Block(2, "before", "ip address add 10.0.0.2 dev lo\n"),
        Block(3, "start", "nc -lv 9\n", "listening on", "peer"),
        Block(4, "run", shortened, "9", module="json", clone=True),
    ]


def test_a_clone_has_what_the_repository_has_and_is_written_beside(tmp_path: Path) -> None:
    """Commands in the clone find its files, and what they make stays in the scratch directory."""
    readme = (ROOT / "README.md").read_text()
    command = "test -d tests && echo made | tee -a made-there README.md > docs/made-there\n"
    run_blocks([Block(1, "run", command, clone=True)], tmp_path, dict(os.environ))
    assert not (ROOT / "made-there").exists()
    assert not (ROOT / "docs" / "made-there").exists()
    assert (ROOT / "README.md").read_text() == readme
    assert (clone(tmp_path) / "made-there").read_text() == "made\n"


def test_what_python_has_not_is_left_out_and_told(tmp_path: Path) -> None:
    """The rest of the document is run; then it counts as skipped, and says what was missing."""
    blocks = [Block(1, "run", "false\n", module="no_such_module"), Block(4, "run", "echo here > here\n")]
    with pytest.raises(pytest.skip.Exception, match="no_such_module is missing: pip install no_such_module"):
        run_blocks(blocks, tmp_path, dict(os.environ))
    assert (tmp_path / "here").exists()


def test_a_fence_that_nothing_runs_is_found() -> None:
    """Commands without a marker, in a list too, and a fence that does not say what it is."""
    bare = "```sh\ntrue\n```\n- x\n  ```console\n  $ true\n  ```\n\n```\nls\n```\n~~~bash\nls\n~~~\n"
    document = ROOT / "docs" / "index.md"
    found = [is_run(fence, document) for fence in fences(f"{bare}```yaml\na: 1\n```\n")]
    assert found == [False, False, False, False, True]


def test_blocks_share_a_directory_and_a_failing_one_is_told(tmp_path: Path) -> None:
    """Saved files are there for the commands that follow; a failing one is told, line and output."""
    run_blocks(marked_blocks(SAMPLE), tmp_path, dict(os.environ))
    assert (tmp_path / "count").read_text() == "2\n"
    with pytest.raises(AssertionError, match=r"line 7: exit 3(.|\n)*said so"):
        run_blocks([Block(7, "run", "echo said so; (exit 3); true\n")], tmp_path, dict(os.environ))


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([Block(1, "start", "echo no\n", "ready")], "line 1: it ended without saying 'ready'"),
        (
            [Block(1, "run", "echo a; echo b\n"), Block(4, "says", "b\na\n")],
            "line 4: 'a' was not said",
        ),
        ([Block(1, "run", "echo again >> tries; false\n", "1")], "line 1: exit 1"),
    ],
    ids=["a terminal that ends", "lines in another order", "in vain for a second"],
)
def test_what_is_not_said_or_never_works_is_told(blocks: list[Block], said: str, tmp_path: Path) -> None:
    """A terminal that never says what is waited for, another output than the one printed, and a command that goes on
    failing are failures."""
    with pytest.raises(AssertionError, match=said):
        run_blocks(blocks, tmp_path, dict(os.environ))


def test_a_terminal_is_closed_in_the_end(tmp_path: Path) -> None:
    """What a document started and did not end gets SIGTERM."""
    # not a trap of the shell, which comes too late for a read that is about to begin
    (tmp_path / "waits.py").write_text(
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "print('waits', flush=True)\n"
        "signal.sigwait({signal.SIGTERM})\n"
        "open('ended', 'w').write('ended\\n')\n"
    )
    waiting = f"exec {sys.executable} waits.py\n"
    run_blocks([Block(1, "start", waiting, "waits")], tmp_path, dict(os.environ))
    assert (tmp_path / "ended").read_text() == "ended\n"
