"""When rights are given up: the filter of system calls is there before any thread is, and gets stricter afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import strace_trace
from forked import needs_root
from peers import assert_same, payload, send_all
from relays import Process, environment, relay

NOBODY = 65534

# Runs relay, and tries things at two moments: before the first thread is started, and on a thread of its own when
# relay is ready. Says what became of each, and what the kernel tells of every thread there is.
PROBE = """
import ctypes, errno, json, os, socket, subprocess, sys, threading

libc = ctypes.CDLL(None, use_errno=True)

def raw(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

TRIED = {
    "execute": lambda: subprocess.run(["/bin/true"], check=True),
    "fork": lambda: os.fork() or os._exit(0),
    "raw socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "unshare": lambda: raw(NUMBERS["unshare"], 0),
    "ptrace": lambda: raw(NUMBERS["ptrace"], 0, 0, 0, 0),
    "kill": lambda: os.kill(os.getpid(), 0),
    "setuid": lambda: raw(NUMBERS["setuid"], os.getuid()),
    "capset": lambda: raw(NUMBERS["capset"], 0, 0),
    "setresuid": lambda: os.setresuid(-1, -1, -1),  # which changes nothing, and anybody may
    "setresgid": lambda: os.setresgid(-1, -1, -1),
    "seccomp": lambda: raw(NUMBERS["seccomp"], 2, 0, ctypes.byref(ctypes.c_uint(0))),  # asks which answers there are
}
NUMBERS = json.loads(os.environ["NUMBERS"])

def look(moment):
    threads = []
    found = {name: attempt(action) for name, action in TRIED.items()}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as status:
            lines = dict(line.rstrip("\\n").split(":\\t", 1) for line in status if ":\\t" in line)
        threads.append({key: lines.get(key) for key in ("Seccomp", "Seccomp_filters", "NoNewPrivs", "Uid")})
    said = {"level": "info", "event": "log", "message": moment, "found": found, "threads": threads}
    os.write(2, (json.dumps(said) + "\\n").encode())

start = threading.Thread.start
def started(self):
    threading.Thread.start = start
    look("before threads")
    start(self)
threading.Thread.start = started

import relay.serving.welcome as welcome
before = welcome.welcome
def after(*words, **options):
    before(*words, **options)
    one = threading.Thread(target=look, args=("ready to serve",))
    one.start()
    one.join()
welcome.welcome = after
sys.argv = ["relay", *sys.argv[5:]]  # what stands before is how the test starts the real one
from relay.cli import main
main()
"""

NUMBERS = {  # of system calls: of x86_64, and of all processors that came after it
    "x86_64": {"unshare": 272, "ptrace": 101, "setuid": 105, "capset": 126, "seccomp": 317},
    "aarch64": {"unshare": 97, "ptrace": 117, "setuid": 146, "capset": 91, "seccomp": 277},
    "riscv64": {"unshare": 97, "ptrace": 117, "setuid": 146, "capset": 91, "seccomp": 277},
}.get(os.uname().machine)
ALWAYS_REFUSED = ("execute", "fork", "raw socket", "unshare", "ptrace", "kill", "setuid", "capset")
TO_BECOME = ("setresuid", "setresgid", "seccomp")

pytestmark = pytest.mark.skipif(
    NUMBERS is None, reason="the numbers of this processor's system calls are missing"
)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that any user may enter: pytest's own are for their owner only."""
    made = Path(tempfile.mkdtemp(prefix="relay-confine-", dir="/var/tmp"))
    made.chmod(0o755)
    (made / "out").mkdir()
    (made / "out").chmod(0o777)
    yield made
    shutil.rmtree(made)


def written(home: Path, confine: str) -> Path:
    """A configuration of one route into files of `home`, confined so."""
    path = home / "relay.yaml"
    sink = f'{{file: "{home}/out/got-{{id}}.bin"}}'
    path.write_text(
        f"engines: 2\nconfine: {confine}\nadmin: {{socket: 'unix://{home}/out/admin'}}\n"
        f'routes:\n  r: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: {sink}}}\n'
    )
    return path


def looked(home: Path, confine: str) -> Any:
    """A relay on that configuration, which looks at itself."""
    probe = home / "probe.py"
    probe.write_text(PROBE)
    env = environment(NUMBERS=json.dumps(NUMBERS), PYTHONDONTWRITEBYTECODE="1")
    prefix = [sys.executable, str(probe), "--"]
    return relay("serve", "--log-format", "json", written(home, confine), cwd=home, env=env, prefix=prefix)


def passes(served: Process, home: Path) -> None:
    """A stream comes through."""
    data = payload(3, 200_003)
    with socket.create_connection(("127.0.0.1", served.port())) as sock:
        send_all(sock, data)
        sock.shutdown(socket.SHUT_WR)
        served.sessions(1)
    (found,) = (home / "out").glob("got-*.bin")
    assert_same(found.read_bytes(), data)


@needs_root
def test_a_filter_is_there_before_the_first_thread_and_a_stricter_one_after_the_user(home: Path) -> None:
    """Before any thread is started relay can become another user and no more; then every thread has a second filter,
    which takes that away as well."""
    with looked(home, f"{{user: {NOBODY}, files: false, ports: false, calls: true}}") as process:
        first = process.said("before threads")
        (alone,) = first["threads"]
        assert {key: alone[key] for key in ("Seccomp", "NoNewPrivs", "Uid")} == {
            "Seccomp": "2",
            "NoNewPrivs": "1",
            "Uid": "0\t0\t0\t0",
        }
        assert first["found"] == dict.fromkeys(ALWAYS_REFUSED, "EPERM") | dict.fromkeys(TO_BECOME, "done")
        then = process.said("ready to serve")
        assert then["found"] == dict.fromkeys((*ALWAYS_REFUSED, *TO_BECOME), "EPERM")
        assert len(then["threads"]) >= 5  # this, the log's, two engines', the admin socket's, and the probe's
        before, now = alone["Seccomp_filters"], str(int(alone["Seccomp_filters"] or 0) + 1)
        assert before is None or {each["Seccomp_filters"] for each in then["threads"]} == {now}
        assert {each["Seccomp"] for each in then["threads"]} == {"2"}
        assert {each["Uid"] for each in then["threads"]} == {"\t".join([str(NOBODY)] * 4)}
        passes(process, home)


def test_without_a_user_to_become_the_strict_filter_is_the_first(home: Path) -> None:
    """Nothing is left to become: before any thread is started all is refused that ever will be, by a single filter."""
    with looked(home, "{files: false, ports: false, calls: true}") as process:
        first, then = process.said("before threads"), process.said("ready to serve")
        assert first["found"] == then["found"] == dict.fromkeys((*ALWAYS_REFUSED, *TO_BECOME), "EPERM")
        (alone,) = first["threads"]
        assert alone["Seccomp"] == "2"
        assert {each["Seccomp_filters"] for each in then["threads"]} == {alone["Seccomp_filters"]}
        passes(process, home)


@needs_root
def test_the_kernel_saw_the_filter_before_any_thread(home: Path) -> None:
    """Of the calls that make filters and threads, and change the user, a filter comes first; the user changes between
    the first filter and the second, and no thread is older than the first."""
    trace = home / "trace"
    calls = ("seccomp", "clone", "clone3", "fork", "vfork", "setgroups", "setresgid", "setresuid")
    path = written(home, f"{{user: {NOBODY}, calls: true}}")
    tracing = strace_trace(calls, trace)
    with relay("serve", "--exit-idle", "10ms", path, cwd=home, prefix=tracing) as process:
        assert process.wait() == 0
    lines = trace.read_text().splitlines()
    # a call that others came in between is written in two lines, and none of the first thread's own is made in between
    main = lines[0].split()[0]
    steps = [re.split(r"[ (]+", line)[1] for line in lines if line.startswith(f"{main} ")]
    assert steps[0] == "seccomp"
    assert "SECCOMP_SET_MODE_FILTER" in lines[0]
    assert lines[0].endswith("= 0")
    threads = [number for number, line in enumerate(lines) if re.search(r" clone3?\(", line)]
    assert threads
    assert [line for line in lines if re.search(r" v?fork\(", line)] == []
    own = [step for step in steps if step in calls and not step.startswith("clone")]
    assert own == ["seccomp", "setgroups", "setresgid", "setresuid", "seccomp"]


def python(home: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Runs that program, and gives what it said."""
    return subprocess.run(
        [sys.executable, "-c", text], env=environment(), cwd=home, capture_output=True, text=True, check=False
    )


def test_rights_are_not_given_up_behind_a_threads_back(home: Path) -> None:
    """A thread that `threading` knows nothing of, as a library's own, is seen, and relay does not go on."""
    done = python(
        home,
        "import _thread, os, threading\n"
        "from relay.config.data import from_data\n"
        "from relay.confinement.confinement import Confinement\n"
        "_thread.start_new_thread(os.read, (os.pipe()[0], 1))\n"
        "assert threading.active_count() == 1\n"
        "routes = {'r': {'source': 'null:', 'sink': 'null:'}}\n"
        "Confinement(from_data({'confine': {}, 'routes': routes}, 'test')).begin()\n",
    )
    assert done.returncode == 1
    assert "rights are given up when threads are there already" in done.stderr


def test_nothing_that_relay_imports_starts_a_thread(home: Path) -> None:
    """When every module of relay and what it needs are there, there is one thread."""
    done = python(
        home,
        "import importlib, os, pkgutil, relay\n"
        "for each in pkgutil.walk_packages(relay.__path__, 'relay.'):\n"
        "    if not each.name.endswith(('__main__', '.build')):\n"
        "        importlib.import_module(each.name)\n"
        "print(len(os.listdir('/proc/self/task')))\n",
    )
    assert done.stdout == "1\n", done.stderr


def test_a_program_that_uses_relay_keeps_its_rights(home: Path) -> None:
    """A configuration that is run from code gives up nothing of the program's, and says so."""
    (home / "in").write_bytes(b"x")
    done = python(
        home,
        "import logging, os, relay\n"
        "logging.basicConfig()\n"
        "routes = {'r': {'source': {'file': 'in'}, 'sink': {'file': 'out/it'}}}\n"
        "assert relay.run({'confine': {}, 'routes': routes}).code == 0\n"
        "os.fork() or os._exit(0)\n"
        "print(open('/proc/self/status').read())\n",
    )
    assert "not confined: the process is not relay's own" in done.stderr, done.stderr
    assert "Seccomp:\t0\n" in done.stdout or "Seccomp:\t2\n" in Path("/proc/self/status").read_text()
    assert "NoNewPrivs:\t0\n" in done.stdout or "NoNewPrivs:\t1\n" in Path("/proc/self/status").read_text()
