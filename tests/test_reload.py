"""SIGHUP: what changed is exchanged, what did not is not touched, what is wrong changes nothing."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from peers import accept, assert_same, eventually, payload, receive_all, receive_exactly, tcp_listener
from relays import Process, serving

KEPT = '  kept: {source: {listen: "tcp://127.0.0.1:0"}, sink: {file: "kept-{id}"}}\n'


# below the ports that outgoing connections take, and not those of another run beside this one
PORTS = itertools.count(12_000 + os.getpid() % 280 * 64)


def free_port() -> int:
    """A port that nobody listens on now, nor will by chance: a reload closes and opens it again."""
    for port in PORTS:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("unreachable: the ports do not end")


def connect(port: int) -> socket.socket:
    """A connection to relay."""
    return socket.create_connection(("127.0.0.1", port))


def reload(served: Process, text: str, times: int = 1) -> None:
    """Writes the configuration anew and waits until relay says that it was reloaded."""
    done = len([line for line in served.lines if line.get("event") == "reload"])
    served.config.write_text(text)
    served.signal(signal.SIGHUP)
    served.until(
        lambda: len([line for line in served.lines if line.get("event") == "reload"]) >= done + times
    )


def reloads(served: Process) -> list[dict[str, object]]:
    """The lines about reloads so far."""
    return [line for line in served.lines if line.get("event") == "reload"]


def refused(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def each(name: str, port: int, file: str, more: str = "") -> str:
    """A route whose connections each make a file."""
    return f'  {name}: {{source: {{listen: "tcp://127.0.0.1:{port}"}}, sink: {{file: "{file}"}}{more}}}\n'


def finish(sock: socket.socket) -> bytes:
    """Ends the stream and waits until relay closes."""
    sock.shutdown(socket.SHUT_WR)
    rest = receive_all(sock)
    sock.close()
    return rest


def end(served: Process, code: int = 0) -> None:
    """SIGTERM, and the exit code that is expected."""
    served.signal(signal.SIGTERM)
    assert served.wait() == code, served.text


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


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    """A standing route that spills is ended, its log kept, before the changed one opens it: every byte in order."""
    port, away = free_port(), free_port()
    data = payload(5, 3 << 20)
    text = (
        f"routes:\n  r:\n    source: {{listen: 'tcp://127.0.0.1:{port}', connections: one}}\n"
        f"    stages: [{{throttle: {{rate: RATE}}}}]\n"
        f"    sink: {{connect: 'tcp://127.0.0.1:{away}', on_slow: {{policy: spill, directory: spill}}}}\n"
    )
    with serving(text.replace("RATE", "1GB/s"), tmp_path) as served:
        served.port()
        sock = connect(port)
        sock.sendall(data)
        finish(sock)
        served.sessions(1)
        reload(served, text.replace("RATE", "2GB/s"))
        sock = connect(port)
        sock.sendall(b"more")
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", away))
            listener.listen()
            sink, _peer = listener.accept()
            assert_same(receive_exactly(sink, len(data) + 4, 30), data + b"more")
            finish(sock)
            end(served)
            sink.close()


def test_a_file_in_place_has_one_writer(tmp_path: Path) -> None:
    """A changed route that writes in place begins its file when the old one has let go of it."""
    port = free_port()
    text = f"routes: {{r: {{source: {{listen: 'tcp://127.0.0.1:{port}'}}, sink: out, method: METHOD}}}}"
    with serving(text.replace("METHOD", "auto"), tmp_path) as served:
        served.port()
        old = connect(port)
        old.sendall(b"x" * 100_000)
        out = tmp_path / "out"
        eventually(lambda: out.exists() and out.stat().st_size == 100_000, "the file grows")
        reload(served, text.replace("METHOD", "copy"))
        with pytest.raises(ConnectionResetError):
            receive_all(old)
        old.close()
        sock = connect(port)
        sock.sendall(b"new")
        finish(sock)
        served.sessions(2)
        end(served)
    assert (tmp_path / "out").read_bytes() == b"new"


def test_files_are_opened_anew(tmp_path: Path) -> None:
    """After a mv and SIGHUP, files that are appended to or written in place begin again under their names."""
    text = (
        "routes: {r: {source: {listen: 'tcp://127.0.0.1:0'},"
        " stages: [{tee: {to: {file: log, append: true}}}], sink: plain}}"
    )
    with serving(text, tmp_path) as served, connect(served.port()) as sock:
        sock.sendall(b"before")
        for name in ("log", "plain"):
            path = tmp_path / name
            eventually(lambda path=path: path.exists() and path.stat().st_size == 6, "bytes arrive")
            (tmp_path / name).rename(tmp_path / f"{name}.1")
        reload(served, text)
        for name in ("log", "plain"):
            eventually(lambda name=name: (tmp_path / name).exists(), "the file is there again")
        sock.sendall(b"after")
        reload(served, text)  # nothing was moved: nothing changes
        sock.sendall(b"wards")
        finish(sock)
        served.sessions(1)
        end(served)
    for name in ("log", "plain"):
        assert (tmp_path / f"{name}.1").read_bytes() == b"before"
        assert (tmp_path / name).read_bytes() == b"afterwards"


def test_streams_that_take_turns_are_appended_one_after_another(tmp_path: Path) -> None:
    """While the stream of a changed route goes on, the next one waits to append to the same file: neither stands
    inside the other, and both are whole."""

    def route(rate: int) -> str:
        return (
            f"routes: {{r: {{source: {{listen: 'tcp://127.0.0.1:{port}', connections: one}},"
            f" stages: [{{throttle: {{rate: {rate}MB/s}}}}], sink: {{file: log, append: true}}}}}}"
        )

    port, log = free_port(), tmp_path / "log"
    with serving(route(100), tmp_path) as served, connect(served.port()) as before:
        before.sendall(b"the stream before ")
        eventually(lambda: log.exists() and log.stat().st_size == 18, "its bytes are in the file")
        reload(served, route(200))
        with connect(port) as after:
            after.sendall(b"and the next")
            after.shutdown(socket.SHUT_WR)
            served.said("the next one waits")
            before.sendall(b"goes on ")
            finish(before)
            assert receive_all(after) == b""
        served.sessions(2)
        end(served)
    assert log.read_bytes() == b"the stream before goes on and the next"


def test_a_stream_that_waits_to_append_ends_with_relay(tmp_path: Path) -> None:
    """A drain that is cut short ends a stream that waits for its place in the file, too; nothing stands inside the
    other."""
    port, log = free_port(), tmp_path / "log"
    text = (
        f"routes: {{r: {{source: {{listen: 'tcp://127.0.0.1:{port}', connections: one}},"
        " sink: {file: log, append: true}}}"
    )
    with serving(text, tmp_path) as served, connect(served.port()) as before:
        before.sendall(b"before")
        eventually(lambda: log.exists() and log.stat().st_size == 6, "its bytes are in the file")
        reload(served, text.replace("one}", "one, dead_after: 7s}"))
        with connect(port) as after:
            after.sendall(b"after")
            served.said("the next one waits")
            served.signal(signal.SIGTERM)
            served.said("draining")
            served.signal(signal.SIGTERM)
            assert served.process.wait(20) == 1
    assert log.read_bytes() in (b"before", b"beforeafter")


def test_a_file_that_cannot_be_opened_anew_goes_on(tmp_path: Path) -> None:
    """Where its directory is gone the file that was moved away is written on, and a warning says so."""
    (tmp_path / "d").mkdir()
    text = "routes: {r: {source: {listen: 'tcp://127.0.0.1:0'}, sink: {file: d/e/log, append: true}}}"
    (tmp_path / "d" / "e").mkdir()
    with serving(text, tmp_path) as served, connect(served.port()) as sock:
        sock.sendall(b"before ")
        log = tmp_path / "d/e/log"
        eventually(lambda: log.exists() and log.stat().st_size == 7, "bytes arrive")
        (tmp_path / "d").rename(tmp_path / "moved")
        served.signal(signal.SIGHUP)
        served.said("written on")
        sock.sendall(b"after")
        finish(sock)
        end(served)
    assert (tmp_path / "moved/e/log").read_bytes() == b"before after"


def test_without_a_file_only_files_are_opened_anew(tmp_path: Path) -> None:
    """A configuration from stdin cannot be read again: SIGHUP says so and harms nobody."""
    from relays import relay

    read, write = os.pipe()
    os.write(write, b"routes: {r: {source: {listen: 'tcp://127.0.0.1:0'}, sink: 'null:'}}")
    os.close(write)
    with relay("serve", "--log-format", "json", "-", cwd=tmp_path, stdin=read) as served:
        os.close(read)
        port = served.port()
        served.signal(signal.SIGHUP)
        served.said("no configuration file")
        finish(connect(port))
        served.sessions(1)
        end(served)


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
