"""What happens when descriptors, pipe pages or threads run out: it is said, and nobody else is harmed."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - getaddrinfo wants it; a child of another user may not be able to read it
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import become, forked, needs_root
from limited import connect, is_in
from peers import assert_same, eventually, payload, receive_all
from relays import Relay, end, serving

from relay.kernel.pipe import Pipe


def test_no_descriptors_are_a_pause(tmp_path: Path) -> None:
    """Without descriptors newcomers wait, which is said seldom; a stream that runs is whole; then they are served."""
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))}
    data = payload(1, 8 << 20)
    with serving(
        'routes: {r: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "{id}"}}}', tmp_path, **limit
    ) as served:
        first = connect(served)
        first.sendall(data[:100])
        eventually(lambda: (tmp_path / "1.part").exists(), "the first stream begins")
        crowd = [connect(served) for _ in range(60)]
        line = served.until(
            lambda: next((x for x in served.lines if x.get("event") == "cannot_accept"), None)
        )
        assert "ulimit" in line["message"]
        first.sendall(data[100:])
        first.shutdown(socket.SHUT_WR)
        assert receive_all(first) == b""
        first.close()
        began = time.monotonic()
        for sock in crowd:
            sock.close()
        eventually(lambda: is_in(connect(served)), "there is room again")
        served.said("accepting on")
        end(served)
        seconds = time.monotonic() - began
    assert_same((tmp_path / "1").read_bytes(), data)
    complaints = [line for line in served.lines if line.get("event") == "cannot_accept"]
    assert len(complaints) <= 2 + seconds / 10


@needs_root
def test_no_pipe_pages_are_smaller_pipes() -> None:
    """An unprivileged user's pipes beyond the budget are small, never an error, and large again once others go."""

    def spend() -> list[int]:
        become(64987)
        resource.setrlimit(resource.RLIMIT_NOFILE, (2400, 2400))
        pipes = [Pipe() for _ in range(1100)]
        sizes = [pipe.capacity for pipe in pipes]
        for pipe in pipes:
            pipe.close()
        with Pipe() as last:
            return [sizes[0], min(sizes), last.capacity]

    with forked(spend) as child:
        first, least, last = child.answer()
    assert first == last == 1 << 20
    assert 4096 <= least < 65536


def stream(user: int, data: bytes, spoil: Callable[[], object]) -> dict[str, Any]:
    """In a child: as `user`, one stream through a tee into two files, `spoil` called when relay is ready.

    What the two files hold is in `same`; the record's sinks are in `sinks`; the client's end is in `whole`.
    """
    become(user)
    folder = Path(tempfile.mkdtemp())
    try:
        route: dict[str, Any] = {
            "source": {"listen": "tcp://127.0.0.1:0"},
            "stages": [{"tee": {"to": {"file": f"{folder}/a"}}}],
            "sink": {"file": f"{folder}/b"},
        }
        with Relay(route) as relay:
            kept = spoil()
            with socket.create_connection(("127.0.0.1", int(relay.bound[0].rpartition(":")[2]))) as sock:
                try:
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    whole = receive_all(sock) == b""
                except (ConnectionResetError, BrokenPipeError):
                    whole = False
            record = relay.wait()
            assert record is not None
            del kept
        found = [path.read_bytes() == data for path in sorted(folder.iterdir())]
        return {"same": found, "sinks": [sink.as_dict() for sink in record.sinks], "whole": whole}
    finally:
        shutil.rmtree(folder)


@needs_root
def test_streams_flow_without_pipe_pages() -> None:
    """A user whose budget of pipe pages is spent gets his streams through the smallest of pipes."""

    def spend() -> list[Pipe]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        pipes = [Pipe() for _ in range(1200)]
        assert pipes[-1].capacity < 65536
        return pipes

    data = payload(2, 4 << 20)
    with forked(lambda: stream(64986, data, spend)) as child:
        answer = child.answer()
    assert answer["whole"]
    assert answer["same"] == [True, True]


@needs_root
def test_no_threads_are_a_failed_sink() -> None:
    """A file needs a thread: where none is to be had it is that sink's failure, with its errno, and the end is told."""

    def spend() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

    with forked(lambda: stream(64985, b"content", spend)) as child:
        answer = child.answer()
    assert not answer["whole"]
    assert [sink["result"] for sink in answer["sinks"]] == ["failed", "failed"]
    assert all("EAGAIN" in sink["reason"] for sink in answer["sinks"])
