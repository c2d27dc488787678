"""`relay serve` at its start: what it makes and replaces, what stops it, and with which words."""

from __future__ import annotations

import signal
import socket
import stat
from pathlib import Path

import pytest
from peers import connected, eventually, receive_all
from pushes import EACH
from relays import environment, relay, run_relay, serving


def test_a_unix_socket_is_made_and_removed(tmp_path: Path) -> None:
    """The socket file has the mode that was asked for, and is gone at the end."""
    config = 'routes: {r: {source: {listen: "unix://in.sock", mode: 0620}, sink: "null:"}}'
    config = config.replace("unix://in.sock", f"unix://{tmp_path}/in.sock")
    with serving(config, tmp_path) as served:
        served.addresses(1)
        status = (tmp_path / "in.sock").stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o620
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert not (tmp_path / "in.sock").exists()


def test_a_stale_socket_is_replaced_even_after_a_kill(tmp_path: Path) -> None:
    """kill -9 leaves a socket file that the next start takes over."""
    config = f'routes: {{r: {{source: {{listen: "unix://{tmp_path}/in.sock"}}, sink: out}}}}'
    with serving(config, tmp_path) as served:
        served.addresses(1)
        sock = connected(f"unix://{tmp_path}/in.sock")
        sock.sendall(b"x" * 1000)
        eventually(lambda: (tmp_path / "out").exists() and (tmp_path / "out").stat().st_size, "bytes arrive")
        served.signal(signal.SIGKILL)
        served.wait()
        sock.close()
    assert (tmp_path / "in.sock").exists()
    with serving(config, tmp_path) as served:
        served.addresses(1)
        with connected(f"unix://{tmp_path}/in.sock") as sock:
            sock.sendall(b"again")
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
        served.sessions()
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"again"


def test_a_killed_relay_leaves_a_part_that_blocks_nobody(tmp_path: Path) -> None:
    """The `.part` of a relay that was killed keeps the next one neither from the path nor from its bytes."""
    config = EACH.format(file="in/{route}.bin")
    part = tmp_path / "in" / "r.bin.part"
    for text in (b"one", b"two"):
        with serving(config, tmp_path) as served:
            port = served.port()
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(text)
                if text == b"one":
                    eventually(lambda: part.exists() and part.stat().st_size, "bytes arrive")
                    served.signal(signal.SIGKILL)
                    served.wait()
                    continue
                sock.shutdown(socket.SHUT_WR)
                receive_all(sock)
            served.sessions()
    whole = [path.read_bytes() for path in (tmp_path / "in").iterdir() if path.suffix == ".bin"]
    assert whole == [b"two"]


def test_a_path_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    """An ordinary file where the socket should be stays as it is: exit code 4 and what to do."""
    (tmp_path / "in.sock").write_text("mine")
    config = f'routes: {{r: {{source: {{listen: "unix://{tmp_path}/in.sock"}}, sink: "null:"}}}}'
    with serving(config, tmp_path) as served:
        assert served.wait() == 4
        assert "not a socket" in served.text
    assert (tmp_path / "in.sock").read_text() == "mine"


def test_a_socket_in_use_is_refused(tmp_path: Path) -> None:
    """A second relay on the same unix path or port ends with 4 and leaves the first alone."""
    config = f'routes: {{r: {{source: {{listen: "unix://{tmp_path}/in.sock"}}, sink: "null:"}}}}'
    with serving(config, tmp_path) as first:
        first.addresses(1)
        with serving(config, tmp_path) as second:
            assert second.wait() == 4
            assert "EADDRINUSE" in second.text
        with connected(f"unix://{tmp_path}/in.sock"):
            pass
        first.signal(signal.SIGTERM)
        assert first.wait() == 0


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A port that somebody has is exit code 4, with the address, the errno and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:{port}"}}, sink: "null:"}}}}'
        with serving(config, tmp_path) as served:
            assert served.wait() == 4
            assert f"tcp://127.0.0.1:{port}" in served.text
            assert "EADDRINUSE" in served.text
            assert "choose another port" in served.text


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        (
            "routes:\n  r:\n    source: {listen: 'tcp://127.0.0.1:0'}\n    sink: 'tpc://h:1'\n",
            ":4:11: ",
            "did you mean",
        ),
        ("", ":1:1: ", "empty"),
        ("- a\n- b\n", ":1:1: ", "mapping"),
        ("routes: {r: {source: 'tcp://h:99999', sink: 'null:'}}", ":1:22: ", "99999"),
    ],
)
def test_a_configuration_that_is_wrong(tmp_path: Path, text: str, where: str, said: str) -> None:
    """A wrong configuration is exit code 3, with file, line, column and the word at fault."""
    with serving(text, tmp_path) as served:
        assert served.wait() == 3
        assert f"relay.yaml{where}" in served.text
        assert said in served.text


def test_a_large_configuration_is_refused_quickly(tmp_path: Path) -> None:
    """100 MB of configuration are refused with code 3, without eating the machine."""
    path = tmp_path / "huge.yaml"
    with path.open("wb") as stream:
        stream.write(b"routes:\n")
        stream.truncate(100_000_000)
    done = run_relay("serve", path, cwd=tmp_path)
    assert done.returncode == 3
    assert str(path) in done.stderr.decode()


def test_relay_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    """The built-in default is found without a configuration; a taken port says which."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 9001))
        except OSError:
            pass  # somebody else has it: as good
        else:
            taken.listen()
        with relay("serve", cwd=tmp_path, env=environment()) as served:
            assert served.wait() == 4
            assert "tcp://127.0.0.1:9001" in served.text
