"""Reloads and whoever waits: names that take long, connections in the backlog, sockets that are handed over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import PATIENCE, eventually, receive_all, receive_exactly
from relays import end, environment, serving
from reloads import KEPT, connect, each, finish, free_port, reload, reloads

from relay.config.data import from_data
from relay.engine import Engine
from relay.journal.record import SessionRecord
from relay.serving.fleet import Fleet, NotExchanged

WAITING = 200


# --- names ------------------------------------------------------------------------------------------------


RESOLVER = """
import socket, threading
ask = socket.getaddrinfo
def slow(host, *words, flags=0, **more):
    if host in ("localhost", b"localhost") and not flags & socket.AI_NUMERICHOST:
        threading.Event().wait(SECONDS)
    return ask(host, *words, flags=flags, **more)
socket.getaddrinfo = slow
"""


def slow_names(folder: Path, seconds: float) -> dict[str, str]:
    """The environment of a program in which a look-up takes so long: a resolver that does not answer."""
    where = folder / "resolver"
    where.mkdir()
    (where / "sitecustomize.py").write_text(RESOLVER.replace("SECONDS", str(seconds)))
    known = environment()
    return {**known, "PYTHONPATH": f"{where}{os.pathsep}{known['PYTHONPATH']}"}


def named(name: str, more: str = "") -> str:
    """A route that listens on a name."""
    return f"  {name}: {{source: {{listen: 'tcp://localhost:0'}}, sink: 'null:'{more}}}\n"


def test_the_end_is_obeyed_while_a_name_hangs_at_the_start(tmp_path: Path) -> None:
    """SIGTERM ends relay at once with 0, though the resolver has not answered for its listener's name."""
    with serving("routes:\n" + named("r"), tmp_path, env=slow_names(tmp_path, 600)) as served:
        served.said("looking up localhost")
        end(served)


def test_streams_flow_while_a_name_hangs_at_a_reload(tmp_path: Path) -> None:
    """A reload waits for a name alone: streams flow, files are opened anew, and another reload may overtake it."""
    port = free_port()
    with serving("routes:\n" + KEPT, tmp_path, env=slow_names(tmp_path, 600)) as served:
        sock = connect(served.port())
        sock.sendall(b"before ")
        served.config.write_text("routes:\n" + KEPT + named("slow"))
        served.signal(signal.SIGHUP)
        served.said("waits for the addresses of localhost")
        sock.sendall(b"meanwhile ")
        finish(connect(served.port()))
        served.sessions(1)
        assert not reloads(served)
        reload(served, "routes:\n" + KEPT + each("more", port, "more-{id}"))
        assert reloads(served)[0]["added"] == ["more"]
        finish(connect(port))
        served.config.write_text("routes:\n" + KEPT + named("slow"))
        for _ in range(20):
            served.signal(signal.SIGHUP)
        served.until(lambda: sum("waits for the addr" in line["message"] for line in served.lines) >= 2)
        finish(sock)
        end(served)
    assert (tmp_path / "kept-1").read_bytes() == b"before meanwhile "


def test_a_name_that_takes_its_time_is_listened_on(tmp_path: Path) -> None:
    """When the name is known the reload goes on, with the file as the last of several signals found it."""
    with serving("routes:\n" + KEPT, tmp_path, env=slow_names(tmp_path, 0.5)) as served:
        served.port()
        for number in range(3):
            served.config.write_text("routes:\n" + KEPT + named(f"slow{number}"))
            served.signal(signal.SIGHUP)
        served.until(lambda: any(line.get("added") == ["slow2"] for line in served.lines))
        route = [
            line for line in served.lines if line.get("event") == "listening" and line["route"] == "slow2"
        ]
        finish(connect(int(route[0]["address"].rpartition(":")[2])))
        end(served)


# --- the backlog ------------------------------------------------------------------------------------------


