"""SIGHUP: what changed is exchanged, what did not is not touched."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from peers import assert_same, eventually, payload, receive_all, receive_exactly, refused
from relays import end, serving
from reloads import KEPT, connect, each, finish, free_port, reload, reloads


def test_only_what_changed_is_touched(tmp_path: Path) -> None:
    """Removed, changed, added and unchanged routes: streams of all go on, listeners are where the file says."""
    a, b, c = free_port(), free_port(), free_port()
    before = "routes:\n" + KEPT + each("gone", a, "gone-{id}") + each("other", b, "old-{id}")
    after = "routes:\n" + KEPT + each("other", b, "new-{id}") + each("more", c, "more-{id}")
    with serving(before, tmp_path) as served:
        served.said("ready")
        kept = served.port(0)
        socks = {name: connect(port) for name, port in (("kept", kept), ("gone", a), ("old", b))}
        for sock in socks.values():
            sock.sendall(b"before ")
        eventually(lambda: len(list(tmp_path.glob("*.part"))) == 3, "all streams begin")
        reload(served, after)
        (said,) = reloads(served)
        assert (said["removed"], said["changed"], said["added"], said["kept"]) == (
            ["gone"],
            ["other"],
            ["more"],
            ["kept"],
        )
        assert refused(a)
        for sock in socks.values():
            sock.sendall(b"after")
            assert finish(sock) == b""
        for port in (b, c, kept):
            fresh = connect(port)
            fresh.sendall(b"fresh")
            finish(fresh)
        served.sessions(6)
        end(served)
    found = {path.name.partition("-")[0]: path.read_bytes() for path in sorted(tmp_path.glob("*-*"))}
    assert found == {
        "gone": b"before after",
        "kept": b"fresh",
        "more": b"fresh",
        "new": b"fresh",
        "old": b"before after",
    }
    assert sorted(path.read_bytes() for path in tmp_path.glob("kept-*")) == [b"before after", b"fresh"]


def test_a_broadcast_moves_over(tmp_path: Path) -> None:
    """A changed broadcast: viewers with a stream see its end, new ones and a new source find the new route."""
    live, source = free_port(), free_port()
    text = (
        f'routes: {{r: {{source: {{listen: "tcp://127.0.0.1:{source}"}}, STAGES '
        f'sink: {{listen: "tcp://127.0.0.1:{live}"}}}}}}'
    )
    with serving(text.replace("STAGES", ""), tmp_path) as served:
        served.addresses(2)
        old_viewer, old_source = connect(live), connect(source)
        served.said("joined")
        old_source.sendall(b"old ")
        assert receive_exactly(old_viewer, 4) == b"old "
        reload(served, text.replace("STAGES", "stages: [{header: {text: '>'}}],"))
        new_viewer = connect(live)
        served.until(lambda: sum("joined" in line["message"] for line in served.lines) == 2)
        new_source = connect(source)
        new_source.sendall(b"new")
        assert receive_exactly(new_viewer, 4) == b">new"
        old_source.sendall(b"stream")
        old_source.close()
        assert receive_all(old_viewer) == b"stream"
        new_source.close()
        served.sessions(2)
        end(served)
        assert receive_all(new_viewer) == b""
        for sock in (old_viewer, new_viewer):
            sock.close()


def test_a_port_changes_its_route(tmp_path: Path) -> None:
    """Routes that exchange their addresses, or their names, are no obstacle to each other."""
    a, b = free_port(), free_port()
    with serving("routes:\n" + each("one", a, "one-{id}") + each("two", b, "two-{id}"), tmp_path) as served:
        served.addresses(2)
        reload(served, "routes:\n" + each("one", b, "one-{id}") + each("three", a, "three-{id}"))
        sock = connect(b)
        sock.sendall(b"b")
        finish(sock)
        sock = connect(a)
        sock.sendall(b"a")
        finish(sock)
        served.sessions(2)
        end(served)
    assert [path.read_bytes() for path in tmp_path.glob("one-*")] == [b"b"]
    assert [path.read_bytes() for path in tmp_path.glob("three-*")] == [b"a"]


def test_many_signals_are_at_least_one(tmp_path: Path) -> None:
    """Of hundreds of signals in quick succession each change is seen by a reload after it; most are coalesced."""
    with serving("routes:\n" + KEPT, tmp_path) as served:
        served.port()
        for number in range(300):
            text = "routes:\n" + KEPT + each(f"n{number}", 0, "x-{id}")
            (tmp_path / "new.yaml").write_text(text)
            (tmp_path / "new.yaml").replace(served.config)
            served.signal(signal.SIGHUP)
        served.until(lambda: any(line.get("added") == ["n299"] for line in served.lines))
        end(served)
    assert len(reloads(served)) <= 300


def test_drain_applies_and_engines_need_a_restart(tmp_path: Path) -> None:
    """`drain` is taken over at once; of `engines` it is said that it takes a restart."""
    with serving("drain: 60s\nroutes:\n" + KEPT, tmp_path) as served:
        sock = connect(served.port())
        sock.sendall(b"x")
        eventually(lambda: list(tmp_path.glob("kept-*")), "the stream begins")
        reload(served, "drain: 100ms\nengines: 3\nroutes:\n" + KEPT)
        served.said("takes a restart")
        end(served, 1)
        with pytest.raises(ConnectionResetError):
            receive_all(sock)
        sock.close()


def test_equal_settings_are_the_same_route(tmp_path: Path) -> None:
    """A route that is written in another way, with the same meaning, is not touched."""
    port = free_port()
    with serving(f"routes: {{r: {{source: 'tcp://127.0.0.1:{port}', sink: out}}}}", tmp_path) as served:
        sock = connect(served.port())
        sock.sendall(b"one ")
        eventually(lambda: (tmp_path / "out").exists(), "the file is there")
        reload(
            served,
            f"routes:\n  r:\n    source: {{listen: 'tcp://127.0.0.1:{port}'}}\n    sink: {{file: out}}\n",
        )
        assert reloads(served)[0]["kept"] == ["r"]
        sock.sendall(b"stream")
        finish(sock)
        end(served)
    assert (tmp_path / "out").read_bytes() == b"one stream"


def test_reloads_under_traffic_lose_nothing(tmp_path: Path) -> None:
    """While one route is exchanged again and again, another carries its stream whole, and nothing is left behind."""
    data = payload(9, 64 << 20)
    port = free_port()
    texts = [
        "routes:\n" + KEPT + each("other", port, "o-{id}", f", method: {method}")
        for method in ("auto", "copy")
    ]
    with serving(texts[0], tmp_path) as served:
        with connect(served.port()) as sock:
            sender = threading.Thread(target=lambda: (sock.sendall(data), finish(sock)))
            sender.start()
            reload(served, texts[1])
            before = len(os.listdir(f"/proc/{served.pid}/fd"))  # noqa: PTH208 - only their number
            for number in range(20):
                reload(served, texts[number % 2])
            sender.join()
        served.sessions(1)
        eventually(
            lambda: len(os.listdir(f"/proc/{served.pid}/fd")) <= before,  # noqa: PTH208 - only their number
            "descriptors are given back",
        )
        end(served)
    assert_same((tmp_path / "kept-1").read_bytes(), data)


def test_a_signal_while_starting_ends_at_once(tmp_path: Path) -> None:
    """SIGTERM before relay is ready ends it with 0: nothing was under way, no socket file stays."""
    routes = "".join(
        f"  r{i}: {{source: {{listen: 'unix://{tmp_path}/s{i}'}}, sink: 'null:'}}\n" for i in range(400)
    )
    with serving("drain: 60s\nroutes:\n" + routes, tmp_path) as served:
        served.addresses(1)
        end(served)
    assert not list(tmp_path.glob("s[0-9]*"))
