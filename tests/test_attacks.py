"""Odd and hostile uses of the real program, from addresses and names to a flood of signals: what is promised holds."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest
from attacks import connect, finish, routes
from peers import eventually, payload, refused_address
from relays import Process, end, run_relay, serving


@pytest.mark.parametrize(
    ("limits", "let_in"),
    [
        ("deny: ['::ffff:127.0.0.1']", False),
        ("deny: ['::ffff:127.0.0.0/104']", False),
        ("deny: ['::/0']", True),
        ("allow: ['::ffff:0:0/96']", True),
        ("allow: ['::ffff:10.0.0.0/104']", False),
    ],
)
def test_mapped_addresses_in_allow_and_deny(tmp_path: Path, limits: str, let_in: bool) -> None:
    """An IPv4 network may be written as IPv4-mapped IPv6; a network of other IPv6 addresses has no IPv4 peers."""
    config = routes(f"{{source: {{listen: 'tcp://127.0.0.1:0', limits: {{{limits}}}}}, sink: 'o-{{id}}'}}")
    with serving(config, tmp_path) as served:
        sock = connect(served)
        with contextlib.suppress(OSError):
            sock.sendall(b"here")
            finish(sock)
        if let_in:
            served.sessions()
        else:
            served.said("refused")
        end(served)
    assert (tmp_path / "o-1").exists() is let_in


def test_a_source_that_would_connect_to_itself(tmp_path: Path) -> None:
    """A source that connects to a port where nobody listens never talks to itself."""
    port = int(refused_address().rpartition(":")[2])
    config = routes(f"{{source: {{connect: 'tcp://127.0.0.1:{port}'}}, sink: 'o-{{id}}'}}")
    with serving(config, tmp_path) as served:
        served.said("the source is away")
        end(served)
    assert not list(tmp_path.glob("o-*"))


@pytest.mark.parametrize(
    ("sinks", "back"),
    [
        (["tcp://127.0.0.1:{0}"], True),
        (["tcp://localhost:{1}", "unix://{dir}/s", "tcp://127.0.0.1:{0}"], True),
        (["tcp://127.0.0.1:{1}", "unix://{dir}/s", "null:"], False),
    ],
)
def test_a_stream_that_would_come_back(tmp_path: Path, sinks: list[str], back: bool) -> None:
    """Routes that feed each other in a circle are refused with their place; a row of routes is none."""
    ports = [int(refused_address().rpartition(":")[2]) for _ in range(2)]
    sources = [f"tcp://:{ports[0]}", f"tcp://:{ports[1]}", f"unix://{tmp_path}/s"]
    text = "routes:\n"
    for number, (source, sink) in enumerate(zip(sources, sinks, strict=False)):
        where = sink.format(*ports, dir=tmp_path)
        text += f"  r{number}: {{source: {{listen: '{source}', connections: each}}, sink: '{where}'}}\n"
    (tmp_path / "c.yaml").write_text(text)
    done = run_relay("check", tmp_path / "c.yaml", cwd=tmp_path)
    assert done.returncode == (3 if back else 0), done.stderr
    if back:
        assert done.stderr.count(b"again and again") == len(sinks)
        assert b"c.yaml:2:" in done.stderr


def test_two_hundred_reloads_over_fifty_flows(tmp_path: Path) -> None:
    """Signals pour in while other routes change: fifty streams of a route that stays are each whole."""
    keep = '  r: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "o-{id}"}}\n'
    other = '  x: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: {{file: "x-{{id}}"}}, method: {}}}\n'
    texts = ["routes:\n" + keep + other.format(how) for how in ("auto", "copy")]
    with serving(texts[0], tmp_path) as served:
        datas = [payload(100 + i, 400_000 + i) for i in range(50)]
        socks = [connect(served) for _ in datas]
        for at in range(200):
            served.config.write_text(texts[at % 2])
            served.signal(signal.SIGHUP)
            for sock, data in zip(socks, datas, strict=True):
                sock.sendall(data[at * 2001 : at * 2001 + 2001])
        for sock, data in zip(socks, datas, strict=True):
            sock.sendall(data[200 * 2001 :])
            finish(sock)
        served.sessions(50)
        end(served)
    wanted = sorted(datas)
    assert sorted(path.read_bytes() for path in tmp_path.glob("o-*")) == wanted


def test_term_during_a_reload(tmp_path: Path) -> None:
    """SIGHUP and SIGTERM at once, in either order: relay ends with 0 and leaves no socket file."""
    text = "routes:\n" + "".join(
        f"  r{i}: {{source: {{listen: 'unix://{tmp_path}/s{i}'}}, sink: {{file: 'o{i}-{{id}}'}}}}\n"
        for i in range(40)
    )
    for order in ((signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGHUP)):
        with serving(text, tmp_path) as served:
            served.said("ready")
            served.config.write_text(text.replace("-{id}", "-{id}-x"))
            for number in order:
                served.signal(number)
            assert served.wait() == 0, served.text
        assert not list(tmp_path.glob("s[0-9]*"))


def test_five_thousand_connections_of_one_peer(tmp_path: Path) -> None:
    """`per_peer: 50`: fifty are in and work, all others are reset, said at a bounded rate, and leave nothing behind."""
    config = routes("{source: {listen: 'tcp://127.0.0.1:0', limits: {per_peer: 50}}, sink: 'null:'}")
    with serving(config, tmp_path) as served:
        port = served.port()
        served.said("ready")
        before = open_files(served)
        inside = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for sock in inside:
            sock.sendall(b"in")
        eventually(lambda: open_files(served) >= before + 50, "all fifty are in")
        for _ in range(99):
            crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
            for sock in crowd:
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
                sock.close()
        for sock in inside:
            finish(sock)
        assert {record["result"] for record in served.sessions(50)} == {"delivered"}
        eventually(lambda: open_files(served) <= before + 1, "nothing is left of them")
        late = socket.create_connection(("127.0.0.1", port))
        late.sendall(b"again")
        finish(late)
        served.sessions(51)
        end(served)
    refused = [line for line in served.lines if line.get("event") == "refused"]
    assert 0 < len(refused) < 60
    assert refused[0]["count"] >= 1


def open_files(served: Process) -> int:
    """How many descriptors the process has."""
    return len(os.listdir(f"/proc/{served.pid}/fd"))  # noqa: PTH208 - only their number


def test_a_sidecar_does_not_stand_with_rotate(tmp_path: Path) -> None:
    """One checksum for many files says nothing: refused with its line."""
    text = routes(
        "{source: 'tcp://127.0.0.1:0', sink: {file: 'o-{id}', rotate: {size: 1MiB}, sidecar: sha256}}"
    )
    (tmp_path / "c.yaml").write_text(text)
    done = run_relay("check", tmp_path / "c.yaml", cwd=tmp_path)
    assert done.returncode == 3
    assert b"c.yaml:3:" in done.stderr
