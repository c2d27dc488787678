"""What documents tell people to type, run as they would: terminals, files, and what a command says.

An HTML comment right before a fence says what the fence is for:

    <!-- run -->                  run it; it must succeed
    <!-- run within 5s -->        the same, again and again until it succeeds, for so long
    <!-- run in the clone -->     the same in a directory that has what a clone of the repository has
    <!-- run if NAME -->          the same where Python has a module NAME; in the end the document counts as skipped
    <!-- run with A for B, C for D -->  the same with these words in place of those, which must be there: a shorter
                                  time, fewer of many. Only what would take minutes is shortened, and only so
    <!-- start NAME: TEXT -->     run it in a terminal of its own, and go on when that has said TEXT; NAME and TEXT may
                                  be left out: without TEXT it goes on at once
    <!-- file: NAME -->           save it as NAME
    <!-- says -->                 what the fence before it printed: these lines, in this order, with others in between;
                                  `...` is any text within a line

These stand alone, for what the reader has and a test has to make:

    <!-- stop NAME -->            Ctrl-C in that terminal, until it has ended
    <!-- before: COMMAND -->      run it, in a network of the document's own: an address, an interface
    <!-- beside NAME until TEXT: COMMAND -->  run it in a terminal of its own until that has said TEXT: another machine
    <!-- on a machine with systemd -->  all of the document, on such a machine (booted.py)

The order is: in the clone, within, if, with. The fences of a document share a scratch directory and, where this user
may make one, a network of their own, so that their ports are free. Terminals are closed in the end by SIGTERM.

Every fence is marked, or says by its language that it is nothing to type (DATA). Those of README that .ci/run runs have
markers of its own (OF_CI).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from booted import booted

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
DATA = ("yaml", "json", "text")  # languages of fences that are nothing to type
OF_CI = ("install", "watch", "send", "test")  # markers of README whose fences .ci/run runs
PATIENCE = 120.0  # seconds for one command
CLOSING = 20.0  # seconds for a terminal to end after SIGTERM
MARKER = re.compile(
    r"<!-- (?:(?P<says>says)|file: (?P<file>[\w.-]+)"
    r"|run(?P<clone> in the clone)?(?: within (?P<seconds>\d+)s)?(?: if (?P<module>\w+))?(?: with (?P<changes>.+))?"
    r"|start(?: (?P<name>\w+))?(?:: (?P<awaited>.+?))?) -->"
)
ALONE = re.compile(
    r"<!-- (?:stop (?P<stop>\w+)|before: (?P<before>.+)|(?P<systemd>on a machine with systemd)"
    r"|beside (?P<beside>\w+) until (?P<until>[^:]+): (?P<command>.+)) -->"
)
FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*(\w*)")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and the like, which a terminal does not show
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A marked fence, or a marker alone: what to do with `text`; `what` is the text to wait for or the seconds to try,
    `name` that of a terminal or a file, `module` of what Python has to have; `clone`: in a clone."""

    line: int
    kind: str
    text: str
    what: str = ""
    name: str = ""
    module: str = ""
    clone: bool = False


class Fence(NamedTuple):
    """Any fence, marked or not: `comment` is the line before it, `line` its own."""

    line: int
    language: str
    text: str
    comment: str


def fences(text: str) -> list[Fence]:
    """All fences of a document, those in lists too; ValueError for one without an end."""
    lines = text.splitlines()
    found: list[Fence] = []
    number = 0
    while number < len(lines):
        if fence := FENCE.match(lines[number]):
            start = number + 1
            while (number := number + 1) < len(lines) and lines[number].strip() != fence[1]:
                pass
            if number == len(lines):
                raise ValueError(f"line {start}: a fence without an end")
            comment = lines[start - 2] if start > 1 else ""
            found.append(Fence(start, fence[2], "\n".join(lines[start:number]) + "\n", comment))
        number += 1
    return found


