"""A relay that gave up rights, and probes in it: each tries what an attacker in relay's process would."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import assert_same, payload, receive_all, send_all
from relays import Process, environment, relay

from relay.kernel import confine as kernel

# Runs relay, and when it is confined tries things on a thread that began after that; says what became of each.
PROBE = """
import errno, json, os, socket, subprocess, sys, threading

def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    except Exception as error:
        return type(error).__name__
    return "done"

def clone_process():
    os._exit(0) if os.fork() == 0 else None

def connect(port):
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))

def bind(port):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))

def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))

def listing(path):
    os.listdir(path)

def read(path):
    os.close(os.open(path, os.O_RDONLY))

def root():
    os.setresuid(0, 0, 0)

def kill(pid):
    os.kill(pid, 0)

def raw():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()

def execute():
    subprocess.run(["/bin/true"], check=True)

def unshare():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")

def late():
    import xml.dom.minidom, decimal  # of the standard library, and with a part in C

def thread():
    one = threading.Thread(target=lambda: None)
    one.start()
    one.join()

def resolve(name):
    socket.getaddrinfo(name, 80)

plan = json.loads(os.environ["PROBES"])

def probes():
    found = {f"{name} {' '.join(map(str, rest))}".strip(): attempt(lambda: globals()[name](*rest))
             for name, *rest in plan}
    for line in open("/proc/thread-self/status"):
        if line.startswith(("NoNewPrivs", "Seccomp:", "Uid", "CapEff")):
            key, value = line.split(":", 1)
            found[key] = value.split()
    said = {"level": "info", "event": "log", "message": "probed", "found": found}
    os.write(2, (json.dumps(said) + "\\n").encode())  # at once: the log is written at the same time

import relay.serving.welcome as welcome
before = welcome.welcome
def after(*words, **options):
    before(*words, **options)
    one = threading.Thread(target=probes)
    one.start()
    one.join()
welcome.welcome = after
sys.argv = ["relay", *sys.argv[5:]]  # what stands before is how the test starts the real one
from relay.cli import main
main()
"""


def probed(text: str, cwd: Path, *probes: tuple[Any, ...], arguments: tuple[str, ...] = ()) -> Any:
    """A relay on a configuration that tries `probes` once it is confined."""
    config = cwd / "conf" / "relay.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(text)
    (cwd / "out").mkdir(exist_ok=True)
    (cwd / "out").chmod(0o777)
    env = environment(PROBES=json.dumps(probes), PYTHONDONTWRITEBYTECODE="1")
    program = cwd / "probe.py"
    program.write_text(PROBE)
    return relay(
        "serve",
        "--log-format",
        "json",
        *arguments,
        config,
        cwd=cwd,
        env=env,
        prefix=[sys.executable, str(program), "--"],
    )


def answers(served: Process) -> dict[str, Any]:
    """What became of the probes."""
    found: dict[str, Any] = served.said("probed")["found"]
    return found


def needs(version: int) -> None:
    """Skips where the kernel's Landlock is older than that."""
    if kernel.landlock_version() < version:
        pytest.skip(f"Landlock has version {kernel.landlock_version()} here, {version} is needed")


def passes(served: Process, out: Path) -> None:
    """A stream still comes through."""
    data = payload(3, 200_003)
    with socket.create_connection(("127.0.0.1", served.port())) as sock:
        send_all(sock, data)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b""
    served.sessions(1)
    (found,) = out.glob("got-*.bin")
    assert_same(found.read_bytes(), data)


def config(home: Path, confine: str, source: str = "tcp://127.0.0.1:0", more: str = "") -> str:
    """One route into files of `home`, confined."""
    sink = f'{{file: "{home}/out/got-{{id}}.bin"}}'
    return f'confine: {confine}\nroutes:\n  r: {{source: {{listen: "{source}"}}, sink: {sink}}}\n{more}'