class Routes:
    """Routes at work on one engine in this process, which can be held so that connections stay in the backlog."""

    def __init__(self, routes: dict[str, Any]) -> None:
        self.records: list[SessionRecord] = []
        self.engine = Engine("under-test")
        config = from_data({"routes": routes}, "test")
        self.fleet = Fleet(config, [self.engine], lambda _route: None, self.records.append, once=False)
        assert self.fleet.open({}, lambda: False)
        self.engine.start()

    def exchange(self, routes: dict[str, Any], come: Any) -> None:
        """Calls `come` while the engine is held, then exchanges the routes before it can accept anybody."""
        held, go = threading.Event(), threading.Event()
        self.engine.post(lambda: (held.set(), go.wait(PATIENCE)))
        assert held.wait(PATIENCE)
        come()
        config = from_data({"routes": routes}, "test")
        failed: list[BaseException] = []

        def exchange() -> None:
            try:
                self.fleet.exchange(config, {})
            except NotExchanged as error:
                failed.append(error)

        thread = threading.Thread(target=exchange)
        thread.start()
        eventually(lambda: self.engine._posted, "the exchange has begun")
        go.set()
        thread.join(PATIENCE)
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Ends all of it."""
        self.fleet.abort("the test is over")
        eventually(lambda: self.fleet.done, "all is over")
        self.fleet.close()


@contextlib.contextmanager
def routes(some: dict[str, Any]) -> Iterator[Routes]:
    """Routes at work, ended at the end."""
    made = Routes(some)
    try:
        yield made
    finally:
        made.close()


def visitors(address: int | Path, many: list[socket.socket], data: bytes = b"hello") -> None:
    """WAITING connections, each of which has sent `data` and ended its stream."""
    for _ in range(WAITING):
        if isinstance(address, int):
            sock = socket.create_connection(("127.0.0.1", address))
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(address))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        many.append(sock)


def all_served(many: list[socket.socket]) -> None:
    """Every one of them is closed in peace: relay took the stream and has delivered it."""
    for sock in many:
        assert receive_all(sock) == b""
        sock.close()


@pytest.mark.parametrize("kind", ["tcp", "unix", "abstract"])
@pytest.mark.parametrize("change", ["sink", "limits", "stages", "name"])
def test_who_waits_is_served_by_the_new_route(tmp_path: Path, change: str, kind: str) -> None:
    """A changed route on the same address: connections in its backlog are the new one's, and none is reset."""
    port = free_port()
    path = tmp_path / "s" if kind == "unix" else Path(f"\0relay-test-{os.getpid()}-{port}")
    where = {
        "tcp": f"tcp://127.0.0.1:{port}",
        "unix": f"unix://{path}",
        "abstract": f"unix://@{str(path)[1:]}",
    }[kind]
    before: dict[str, Any] = {"source": {"listen": where, "connections": "each"}, "sink": "null:"}
    after = {
        "sink": {**before, "sink": str(tmp_path / "{id}")},
        "limits": {**before, "source": {**before["source"], "limits": {"connections": 500}}},
        "stages": {**before, "stages": [{"throttle": {"rate": "1GB/s"}}]},
        "name": before,
    }[change]
    many: list[socket.socket] = []
    with routes({"r": before}) as at_work:
        new = "other" if change == "name" else "r"
        at_work.exchange({new: after}, lambda: visitors(port if kind == "tcp" else path, many))
        all_served(many)
        eventually(lambda: len(at_work.records) == WAITING, "all have their records")
        assert {(record.route, record.bytes, record.result) for record in at_work.records} == {
            (new, 5, "delivered")
        }
        again: list[socket.socket] = []
        visitors(port if kind == "tcp" else path, again)
        all_served(again)
    if change == "sink":
        assert [path.read_bytes() for path in tmp_path.glob("[0-9]*")] == [b"hello"] * 2 * WAITING


@pytest.mark.parametrize("new", ["gone", "elsewhere", "beside"])
def test_who_waits_where_nobody_listens_any_more_is_served_first(new: str) -> None:
    """An address that goes away, or is bound in another way: the old route serves whoever had connected before."""
    port = free_port()
    before = {"source": {"listen": f"tcp://127.0.0.1:{port}"}, "sink": "null:"}
    there = {"gone": "tcp://127.0.0.1:0", "elsewhere": "tcp://127.0.0.1:0", "beside": f"tcp://:{port}"}[new]
    after = {"source": {"listen": there}, "sink": "null:"}
    many: list[socket.socket] = []
    with routes({"r": before}) as at_work:
        at_work.exchange({"other" if new == "gone" else "r": after}, lambda: visitors(port, many))
        all_served(many)
        eventually(lambda: len(at_work.records) == WAITING, "all have their records")
        if new == "beside":
            visitors(port, again := [])
            all_served(again)
        else:
            with pytest.raises(ConnectionRefusedError):
                connect(port)