def marked_blocks(text: str) -> list[Block]:
    """What a document has to be run, in order; ValueError for a marker without a fence, or words to replace that are
    not there."""
    blocks: list[Block] = []
    all_fences = {fence.line: fence for fence in fences(text)}
    inside = {
        line
        for fence in all_fences.values()
        for line in range(fence.line, fence.line + fence.text.count("\n"))
    }
    for number, line in enumerate(text.splitlines(), 1):
        if number - 1 in inside:
            continue
        if marker := ALONE.fullmatch(line):
            blocks.append(_alone(number, marker))
        elif marker := MARKER.fullmatch(line):
            if number + 1 not in all_fences:
                raise ValueError(f"line {number}: no fence after {marker[0]}")
            blocks.append(_block(number, marker, all_fences[number + 1].text))
    return blocks


def _alone(line: int, marker: re.Match[str]) -> Block:
    if marker["stop"]:
        return Block(line, "stop", "", name=marker["stop"])
    if marker["before"]:
        return Block(line, "before", marker["before"] + "\n")
    if marker["systemd"]:
        return Block(line, "systemd", "")
    return Block(line, "start", marker["command"] + "\n", marker["until"], marker["beside"])


def _block(line: int, marker: re.Match[str], text: str) -> Block:
    if marker["says"]:
        return Block(line, "says", text)
    if marker["file"]:
        return Block(line, "file", text, name=marker["file"])
    if marker[0].startswith("<!-- start"):
        return Block(line, "start", text, marker["awaited"] or "", marker["name"] or "")
    for change in filter(None, (marker["changes"] or "").split(", ")):
        new, _, old = change.partition(" for ")
        if not old or old not in text:
            raise ValueError(f"line {line}: there is nothing to replace by {change!r}")
        text = text.replace(old, new)
    module, clone = marker["module"] or "", bool(marker["clone"])
    return Block(line, "run", text, marker["seconds"] or "", module=module, clone=clone)


class Terminal:
    """A command in a terminal of its own; what it says is kept as it comes."""

    def __init__(self, block: Block, argv: list[str], scratch: Path, env: dict[str, str]) -> None:
        self.block = block
        self.said = ""
        self._news = threading.Condition()
        self._ended = False
        self._screen, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        try:
            self._process = subprocess.Popen(
                argv,
                cwd=scratch,
                env=env | {"TERM": "xterm"},
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._screen, 65536)
            except OSError:  # EIO: nobody has the terminal any more
                piece = b""
            with self._news:
                self.said += CONTROL.sub("", piece.decode(errors="replace").replace("\r\n", "\n"))
                self._ended = not piece
                self._news.notify()
            if not piece:
                return

    def wait_for(self, text: str) -> None:
        """Until it has said `text`; AssertionError if it ends without, or is silent about it for too long."""
        with self._news:
            self._news.wait_for(lambda: text in self.said or self._ended, PATIENCE)
            assert text in self.said, self.failed(
                f"it {'ended without saying' if self._ended else 'never said'} {text!r}"
            )

    def close(self, how: signal.Signals = signal.SIGTERM) -> None:
        """The signal to all of it, if it is still there; AssertionError if that does not end it."""
        ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, how)
        try:
            self._process.wait(CLOSING)
        except subprocess.TimeoutExpired:
            ended = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._screen >= 0:
            self._reader.join()
            os.close(self._screen)
            self._screen = -1
        assert ended, self.failed(f"it did not end within {CLOSING:g} s of {how.name}")

    def failed(self, how: str) -> str:
        """For people: where, how, and what it said."""
        return f"line {self.block.line}: {how}\n{self.block.text}\n{self.said}"


