"""SIGHUP that changes nothing, and one that finds a socket's path gone or taken."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
from peers import accept, eventually, receive_all, refused, tcp_listener
from relays import end, serving
from reloads import KEPT, connect, each, finish, free_port, reload


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("routes: {r: {source: '-', sink: 'null:', methd: copy}}", "1:42", "did you mean 'method'"),
        ("routes: [", "2:1", "not valid YAML"),
        ("", "1:1", "empty"),
    ],
)
def test_a_bad_configuration_changes_nothing(tmp_path: Path, text: str, where: str, said: str) -> None:
    """What cannot be read is told with file, line and column; the old routes go on, and a good one is taken later."""
    with serving("routes:\n" + KEPT, tmp_path) as served:
        port = served.port()
        sock = connect(port)
        sock.sendall(b"x")
        served.config.write_text(text)
        served.signal(signal.SIGHUP)
        line = served.said("not reloaded")
        assert f"relay.yaml:{where}: " in line["message"]
        assert said in line["message"]
        assert line["level"] == "error"
        served.said("stays as it was")
        finish(sock)
        finish(connect(port))
        served.sessions(2)
        reload(served, "routes:\n" + KEPT + each("more", 0, "more-{id}"))
        end(served)


def test_a_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    """A configuration that cannot be opened is refused like a bad one."""
    with serving("routes:\n" + KEPT, tmp_path) as served:
        port = served.port()
        served.config.unlink()
        served.signal(signal.SIGHUP)
        assert "ENOENT" in served.said("not reloaded")["message"]
        finish(connect(port))
        end(served)


def test_a_route_that_cannot_be_opened_changes_nothing(tmp_path: Path) -> None:
    """A port that is taken is told with its place in the file; routes that were to go or change are as before."""
    a, b, c = free_port(), free_port(), free_port()
    before = "routes:\n" + KEPT + each("gone", a, "gone-{id}") + each("other", b, "old-{id}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        after = "routes:\n" + KEPT + each("other", b, "new-{id}") + each("more", c, "m-{id}")
        after += each("worse", port, "w")
        with serving(before, tmp_path) as served:
            served.addresses(3)
            sock = connect(b)
            sock.sendall(b"before ")
            eventually(lambda: list(tmp_path.glob("old-*")), "the stream begins")
            served.config.write_text(after)
            served.signal(signal.SIGHUP)
            line = served.said("not reloaded")
            assert "relay.yaml:5:20: worse: listening on" in line["message"]
            assert "EADDRINUSE" in line["message"]
            served.said("stays as it was")
            assert refused(c)
            sock.sendall(b"after")
            finish(sock)
            for again in (a, b):
                finish(connect(again))
            served.sessions(3)
            end(served)
    assert (tmp_path / "old-1").read_bytes() == b"before after"
    assert not list(tmp_path.glob("new-*"))


@pytest.mark.parametrize("how", ["removed", "replaced"])
@pytest.mark.parametrize("duplex", [False, True])
def test_a_socket_whose_file_is_gone_is_bound_anew(tmp_path: Path, how: str, duplex: bool) -> None:
    """The route is the same, its socket's file was removed or replaced by a stale one: SIGHUP makes it anew."""
    path = tmp_path / "in"
    with tcp_listener() as (listening, address):
        sink, more = (address, ", duplex: true") if duplex else ("o-{id}", "")
        text = f"routes: {{r: {{source: {{listen: 'unix://{path}', mode: 0o620}}, sink: '{sink}'{more}}}}}"
        with serving(text, tmp_path) as served, socket.socket(socket.AF_UNIX) as early:
            served.addresses(1)
            early.connect(str(path))
            path.unlink()
            if how == "replaced":
                with socket.socket(socket.AF_UNIX) as stale:
                    stale.bind(str(path))
            reload(served, text)
            served.addresses(2)
            with socket.socket(socket.AF_UNIX) as late:
                late.connect(str(path))
                assert path.stat().st_mode & 0o777 == 0o620
                for number, sock in enumerate((early, late)):
                    sock.sendall(b"here")
                    sock.shutdown(socket.SHUT_WR)
                    if duplex:
                        with accept(listening) as server:
                            assert receive_all(server) == b"here"
                    assert receive_all(sock) == b""
                    assert len(served.sessions(number + 1)) == number + 1
            end(served)
    assert not path.exists()


def test_a_socket_whose_path_somebody_took_stays_deaf_and_says_so(tmp_path: Path) -> None:
    """Another program listens at the path now: it is left alone, relay names it, and takes the path when it is free."""
    path = tmp_path / "in"
    text = f"routes: {{r: {{source: 'unix://{path}', sink: 'o-{{id}}'}}}}"
    with serving(text, tmp_path) as served:
        served.addresses(1)
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen(8)
            reload(served, text)
            assert "EADDRINUSE" in served.said("another program listens there")["message"]
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                other.accept()[0].close()
        reload(served, text)
        served.addresses(2)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"here")
            finish(sock)
        served.sessions(1)
        end(served)
    assert (tmp_path / "o-1").read_bytes() == b"here"
