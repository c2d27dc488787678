"""File sinks on disks that are full, read-only, broken, stalled, or that refuse O_DIRECT.

RELAY_FREEZE=1 also freezes a loop-mounted ext4, which needs root and a loop device.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from file_routes import offer, route, send, traced
from peers import assert_same, eventually, payload, receive_all, run
from relays import end, serving

from relay.endpoints.written import DIRECT_PIECE


def length(path: Path) -> int:
    """The size of a file, -1 while there is none."""
    return path.stat().st_size if path.exists() else -1


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[object]:
    """A function that mounts a filesystem on a new directory. All are unmounted at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda kind, *options: stack.enter_context(disks.mounted(tmp_path / kind, kind, *options))


def test_where_direct_is_refused_it_says_why(tmp_path: Path, mounted: object) -> None:
    """A filesystem without O_DIRECT is written through the page cache; a warning says so."""
    place = mounted("ramfs")  # type: ignore[operator] # the fixture is a function
    with serving(route(f'file: "{place}/{{id}}", direct: true'), tmp_path) as served:
        send(served, b"x" * 5000)
        assert "O_DIRECT is refused" in served.said("page cache")["message"]
        served.sessions(1)
        end(served)
    assert (place / "1").read_bytes() == b"x" * 5000


@pytest.mark.parametrize(
    "how", ["", ", direct: true", ", rotate: {size: 10MiB}", ", append: true", ", fsync: 1s"]
)
def test_a_full_disk_keeps_what_was_written(tmp_path: Path, mounted: object, how: str) -> None:
    """ENOSPC fails that file alone; the record's bytes are the file's size, and it is named."""
    place = mounted("tmpfs", "-o", "size=1m")  # type: ignore[operator] # the fixture is a function
    data = payload(3, 4 << 20)
    config = route("file: whole", f', stages: [{{tee: {{to: {{file: "{place}/small"{how}}}}}}}]')
    with serving(config, tmp_path) as served:
        offer(served, data)
        (record,) = served.sessions(1)
        end(served)
    small = record["sinks"][0]
    assert small["result"] == "failed"
    assert "ENOSPC" in small["reason"]
    written = Path(small["path"]).read_bytes()
    assert len(written) == small["bytes"]
    assert 0 < len(written) <= 1 << 20
    assert_same(written, data[: len(written)])
    assert_same((tmp_path / "whole").read_bytes(), data)


def test_a_size_limit_is_exact(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the bytes of the record are the bytes of the file, also where they are copied."""
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_001, 100_001))}
    for number, how in enumerate((", append: true", "")):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = route("file: whole", ", stages: [{tee: {to: {file: limited" + how + "}}}]").replace(
            "file: whole", "file: /dev/null"
        )
        with serving(config, folder, **limit) as served:
            offer(served, b"x" * 300_000)
            (record,) = served.sessions(1)
            end(served)
        assert "EFBIG" in record["sinks"][0]["reason"]
        assert record["sinks"][0]["bytes"] == (folder / "limited").stat().st_size == 100_001


def test_a_disk_that_is_read_only(tmp_path: Path, mounted: object) -> None:
    """EROFS is the sink's failure when its file is opened; the other sink gets all."""
    place = mounted("tmpfs", "-o", "ro")  # type: ignore[operator] # the fixture is a function
    with serving(route("file: whole", f', stages: [{{tee: {{to: "{place}/x"}}}}]'), tmp_path) as served:
        offer(served, b"content")
        (record,) = served.sessions(1)
        end(served)
    assert "EROFS" in record["sinks"][0]["reason"]
    assert (tmp_path / "whole").read_bytes() == b"content"


def test_a_write_error_in_the_middle(tmp_path: Path) -> None:
    """EIO of a write fails that file; what was written before stays, is named, and is what the record counts."""
    data = payload(13, 3 * DIRECT_PIECE)
    inject = ("-e", "inject=pwrite64:error=EIO:when=2+")
    served, _trace = traced(tmp_path, 'file: "{id}", direct: true', data, *inject)
    (record,) = served.sessions()
    assert record["result"] == "failed"
    assert "EIO" in record["sinks"][0]["reason"]
    assert record["sinks"][0]["path"] == "1.part"
    assert record["sinks"][0]["bytes"] == DIRECT_PIECE
    assert_same((tmp_path / "1.part").read_bytes(), data[:DIRECT_PIECE])


def test_a_stalled_file_stalls_nobody(tmp_path: Path) -> None:
    """A file that is a pipe nobody reads, under drop: the other sink has every byte meanwhile, and relay ends."""
    os.mkfifo(tmp_path / "stalled")
    data = payload(11, 16 << 20)
    more = ", stages: [{tee: {to: {file: stalled, on_slow: {policy: drop, after: 0s}}}}]"
    with serving(route("file: whole", more), tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(data)
            eventually(lambda: length(tmp_path / "whole") == len(data), "the other file has all")
            served.signal(signal.SIGTERM)
            served.said("draining")
            served.signal(signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)
        assert served.wait() == 1
    assert_same((tmp_path / "whole").read_bytes(), data)


def test_a_frozen_disk_stalls_nobody(tmp_path: Path) -> None:
    """A filesystem that is frozen under a file: other routes and sinks go on, and it goes on when thawed."""
    if os.environ.get("RELAY_FREEZE") != "1":
        pytest.skip("RELAY_FREEZE=1 is missing: it mounts and freezes an ext4 on a loop device, as root")
    image, place = tmp_path / "image", tmp_path / "ext4"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    assert run(["mkfs.ext4", "-q", image]).returncode == 0
    assert run(["mount", "-o", "loop", image, place]).returncode == 0
    data = payload(12, 24 << 20)
    frozen = False
    try:
        more = f', stages: [{{tee: {{to: {{file: "{place}/f", on_slow: {{policy: spill, max: 64MiB}}}}}}}}]'
        with serving(route("file: whole", more), tmp_path) as served:
            with socket.create_connection(("127.0.0.1", served.port())) as sock:
                sock.sendall(data[:1000])
                eventually(lambda: any(place.glob("f*")), "the file begins")
                frozen = run(["fsfreeze", "-f", place]).returncode == 0
                assert frozen
                sock.sendall(data[1000:])
                eventually(lambda: length(tmp_path / "whole") == len(data), "the other file has all")
                assert run(["fsfreeze", "-u", place]).returncode == 0
                frozen = False
                sock.shutdown(socket.SHUT_WR)
                receive_all(sock)
            served.sessions(1)
            end(served)
        assert_same((place / "f").read_bytes(), data)
    finally:
        if frozen:
            run(["fsfreeze", "-u", place])
        run(["umount", place])
