"""A piece of a test in a process of its own: as another user, with other signals, or where it may block."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import eventually


class Forked:
    """A child that runs one function. `pid` is alive or a zombie until the `with` block ends."""

    def __init__(self, pid: int, answers: int) -> None:
        self.pid = pid
        self._answers = answers

    def state(self) -> str:
        """The letter of /proc/PID/stat: R runs, S waits, D waits and cannot be killed, Z has ended."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def wait_until_blocked(self, letter: str = "S") -> None:
        """Returns when the child waits in the kernel; fails if it ends instead.

        A child starts by saying that it is there, so a wait cannot be one of the fork's own.
        """
        eventually(lambda: self.state() in (letter, "Z"), f"child {self.pid} in state {letter}")
        assert self.state() == letter, f"the child ended instead of waiting: {self.answer()!r}"

    def answer(self) -> Any:
        """What the function returned (through JSON); OSError comes back as an OSError, raised here."""
        raw = b""
        while chunk := os.read(self._answers, 65536):
            raw += chunk
        if not raw:
            raise EOFError("the child ended without an answer")
        kind, value = json.loads(raw)
        if kind == "errno":
            raise OSError(value, os.strerror(value))
        assert kind == "value", value
        return value

    def status(self) -> int:
        """Waits for the end: the exit status, or minus the signal that ended it. The zombie stays."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


@contextlib.contextmanager
def forked(function: Callable[[], Any]) -> Iterator[Forked]:
    """Runs `function` in a child; the child is killed, if need be, and reaped at the end of the block."""
    answers, reply = os.pipe()
    ready, hello = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        os.close(ready)
        _run(function, hello, reply)
    os.close(reply)
    os.close(hello)
    try:
        os.read(ready, 1)
        yield Forked(pid, answers)
    finally:
        os.close(ready)
        os.close(answers)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _run(function: Callable[[], Any], hello: int, reply: int) -> None:
    """The child's whole life. It never returns into pytest."""
    try:
        os.close(hello)
        try:
            message = ["value", function()]
        except OSError as error:
            message = ["errno", error.errno]
        except BaseException:
            message = ["failure", traceback.format_exc()]
        with os.fdopen(reply, "w") as stream:
            json.dump(message, stream)
    finally:
        sys.stderr.flush()
        os._exit(0)


def become(user: int) -> None:
    """In a child: gives up root for `user`, a number nobody else uses, so that its budgets are all ours."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root is missing: only root becomes another user")
