"""The C core's tests once more, under AddressSanitizer and UndefinedBehaviorSanitizer.

The core is built into a temporary directory, so the one in the checkout stays what it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from peers import program

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REPORTS = ("AddressSanitizer", "runtime error:")

# Reads 8 KiB into a buffer of 4: what a sanitizer is for.
OVERFLOW = """
import os
from relay.kernel import core
inlet, pipe = os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
scratch = core.buffer(4096)
engine = core.new("engine", epoll=-1, null_fd=-1, scratch=scratch, scratch_size=8192, budget=1)
source = core.new_end(inlet[0], core.POLLED, core.COPY)
source.readable = 1
node = core.new("node", pipe_r=pipe[0], pipe_w=pipe[1], capacity=65536, left=-1, align=1)
pipeline = core.new("pipeline", head=node, nodes=1, source=source)
os.write(inlet[1], bytes(8192))
core.lib.relay_sweep(engine, pipeline, core.ffi.new("struct relay_event[]", 64), 64)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which `import relay` means a copy whose core was built with both sanitizers."""
    found = subprocess.run(
        [program("gcc"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    libasan = found.stdout.strip()
    if not Path(libasan).is_absolute():
        pytest.skip("libasan is missing: apt-get install libgcc-12-dev (or that of your gcc)")
    copy = tmp_path_factory.mktemp("sanitized")
    without_builds = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "_pump.c")
    shutil.copytree(ROOT / "relay", copy / "relay", ignore=without_builds)
    shutil.copytree(ROOT / "configs", copy / "configs")
    build = [sys.executable, str(copy / "relay" / "kernel" / "build.py")]
    built = subprocess.run(
        build, env={**os.environ, "RELAY_SANITIZE": "1"}, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONMALLOC": "malloc",  # Python's own arenas would hide where an object ends
        "LD_PRELOAD": libasan,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "RELAY_EXAMPLES": "30",
    }


def python(environment: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in that environment, away from the checkout."""
    argv = [sys.executable, *words]
    where = environment["PYTHONPATH"]
    return subprocess.run(argv, env=environment, cwd=where, capture_output=True, text=True, check=False)


def test_the_sanitizers_report(sanitized: dict[str, str]) -> None:
    """An overflow in the core is reported: a quiet run below means something."""
    ended = python(sanitized, "-c", OVERFLOW)
    assert ended.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ended.stderr, ended.stderr


@pytest.mark.timeout(420)
def test_the_core_is_clean_under_the_sanitizers(sanitized: dict[str, str]) -> None:
    """The tests of the pump, the loop and the ferry pass, and neither sanitizer has anything to say."""
    where = python(sanitized, "-c", "from relay.kernel import _pump; print(_pump.__file__)")
    assert where.stdout.startswith(sanitized["PYTHONPATH"]), where.stdout + where.stderr
    files = (
        "test_pump.py",
        "test_pump_schedules.py",
        "test_schedules.py",
        "test_loop.py",
        "test_ferry.py",
        "test_spans.py",
        "test_files_measured.py",
        "test_gauge.py",
        "test_chain.py",
        "test_duplex.py",
        "test_duplex_bytes.py",
        "test_duplex_connecting.py",
        "test_duplex_sessions.py",
        "test_duplex_matrix.py",
        "test_proxy_accepted.py",
        "test_proxy_sent.py",
        "test_proxy_protocol.py",
    )
    # other programs do not run well with the sanitizers' library in front of theirs; stages are for the pump's tests
    staged = "staged and (test_duplex_bytes or test_duplex_connecting or test_duplex_sessions)"
    ours = ("-k", f"not (test_proxy and (one_way or turns or tees or short_counts)) and not ({staged})")
    quiet = ("-q", "-x", "-p", "no:cacheprovider", "--timeout", "380")
    ended = python(sanitized, "-m", "pytest", *quiet, *ours, *(str(HERE / name) for name in files))
    said = ended.stdout + ended.stderr
    assert not any(report in said for report in REPORTS), said
    assert ended.returncode == 0, said
