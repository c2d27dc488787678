"""The compiled load program, and the accounting of processes it makes possible.

Facts: `wait4` reports the CPU of a child and of those descendants that the child waited for. A descendant whose parent
does not wait (bash never waits for a `>(...)`) is handed to the nearest subreaper instead, and would be missed.

So every command runs under `load keep`, a subreaper that waits until nothing is left. The CPU of a contender is then one
`wait4` of its keeper, whatever the contender forks. The keeper's own share is well under a millisecond.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SOURCE = Path(__file__).with_name("load.c")


class BenchmarkError(Exception):
    """A measurement that could not be made; the message says which and why."""


@dataclass(frozen=True)
class Usage:
    """What `wait4` told of a process and its descendants: seconds of CPU, KiB of the largest one, exit code."""

    cpu: float
    rss_kib: int
    code: int


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    """The load program, compiled into a temporary directory that goes when the block ends."""
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        raise BenchmarkError(
            "no C compiler: the load generator is a C program; install gcc (Debian: gcc libc6-dev)"
        )
    with tempfile.TemporaryDirectory(prefix="relay-bench-load-") as directory:
        program = Path(directory) / "load"
        command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(program), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"{compiler} cannot compile {SOURCE}: {done.stderr.strip()}")
        yield program


class Process:
    """One command at work: the only owner of its pid. `wait` reaps it; `kill` ends it with all its descendants."""

    def __init__(
        self,
        argv: list[str],
        *,
        cpus: frozenset[int] | None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.DEVNULL,
        stderr: IO[bytes],
        pass_fds: tuple[int, ...] = (),
        cwd: Path | None = None,
    ) -> None:
        """Starts `argv` on `cpus` (None: any), in a session of its own. Descriptors stay the caller's to close."""
        self.argv = argv
        before = os.sched_getaffinity(0)
        try:
            # Affinity is inherited: set here, it holds for the child from its first instruction.
            if cpus is not None:
                os.sched_setaffinity(0, cpus)
            self._popen = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=pass_fds,
                cwd=cwd,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, before)

    @property
    def stdout(self) -> IO[bytes]:
        """The reading end of the child's stdout, if it was started with a pipe there."""
        assert self._popen.stdout is not None
        return self._popen.stdout

    def wait(self, seconds: float) -> Usage:
        """Waits for the end and returns the usage; BenchmarkError, and nothing reaped, after `seconds`."""
        pidfd = os.pidfd_open(self._popen.pid)
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if not poller.poll(max(0.0, seconds) * 1000):
                raise BenchmarkError(f"still running when its time was up: {' '.join(self.argv)}")
        finally:
            os.close(pidfd)
        _, status, usage = os.wait4(self._popen.pid, 0)
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, self._popen.returncode)

    def kill(self) -> None:
        """Ends the process if it still runs, and closes what Popen opened. Harmless after `wait`."""
        if self._popen.returncode is None:
            # The keeper dies with its session; what it kept has the same session and dies, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, 9)
            self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()


def kept(load: Path, argv: list[str]) -> list[str]:
    """The command that runs `argv` so that one wait4 tells the CPU of everything it started."""
    return [str(load), "keep", *argv]