def run_blocks(blocks: list[Block], scratch: Path, env: dict[str, str]) -> None:
    """Does what `blocks` say, in order, in `scratch`; AssertionError tells the first that fails.

    Skips in the end when some of it could not be done, and says what was missing.
    """
    said, named, missing = "", dict[str, Terminal](), ""
    with contextlib.ExitStack() as terminals:
        if any(block.kind == "systemd" for block in blocks):
            prefix = terminals.enter_context(booted(scratch))
        else:
            prefix = terminals.enter_context(own_network())
        for block in blocks:
            argv = [*prefix, "bash", "-euo", "pipefail", "-c", block.text]
            if block.clone:
                argv = [*prefix, "bash", "-euo", "pipefail", "-c", f"cd {clone(scratch)}\n{block.text}"]
            if block.kind == "before" and not prefix:
                missing = "root is missing: a network of its own takes it"
                break
            if block.module and find_spec(block.module) is None:
                missing = f"{block.module} is missing: pip install {block.module}"
            elif block.kind == "file":
                (scratch / block.name).write_text(block.text)
            elif block.kind == "says":
                check_said(block, said)
            elif block.kind == "stop":
                named[block.name].close(signal.SIGINT)
            elif block.kind == "start":
                terminal = named[block.name] = Terminal(block, argv, scratch, env)
                terminals.callback(terminal.close)
                terminal.wait_for(block.what)
                said = terminal.said
            elif block.kind != "systemd":
                said = _run(block, argv, scratch, env)
    if missing:
        pytest.skip(missing)


def clone(scratch: Path) -> Path:
    """A directory that has what this repository has, and in which nothing is written but beside that."""
    place = scratch / ".clone"
    if not place.exists():
        place.mkdir()
        for path in ROOT.iterdir():
            if path.name == "docs":  # pages that a command writes into
                shutil.copytree(path, place / path.name)
            elif path.suffix == ".md":  # and those of its own
                shutil.copy(path, place / path.name)
            elif not path.name.startswith("."):
                (place / path.name).symlink_to(path)
    return place


def _run(block: Block, argv: list[str], scratch: Path, env: dict[str, str]) -> str:
    """Runs it to its end, once or until it succeeds; what it printed."""
    until = time.monotonic() + float(block.what or 0)
    while True:
        done = subprocess.run(
            argv,
            cwd=scratch,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode == 0 or time.monotonic() >= until:
            break
    assert done.returncode == 0, f"line {block.line}: exit {done.returncode}\n{block.text}\n{done.stdout}"
    return done.stdout


def check_said(block: Block, said: str) -> None:
    """AssertionError names the first line of `block` that `said` has not, behind those before it."""
    left = iter(said.splitlines())
    for line in block.text.splitlines():
        pattern = re.compile(".*".join(re.escape(part) for part in line.strip().split("...")))
        found = any(pattern.fullmatch(one.strip()) for one in left)
        assert found, f"line {block.line}: {line.strip()!r} was not said, or not there:\n{said}"


@contextlib.contextmanager
def own_network() -> Iterator[list[str]]:
    """In front of a command: run it in a network of its own, with loopback only. Empty where that is not allowed."""
    holder = subprocess.Popen(
        ["unshare", "--net", "bash", "-c", "ip link set lo up && echo up && read -r"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert holder.stdout is not None
    try:
        up = holder.stdout.readline() == "up\n"
        yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net"] if up else []
    finally:
        holder.communicate("\n")


def commands(scratch: Path) -> dict[str, str]:
    """The environment of a terminal in which relay is installed: that of these tests, or else this tree's."""
    here = Path(sys.executable).parent
    path = f"{here}:{os.environ['PATH']}"
    given = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env = given | {"PATH": path, "RELAY_ADMIN": "", "XDG_RUNTIME_DIR": str(scratch)}
    if not (here / "relay").exists():
        made = scratch.parent / f"{scratch.name}-bin"
        made.mkdir()
        (made / "relay").write_text(f'#!/bin/sh\nexec {sys.executable} -m relay "$@"\n')
        (made / "relay").chmod(0o755)
        env |= {"PATH": f"{made}:{path}", "PYTHONPATH": str(ROOT)}
    return env
