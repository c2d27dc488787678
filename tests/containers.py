"""The image of this tree, built and run as a user of it does, on a machine without a registry or a Docker engine.

buildah and podman have a storage of their own under $XDG_CACHE_HOME/relay-image; the base is made by debootstrap there
once. Networks are namespaces without an outside: nothing is published, no firewall rule is made. Takes root, and the
Debian packages of PROGRAMS.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from netns import inside
from peers import PATIENCE, program
from relays import ROOT

PROGRAMS = ("podman", "buildah", "runc", "debootstrap")
BASE = "docker.io/library/debian:bookworm-slim"
TAG = "localhost/relay:test"
HARDENED = (
    "--read-only",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--tmpfs=/sockets",
)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

_numbers = itertools.count(1)


def home() -> Path:
    """Where images, the base and their settings are kept from one run to the next."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "relay-image"


def settings() -> dict[str, str]:
    """The environment for podman and buildah: a storage of their own, and what works without systemd."""
    place = home()
    place.mkdir(parents=True, exist_ok=True)
    hard = int(subprocess.run(["bash", "-c", "ulimit -Hn"], capture_output=True, check=True).stdout)
    _written(
        place / "storage.conf",
        f'[storage]\ndriver = "overlay"\ngraphroot = "{place}/storage"\nrunroot = "{place}/runroot"\n',
    )
    _written(
        place / "containers.conf",
        f'[containers]\ndefault_ulimits = ["nofile=1024:{hard}", "nproc=4096:4096"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n',
    )
    return {
        **os.environ,
        "CONTAINERS_STORAGE_CONF": str(place / "storage.conf"),
        "CONTAINERS_CONF": str(place / "containers.conf"),
    }


def _written(path: Path, text: str) -> None:
    """The file has that text, and never another or a part of it: a test run beside this one reads it."""
    if path.exists() and path.read_text() == text:
        return
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(text)
    whole.rename(path)


def podman(*words: str, check: bool = True, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Runs podman; what it says on stdout and stderr is in the answer."""
    done = subprocess.run(
        ["podman", *words], capture_output=True, text=True, env=settings(), timeout=patience, stdin=-3
    )
    assert not check or done.returncode == 0, f"podman {' '.join(words)}: {done.stdout}{done.stderr}"
    return done


@functools.cache
def image() -> str:
    """The image of this tree: built once a session. Skips where that is not possible."""
    if os.geteuid():
        pytest.skip("root is missing: building an image takes it")
    for name in PROGRAMS:
        program(name)
    env = settings()
    with open(home() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be building
        if podman("image", "exists", BASE, check=False).returncode:
            _make_base(env)
        _run(building(), env)
    return TAG


def building() -> list[str]:
    """The command that builds the image of this tree from what is there of it."""
    return [
        *("buildah", "bud", "--runtime", "runc", "--isolation", "oci", "--pull-never", "--layers"),
        *("--network=host", "--format", "docker", *_pip(), "-t", TAG, str(ROOT)),
    ]


def _run(argv: Sequence[str], env: dict[str, str]) -> None:
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, stdin=-3
    )
    assert done.returncode == 0, f"{' '.join(argv)}:\n{done.stdout[-4000:]}"


def _make_base(env: dict[str, str]) -> None:
    """What the official base has: a minimal Debian, without the documents."""
    place = home() / "base"
    shutil.rmtree(place, ignore_errors=True)
    _run(["debootstrap", "--variant=minbase", "bookworm", str(place)], env)
    for path in (
        "var/cache/apt/archives",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
    ):
        shutil.rmtree(place / path, ignore_errors=True)
        (place / path).mkdir()
    (place / "var/lib/apt/lists/partial").mkdir()
    (place / "var/cache/apt/archives/partial").mkdir()
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if sources.exists():  # the suites of updates, as the official image has them
        shutil.copy(sources, place / "etc/apt/sources.list.d/")
        (place / "etc/apt/sources.list").unlink(missing_ok=True)
    tar = home() / "base.tar"
    _run(["tar", "-C", str(place), "-cf", str(tar), "."], env)
    _run(["podman", "import", "-q", "--change", 'CMD ["bash"]', str(tar), BASE], env)
    shutil.rmtree(place)
    tar.unlink()


def _pip() -> list[str]:
    """The machine's certificates for pip in the build, at a place of their own."""
    if not CERTIFICATES.exists():
        return []
    place = home() / "pip"
    place.mkdir(exist_ok=True)
    shutil.copy(CERTIFICATES, place / "ca.crt")
    (place / "pip.conf").write_text("[global]\ncert = /run/hostpip/ca.crt\n")
    return ["-v", f"{place}:/run/hostpip:ro", "-v", f"{place}/pip.conf:/etc/pip.conf:ro"]


class Container:
    """A container at work, in a network of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def inspect(self, what: str) -> str:
        """A field of `podman inspect`, as a Go template."""
        return podman("inspect", self.name, "-f", what).stdout.strip()

    @property
    def log(self) -> list[dict[str, Any]]:
        """The JSON lines of its log."""
        lines = podman("logs", self.name).stderr.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def said(self, text: str) -> None:
        """Waits until its log has a message with that text."""
        said = any(text in line["message"] for line in self.log)
        until = time.monotonic() + PATIENCE
        while not said:
            assert time.monotonic() < until, f"{text!r} was never said: {podman('logs', self.name).stderr}"
            said = any(text in line["message"] for line in self.log)

    def exec(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command in it."""
        return podman("exec", self.name, *words, check=check)

    def healthy(self) -> bool:
        """What its HEALTHCHECK says now."""
        return podman("healthcheck", "run", self.name, check=False).returncode == 0

    def connect(self, port: int) -> socket.socket:
        """A socket inside its network, connected to one of its ports."""
        with self.inside():
            sock = socket.socket()
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", port))
        return sock

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes in the block are in its network."""
        with inside(f"/proc/{self.inspect('{{.State.Pid}}')}/ns/net"):
            yield

    def stop(self) -> int:
        """docker stop: the exit status."""
        podman("stop", "-t", "15", self.name)
        return int(self.inspect("{{.State.ExitCode}}"))


@contextlib.contextmanager
def running(*command: str, options: Sequence[str] = (), network: str = "none") -> Iterator[Container]:
    """`docker run -d OPTIONS image COMMAND`, removed with its volumes at the end."""
    name = f"relay-test-{os.getpid()}-{next(_numbers)}"
    tag = image()
    podman("run", "-d", f"--network={network}", "--name", name, *options, tag, *command)
    try:
        yield Container(name)
    finally:
        podman("rm", "-f", "-v", name)


def once(*command: str, options: Sequence[str] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
    """`docker run --rm OPTIONS image COMMAND` to its end."""
    tag = image()
    return podman("run", "--rm", "--no-healthcheck", "--network=none", *options, tag, *command, check=check)
