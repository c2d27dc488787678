"""Faults for whole programs: system calls that fail (strace) and system calls that come short (LD_PRELOAD).

Both work on any command, so they reach the C core and other people's programs alike.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from peers import program

CALLS = ("splice", "tee", "vmsplice", "sendfile", "send", "recv", "read", "write")  # the order in short.c

# What libc's functions are called where strace looks.
KERNEL_NAMES = {"send": "sendto", "recv": "recvfrom"}


@functools.cache
def _strace_refusal() -> str:
    """Why strace cannot inject here, or nothing."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is missing: apt-get install strace"
    probe = [strace, "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=splice", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else ""


def strace_prefix(*rules: str) -> list[str]:
    """The words to put in front of a command so that `rules` hold in it, its threads and its children.

    A rule is CALL[,CALL...]:FAULT[:when=EXPRESSION]. FAULT is `error=ERRNO`, `retval=N` (forged: the call is
    not executed), `delay_enter=MICROSECONDS` or `delay_exit=MICROSECONDS`; `when=3` the third call, `3+` from
    the third on, `3+5` the 3rd, 8th, 13th, `3..5` the 3rd to the 5th, counted for each thread. `send` and
    `recv` are understood as sendto and recvfrom. `signal=` is refused: it is lost with --seccomp-bpf, which
    keeps calls that are not traced at full speed. The command's exit status becomes strace's own.
    """
    assert rules, "strace_prefix takes at least one rule"
    refusal = _strace_refusal()
    if refusal:
        pytest.skip(refusal)
    named: list[str] = []
    injections: list[str] = []
    for rule in rules:
        calls, _, fault = rule.partition(":")
        assert fault, f"{rule!r} is no rule: CALL:FAULT[:when=...]"
        assert "signal=" not in fault, "signal= is lost with --seccomp-bpf"
        kernel = [KERNEL_NAMES.get(call, call) for call in calls.split(",")]
        named += kernel
        injections += ["-e", f"inject={','.join(kernel)}:{fault}"]
    trace = ",".join(dict.fromkeys(named))
    # -o keeps the trace out of the command's stderr, which tests read.
    options = ["-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", f"trace={trace}"]
    return [program("strace"), *options, *injections]


def strace_trace(calls: Sequence[str], into: Path) -> list[str]:
    """The words to put in front of a command so that its `calls`, those of its threads and of its children are written
    to the file `into`, in the order in which they were made."""
    refusal = _strace_refusal()
    if refusal:
        pytest.skip(refusal)
    return [program("strace"), "-f", "-qq", "-o", str(into), "-e", f"trace={','.join(calls)}"]


def strace_inject(argv: Sequence[str | Path], *rules: str) -> list[str]:
    """`argv` with `rules` in force; see strace_prefix."""
    return [*strace_prefix(*rules), *map(str, argv)]


@dataclasses.dataclass(frozen=True)
class Count:
    """What happened to one kind of call: made, shortened, interrupted."""

    calls: int
    shortened: int
    interrupted: int


@dataclasses.dataclass(frozen=True)
class ShortCounts:
    """The compiled shim: `environment()` puts it into force for a command, `counts()` proves that it was."""

    library: Path
    ledger: Path

    @classmethod
    def build(cls, directory: Path) -> ShortCounts:
        """Compiles short.c into `directory`; skips the test where there is no compiler."""
        library = directory / "short.so"
        source = Path(__file__).with_name("faults") / "short.c"
        words = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]
        argv = [program("gcc"), *words, str(library), str(source)]
        made = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        return cls(library, directory / "ledger")

    def environment(
        self,
        seed: int,
        *,
        rate: int = 20,
        eintr: int = 0,
        calls: Sequence[str] = ("splice", "tee", "vmsplice", "sendfile", "send", "recv"),
        base: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """The environment, on top of `base` or os.environ, that makes `calls` come short; resets the counts.

        `rate` and `eintr` in percent. The same seed makes the same decisions for the same calls.
        """
        unknown = set(calls) - set(CALLS)
        assert not unknown, f"no such calls in short.c: {sorted(unknown)}"
        self.ledger.write_bytes(bytes(len(CALLS) * 24))
        return {
            **(os.environ if base is None else base),
            "LD_PRELOAD": str(self.library),
            "FAULT_SEED": str(seed),
            "FAULT_RATE": str(rate),
            "FAULT_EINTR": str(eintr),
            "FAULT_CALLS": ",".join(calls),
            "FAULT_COUNTS": str(self.ledger),
        }

    def counts(self) -> dict[str, Count]:
        """What has happened since the last environment(), in every process that had it, ended or not."""
        raw = self.ledger.read_bytes()
        return {call: Count(*struct.unpack_from("3Q", raw, place * 24)) for place, call in enumerate(CALLS)}
