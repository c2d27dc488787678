"""Routes into a file: whole streams to them, the trace of one, and what a file makes of a pipe."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from peers import receive_all
from relays import Process, relay

from relay.endpoints.written import WrittenFile
from relay.kernel.pipe import Pipe


def route(sink: str, more: str = "") -> str:
    """One route into a file."""
    return f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: {{{sink}}}{more}}}}}'


def send(served: Process, *pieces: bytes) -> None:
    """One stream, whole; returns when relay has closed it."""
    with socket.create_connection(("127.0.0.1", served.port())) as sock:
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b""


def offer(served: Process, data: bytes) -> None:
    """One stream; returns when relay has closed it, also by a reset because one of its sinks does not have it."""
    with socket.create_connection(("127.0.0.1", served.port())) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            receive_all(sock)


def put(file: WrittenFile, data: bytes) -> None:
    """Gives a file `data` through a pipe."""
    with Pipe() as pipe:
        view = memoryview(data)
        while view:
            count = os.write(pipe.write_fd, view[:65536])
            view = view[count:]
            while count:
                before = file.written
                file.take(pipe, count)
                count -= file.written - before


def traced(tmp_path: Path, sink: str, data: bytes, *inject: str, more: str = "") -> tuple[Process, str]:
    """Serves one stream under strace; the process, ended, and the trace of what syncs and renames."""
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,link,linkat,pwrite64"
    prefix = ["strace", "-f", "-qq", "-y", "-o", str(trace), "-e", calls, *inject]
    config = tmp_path / "relay.yaml"
    config.write_text(route(sink, more))
    with relay("serve", "--log-format", "json", config, cwd=tmp_path, prefix=prefix) as served:
        offer(served, data)
        served.sessions(1)
        (child,) = Path(f"/proc/{served.pid}/task/{served.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        served.wait()
        return served, trace.read_text()
