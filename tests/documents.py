"""What documents tell people to type, run as they would: terminals, files, and what a command says.

An HTML comment right before a fence says what the fence is for:

    <!-- run -->                  run it; it must succeed
    <!-- run within 5s -->        the same, again and again until it succeeds, for so long
    <!-- start NAME: TEXT -->     run it in a terminal of its own, and go on when that has said TEXT; NAME and TEXT may
                                  be left out: without TEXT it goes on at once
    <!-- file: NAME -->           save it as NAME
    <!-- says -->                 what the fence before it printed: these lines, in this order, with others in between;
                                  `...` is any text within a line

`<!-- stop NAME -->` alone is Ctrl-C in that terminal, until it has ended. The fences of a document share a scratch
directory and, where this user may make one, a network of their own, so that their ports are free. Terminals are closed
in the end by SIGTERM.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATIENCE = 50.0  # seconds for one command
CLOSING = 20.0  # seconds for a terminal to end after SIGTERM
MARKER = re.compile(
    r"<!-- (?:(?P<plain>run|says)|run within (?P<seconds>\d+)s|start(?: (?P<name>\w+))?(?:: (?P<awaited>.+?))?"
    r"|stop (?P<stopped>\w+)|file: (?P<file>[\w.-]+)) -->"
)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and the like, which a terminal does not show
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A marked fence: what to do with `text`; `what` is the text to wait for or the seconds to try, `name` that of a
    terminal or a file."""

    line: int
    kind: str
    text: str
    what: str = ""
    name: str = ""


def marked_blocks(text: str) -> list[Block]:
    """The marked fences of a document; ValueError for a marker without a fence or a fence without an end."""
    lines = text.splitlines()
    blocks: list[Block] = []
    number = 0
    while number < len(lines):
        fence = re.match(r"(`{3,})", lines[number])
        marker = MARKER.fullmatch(lines[number])
        if marker and marker["stopped"]:
            blocks.append(Block(number + 1, "stop", "", name=marker["stopped"]))
        elif marker:
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
                blocks.append(_block(start - 1, marker, "\n".join(lines[start:number]) + "\n"))
        number += 1
    return blocks


def _block(line: int, marker: re.Match[str], text: str) -> Block:
    if marker["plain"] or marker["seconds"]:
        return Block(line, marker["plain"] or "run", text, marker["seconds"] or "")
    if marker["file"]:
        return Block(line, "file", text, name=marker["file"])
    return Block(line, "start", text, marker["awaited"] or "", marker["name"] or "")


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
    """Does what `blocks` say, in order, in `scratch`; AssertionError tells the first that fails."""
    said, named = "", dict[str, Terminal]()
    with own_network() as prefix, contextlib.ExitStack() as terminals:
        for block in blocks:
            argv = [*prefix, "bash", "-euo", "pipefail", "-c", block.text]
            if block.kind == "file":
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
            else:
                said = _run(block, argv, scratch, env)


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
    env = {**os.environ, "PATH": path, "RELAY_ADMIN": "", "XDG_RUNTIME_DIR": str(scratch)}
    if not (here / "relay").exists():
        made = scratch.parent / f"{scratch.name}-bin"
        made.mkdir()
        (made / "relay").write_text(f'#!/bin/sh\nexec {sys.executable} -m relay "$@"\n')
        (made / "relay").chmod(0o755)
        env |= {"PATH": f"{made}:{path}", "PYTHONPATH": str(ROOT)}
    return env