def test_a_reload_that_is_taken_back_resets_nobody(tmp_path: Path) -> None:
    """When another route cannot be opened, who waited at a changed one's address is served by the old one."""
    port = free_port()
    before = {"source": {"listen": f"tcp://127.0.0.1:{port}"}, "sink": "null:"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worse = {"source": {"listen": f"tcp://127.0.0.1:{taken.getsockname()[1]}"}, "sink": "null:"}
        after = {**before, "sink": str(tmp_path / "{id}")}
        many: list[socket.socket] = []
        with routes({"r": before}) as at_work:
            with pytest.raises(NotExchanged, match="EADDRINUSE"):
                at_work.exchange({"r": after, "worse": worse}, lambda: visitors(port, many))
            all_served(many)
            eventually(lambda: len(at_work.records) == WAITING, "all have their records")
    assert not list(tmp_path.glob("[0-9]*"))


def test_viewers_that_wait_are_viewers_of_the_new_route() -> None:
    """A changed broadcast on the same address: who had connected to it sees what comes to the new one."""
    live, port = free_port(), free_port()
    before = {"source": {"listen": f"tcp://127.0.0.1:{port}"}, "sink": {"listen": f"tcp://127.0.0.1:{live}"}}
    after = {**before, "stages": [{"header": {"text": ">"}}]}
    viewers: list[socket.socket] = []
    with routes({"r": before}) as at_work:
        at_work.exchange({"r": after}, lambda: viewers.extend(connect(live) for _ in range(20)))
        route = at_work.fleet.at_work["r"]
        (group,) = route._standing.subscribers
        eventually(lambda: len(group.members) == 20, "they have joined")
        with connect(port) as sock:
            sock.sendall(b"news")
            assert {receive_exactly(viewer, 5) for viewer in viewers} == {b">news"}
    for viewer in viewers:
        viewer.close()


def test_who_waits_at_a_route_that_is_ended_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the new route needs what the old one holds and listens elsewhere, who waited is reset, and counted."""
    caplog.set_level("INFO")
    port = free_port()
    before = {"source": {"listen": f"tcp://127.0.0.1:{port}"}, "sink": str(tmp_path / "out")}
    after = {**before, "source": {"listen": "tcp://127.0.0.1:0"}}
    many: list[socket.socket] = []
    with routes({"r": before}) as at_work:
        at_work.exchange({"r": after}, lambda: visitors(port, many))
        resets = 0
        for sock in many:
            try:
                receive_all(sock)  # one whose turn came before the end
            except ConnectionResetError:
                resets += 1
            sock.close()
        cut_off = sum(record.result == "failed" for record in at_work.records)
    said = [record for record in caplog.records if getattr(record, "event", "") == "refused"]
    assert sum(getattr(record, "count", 0) for record in said) + cut_off == resets > 0


def test_a_port_of_the_kernels_choice_stays(tmp_path: Path) -> None:
    """A changed route with port 0 goes on listening on the port that it had."""
    with serving("routes:\n" + each("r", 0, "old-{id}"), tmp_path) as served:
        port = served.port()
        reload(served, "routes:\n" + each("r", 0, "new-{id}"))
        assert served.addresses(2)[1] == f"tcp://127.0.0.1:{port}"
        finish(connect(port))
        served.sessions(1)
        end(served)
    assert [path.name for path in tmp_path.glob("*-1")] == ["new-1"]


def test_a_socket_file_that_was_replaced_is_bound_anew(tmp_path: Path) -> None:
    """A unix listener whose file somebody removed cannot be reached: the changed route makes a new one."""
    path = tmp_path / "s"
    text = f"routes: {{r: {{source: {{listen: 'unix://{path}'}}, sink: '{tmp_path}/NAME-{{id}}'}}}}"
    with serving(text.replace("NAME", "old"), tmp_path) as served:
        served.addresses(1)
        path.unlink()
        reload(served, text.replace("NAME", "new"))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"x")
            sock.shutdown(socket.SHUT_WR)
            assert receive_all(sock) == b""
        end(served)
    assert not path.exists()
    assert (tmp_path / "new-1").read_bytes() == b"x"


def test_a_new_mode_applies_to_a_socket_that_stays(tmp_path: Path) -> None:
    """A handed over unix socket gets the permissions of the new settings."""
    path = tmp_path / "s"
    text = f"routes: {{r: {{source: {{listen: 'unix://{path}', mode: MODE}}, sink: 'null:'}}}}"
    with serving(text.replace("MODE", "'0600'"), tmp_path) as served:
        served.addresses(1)
        inode = path.stat().st_ino
        reload(served, text.replace("MODE", "'0660'"))
        assert (path.stat().st_ino, path.stat().st_mode & 0o777) == (inode, 0o660)
        end(served)
