"""Descriptors that epoll cannot watch: only a regular file is always ready, everything else has failed and says so."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from descriptors import Descriptors
from faults import strace_prefix
from peers import payload, receive_all, tcp_listener
from relays import environment, serving

from relay.endpoints.base import Source
from relay.endpoints.socket import SocketSink, SocketSource
from relay.engine import Engine
from relay.kernel import core


def test_a_regular_file_is_always_ready(engine: Engine, fds: Descriptors, tmp_path: Path) -> None:
    """EPERM means a file that never waits: it is used without being watched."""
    source = Source(engine, "a file")
    path = tmp_path / "file"
    path.touch()
    assert source.attach(os.open(path, os.O_RDONLY), select.EPOLLIN)
    assert (source.c.kind, source.c.readable) == (core.INSTANT, 1)
    source.close()


@pytest.mark.parametrize("role", ["source", "sink"])
def test_another_refusal_is_the_ends_failure(engine: Engine, role: str) -> None:
    """A descriptor that is in the set already (EEXIST) is not taken for one that never waits: the end fails, once."""
    near, far = socket.socketpair()
    failed: list[object] = []
    other = engine.watch(near.fileno(), select.EPOLLIN, lambda _mask: None)
    if role == "source":
        source = SocketSource(engine, "tcp://x:1", near, "peer")
        source.on_open = lambda: failed.append("open")
        source.on_fail = failed.append
        source.open()
        assert source.closed
    else:
        sink = SocketSink(engine, "tcp://x:1")
        sink.on_open = lambda _sink: failed.append("open")
        sink.on_fail = lambda broken: failed.append(broken.failed_with)
        sink.adopt(near)
        assert (sink.state, sink.closed) == ("failed", True)
    other.close()
    assert "watching tcp://x:1: File exists (EEXIST)" in str(failed)
    assert len(failed) == 1
    assert receive_all_or_reset(far) == b""
    far.close()


def receive_all_or_reset(sock: socket.socket) -> bytes:
    """What came before the end, or before the reset."""
    try:
        return receive_all(sock)
    except ConnectionResetError:
        return b""


def test_hints_name_the_limit(engine: Engine) -> None:
    """ENOSPC on a socket is no full disk: the error says which sysctl to raise."""
    sink = SocketSink(engine, "tcp://x:1")
    for operation in ("watching", "connecting to"):
        assert "fs.epoll.max_user_watches" in str(sink.error(operation, errno.ENOSPC))


CHILD = """
import errno, os, socket
from relay.endpoints.connecting import Connecting
from relay.endpoints.ferry import Ferry
from relay.engine import Engine
from relay.errors import KernelError
from relay.kernel import core
engine = Engine("test")  # its own wake-up is the first
listener = socket.create_server(("127.0.0.1", 0))
said = []
Connecting(engine, [(socket.AF_INET, listener.getsockname())], lambda sock, code: said.append((sock, code)))
print(said == [(None, errno.ENOSPC)], said)
before = len(os.listdir("/proc/self/fd"))
try:
    Ferry(engine, core.new_end(), 65536, lambda: None, lambda *_: None)
except KernelError as error:
    print("max_user_watches" in str(error) and error.errno == errno.ENOSPC, error)
print(len(os.listdir("/proc/self/fd")) == before)
"""


def test_what_waits_inside_is_given_up_too() -> None:
    """A connect and a ferry whose descriptor cannot be watched fail at once, and leave nothing open."""
    done = subprocess.run(
        [*strace_prefix("epoll_ctl:error=ENOSPC:when=2+"), sys.executable, "-c", CHILD],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["True"] * 3, done.stdout + done.stderr


def test_a_sink_that_cannot_be_watched_fails_alone(tmp_path: Path) -> None:
    """With the user's watches used up a connection's sink fails with the hint, and its sibling has every byte."""
    data = payload(1, 100_000)
    (tmp_path / "in").write_bytes(data)
    with tcp_listener() as (_listener, address):
        text = f"engines: 1\nroutes: {{r: {{source: in, stages: [tee: {{to: '{address}'}}], sink: out}}}}\n"
        # on the thread that carries the file: the connect, the file's ferry, the end of the connect, the connection
        with serving(text, tmp_path, prefix=strace_prefix("epoll_ctl:error=ENOSPC:when=4")) as served:
            assert served.wait() == 1, served.text
            said = served.sessions()[0]["sinks"][0]
    assert "watching tcp://" in said["reason"]
    assert "fs.epoll.max_user_watches" in said["reason"]
    assert (tmp_path / "out").read_bytes() == data
