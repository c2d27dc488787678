"""Files of `relay serve`: names that are taken, directories that are missing, disks that are full."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from peers import assert_same, eventually, payload, receive_all
from pushes import EACH, push
from relays import serving


def test_a_path_with_placeholders_never_overwrites(tmp_path: Path) -> None:
    """A name that is taken gets -2, then -3."""
    (tmp_path / "r.bin").write_text("mine")
    with serving(EACH.format(file="{route}.bin"), tmp_path) as served:
        port = served.port()
        push(port, b"one")
        push(port, b"two")
        served.sessions(2)
    assert (tmp_path / "r.bin").read_text() == "mine"
    assert (tmp_path / "r-2.bin").read_bytes() == b"one"
    assert (tmp_path / "r-3.bin").read_bytes() == b"two"


def test_a_plain_path_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    """The old content stands until the new one is whole; a symlink keeps its target's place."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "out").symlink_to("real")
    config = EACH.format(file="out").replace('0"}', '0", connections: each}')
    with serving(config, tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(b"new")
            eventually(lambda: any(p.suffix == ".part" for p in tmp_path.iterdir()), "it is written")
            assert (tmp_path / "out").read_text() == "old"
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        served.sessions()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_one_level_of_directory_is_made(tmp_path: Path) -> None:
    """A directory that is missing is made, two are not."""
    with serving(EACH.format(file="a/b/{id}"), tmp_path) as served:
        port = served.port()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)
        assert "ENOENT" in served.sessions()[0]["sinks"][0]["reason"]
    assert not (tmp_path / "a").exists()


def test_what_a_unix_peer_is_called_makes_no_path(tmp_path: Path) -> None:
    """{peer} in a path is reduced to letters, digits, dots, dashes and underscores."""
    with serving(EACH.format(file="in/{peer}/../{peer}").replace("/../", "-"), tmp_path) as served:
        push(served.port(), b"x")
        served.sessions()
    (file,) = (tmp_path / "in").iterdir()
    assert file.name.replace("127.0.0.1-", "").replace("-", "").isdigit()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    with disks.small_disk(tmp_path / "small", 1 << 20) as place:
        yield place


def test_a_full_disk_fails_that_sink_alone(tmp_path: Path, small_disk: Path) -> None:
    """ENOSPC fails the file that met it and names its `.part`; the other file is whole."""
    data = payload(3, 4 << 20)
    config = EACH.format(file="whole-{id}").replace(
        "    sink", "    stages: [{tee: {to: 'small/{id}'}}]\n    sink"
    )
    config = config.replace("{{", "{").replace("}}}}", "}}")
    with serving(config, tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port())) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                receive_all(sock)
        (record,) = served.sessions()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert record["result"] == "partial"
    assert "ENOSPC" in record["sinks"][0]["reason"]
    assert "free some space" in record["sinks"][0]["reason"]
    assert record["sinks"][0]["path"] == "small/1.part"
    assert_same((tmp_path / "whole-1").read_bytes(), data)


def test_a_file_size_limit_fails_that_sink_alone(tmp_path: Path) -> None:
    """RLIMIT_FSIZE is EFBIG for the file, no death by SIGXFSZ."""
    config = 'routes: {r: {source: "-", stages: [{tee: {to: limited}}], sink: "null:"}}'
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))}
    source = tmp_path / "source"
    source.write_bytes(payload(4, 3 << 20))
    with source.open("rb") as stdin, serving(config, tmp_path, stdin=stdin, **limit) as served:
        assert served.wait() == 1
        (record,) = served.sessions()
    assert "EFBIG" in record["sinks"][0]["reason"]
    assert record["sinks"][1]["bytes"] == 3 << 20
