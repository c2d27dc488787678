"""Filesystems of a test's own: small ones that fill up, and kinds that refuse something."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import program


@contextlib.contextmanager
def mounted(place: Path, kind: str, *options: str) -> Iterator[Path]:
    """A filesystem of that kind at the new directory `place`; skips the test where nobody may mount one."""
    if os.geteuid() != 0:
        pytest.skip(f"root is missing: only root mounts {kind}")
    place.mkdir()
    made = subprocess.run(
        [program("mount"), "-t", kind, *options, "none", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mounting {kind} is refused here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        # a thread of relay's that is just ending may still have a file open there
        subprocess.run([program("umount"), "-l", place], check=True)


def small_disk(place: Path, size: int) -> contextlib.AbstractContextManager[Path]:
    """A filesystem of `size` bytes in memory at the new directory `place`."""
    return mounted(place, "tmpfs", "-o", f"size={size}")
