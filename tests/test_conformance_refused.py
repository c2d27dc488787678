"""Sources and sinks that cannot be opened or read: the words name operation, address, errno and what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from givers import FileGiver
from peers import payload, refused_address
from relays import Relay
from takers import SINKS


def failed_sink(tmp_path: Path, sink: object) -> str:
    """The reason why `sink` failed; the healthy file beside it got everything."""
    giver = FileGiver(str(tmp_path / "in"), tmp_path / "in")
    giver.prepare(b"payload")
    route = {"source": giver.source, "stages": [{"tee": {"to": sink}}], "sink": str(tmp_path / "healthy")}
    with Relay(route) as relay:
        record = relay.wait()
    assert record is not None
    assert record.result == "partial"
    assert (tmp_path / "healthy").read_bytes() == b"payload"
    assert record.sinks[0].result == "failed"
    return record.sinks[0].reason


def test_a_refused_connection(tmp_path: Path) -> None:
    """A refused tcp connection names operation, address, errno and what to do."""
    address = refused_address()
    reason = failed_sink(tmp_path, {"connect": address})
    assert "connecting to" in reason
    assert address in reason
    assert "ECONNREFUSED" in reason
    assert "is the receiver running" in reason


def test_an_unknown_host(tmp_path: Path) -> None:
    """A name that does not resolve is reported as a failed look-up, with what to do."""
    reason = failed_sink(tmp_path, {"connect": "tcp://no-such-host.invalid:9000"})
    assert "looking up 'no-such-host.invalid'" in reason
    assert "check the name" in reason


def test_a_unix_socket_nobody_made(tmp_path: Path) -> None:
    """A unix path that does not exist is ENOENT with a hint."""
    reason = failed_sink(tmp_path, {"connect": f"unix://{tmp_path}/none.sock"})
    assert "ENOENT" in reason
    assert "check the path" in reason


@pytest.mark.parametrize(
    ("make", "code", "hint"),
    [
        (lambda path: (path / "dir").mkdir() or path / "dir", "EISDIR", "name a file"),
        (lambda path: path / "no" / "such" / "file", "ENOENT", "check the path"),
        (lambda path: (path / "plain").write_text("") or path / "plain" / "file", "ENOTDIR", "no directory"),
        (lambda path: path / ("n" * 300), "ENAMETOOLONG", ""),
    ],
)
def test_a_file_that_cannot_be_made(tmp_path: Path, make: object, code: str, hint: str) -> None:
    """A file sink that cannot be opened names the path, the errno and what to do."""
    path = make(tmp_path)
    path = (
        tmp_path / "plain" / "file" if code == "ENOTDIR" else tmp_path / "dir" if code == "EISDIR" else path
    )
    reason = failed_sink(tmp_path, str(path))
    assert code in reason
    assert str(path) in reason
    assert "opening" in reason
    assert hint in reason


def test_a_fifo_path_that_is_no_fifo(tmp_path: Path) -> None:
    """A fifo sink on an ordinary file is refused and leaves the file as it is."""
    (tmp_path / "plain").write_text("mine")
    reason = failed_sink(tmp_path, {"fifo": str(tmp_path / "plain")})
    assert "is not a fifo" in reason
    assert (tmp_path / "plain").read_text() == "mine"


def test_a_descriptor_that_is_not_open(tmp_path: Path) -> None:
    """A descriptor that nobody opened fails with EBADF."""
    assert "EBADF" in failed_sink(tmp_path, {"fd": 999})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing", ("opening", "missing", "ENOENT", "check the path")),
        (".", ("opening", "EISDIR", "name a file")),
        ("a.fifo", ("opening", "not a regular file", "fifo:///path")),
        ({"fd": 999}, ("using fd://999", "EBADF", "redirect something")),
        ({"fifo": "plain"}, ("opening", "is not a fifo")),
        ({"connect": "unix:///nonexistent/x.sock"}, ("connecting to", "ENOENT", "check the path")),
    ],
)
def test_a_source_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: object, words: tuple[str, ...]
) -> None:
    """A source that cannot be opened fails the route with operation, address, errno and hint."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("a.fifo")
    Path("plain").write_text("mine")
    with Relay({"source": source, "sink": "out"}) as relay:
        assert relay.wait() is None
        error = str(relay.route.failed)
    for word in words:
        assert word in error
    assert not Path("out").exists()


def test_a_source_that_nobody_listens_for(tmp_path: Path) -> None:
    """A source that connects and is refused names address, errno and what to do."""
    address = refused_address()
    with Relay({"source": {"connect": address}, "sink": str(tmp_path / "out")}) as relay:
        assert relay.wait() is None
        error = relay.route.failed
    assert error is not None
    assert "ECONNREFUSED" in str(error)
    assert address in str(error)
    assert error.hint


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """A file that shrinks under relay is a failed source, and says what happened."""
    path = tmp_path / "in"
    path.write_bytes(payload(16, 32 << 20))
    with SINKS["tcp4"](tmp_path) as taker, Relay({"source": str(path), "sink": taker.sink}) as relay:
        taker.connection()
        os.truncate(path, 1000)
        taker.take()
        record = relay.wait()
        taker.taken()
    assert record is not None
    assert record.source_failed
    assert "shrank" in record.reason
