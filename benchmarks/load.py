"""The compiled load program, and the accounting of processes it makes possible.

Facts: `wait4` reports the CPU of a child and of those descendants that the child waited for. A descendant
whose parent does not wait (bash may not, for a `>(...)`) is handed to the nearest subreaper, and would be
missed. `ru_maxrss` survives exec: a child of Python seems as large as Python was when it forked.

So every command of a contender runs under `load keep`, a subreaper that waits for all of them. The CPU is
one `wait4` of the keeper, whatever the contender forks (the keeper's own share is about a millisecond). The
resident size is what the keeper, a tiny process, saw of its children.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
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
    """What `wait4` told of a process and all it waited for: user and system CPU in seconds, exit code."""

    cpu: float
    code: int


@contextlib.contextmanager
def compiled(source: Path = SOURCE) -> Iterator[Path]:
    """The load program, or that of another source, compiled into a directory that goes when the block ends."""
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        raise BenchmarkError(
            "no C compiler: the load generator is a C program; install gcc (Debian: gcc libc6-dev)"
        )
    with tempfile.TemporaryDirectory(prefix="relay-bench-load-") as directory:
        program = Path(directory) / "load"
        command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(program), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"{compiler} cannot compile {source}: {done.stderr.strip()}")
        yield program


class Process:
    """One command at work: the only owner of its pid. `wait` reaps it; `kill` ends it and its descendants."""

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
        env: dict[str, str] | None = None,
    ) -> None:
        """Starts `argv` on `cpus` (None: any) in its own session. Descriptors stay the caller's to close."""
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
                env=env,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, before)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def stdout(self) -> IO[bytes]:
        """The reading end of the child's stdout, if it was started with a pipe there."""
        assert self._popen.stdout is not None
        return self._popen.stdout

    def end(self) -> None:
        """SIGTERM to what the keeper runs, which is this process; it tells of the end itself."""
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)

    def wait(self, seconds: float) -> Usage:
        """Waits for the end and returns the usage; BenchmarkError, and nothing reaped, after `seconds`."""
        self.finished(seconds)
        _, status, usage = os.wait4(self._popen.pid, 0)
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        return Usage(usage.ru_utime + usage.ru_stime, self._popen.returncode)

    def finished(self, seconds: float) -> None:
        """Waits for the end, which is told later; BenchmarkError after `seconds`."""
        pidfd = os.pidfd_open(self._popen.pid)
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if not poller.poll(max(0.0, seconds) * 1000):
                raise BenchmarkError(f"still running when its time was up: {' '.join(self.argv)}")
        finally:
            os.close(pidfd)

    def kill(self) -> None:
        """Ends the process if it still runs, and closes what Popen opened. Harmless after `wait`."""
        if self._popen.returncode is None:
            # The keeper dies with its session; what it kept has the same session and dies, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, 9)
            self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()


def kept(load: Path, argv: list[str], report: int) -> list[str]:
    """The command that runs `argv` so that one wait4 tells the CPU of everything it started.

    At the end it writes the KiB of the largest process to the descriptor `report`, which must be passed on.
    """
    return [str(load), "keep", str(report), *argv]
