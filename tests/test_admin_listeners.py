"""Clients of the admin sockets that take their time: how long they may, and who makes room for whom."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from admins import asked
from peers import PATIENCE, eventually
from relays import serving

from relay.admin import listeners
from relay.admin.listeners import Client, Listeners
from relay.endpoints import unix
from relay.endpoints.address import Address


@contextlib.contextmanager
def listening(path: Path, talk: Callable[[Client], None]) -> Iterator[Listeners]:
    """Admin listeners at a unix socket, with that way to talk."""
    made = Listeners(unix.bind(Address.parse(f"unix://{path}"), mode=0o600), talk)
    made.start()
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def client(path: Path) -> Iterator[socket.socket]:
    """One that has connected."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        yield sock


def ask(one: Client) -> None:
    """Waits for a line, and answers it."""
    if one.sock.recv(100):
        one.asked()
        one.answered()
        one.sock.sendall(b"answer")


def test_who_says_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not ask in time sees the end; one that does gets its answer."""
    monkeypatch.setattr(listeners, "LONGEST", 0.3)
    with listening(tmp_path / "s", ask), client(tmp_path / "s") as silent:
        began = time.monotonic()
        with client(tmp_path / "s") as good:
            good.sendall(b"x")
            assert good.recv(100) == b"answer"
        assert silent.recv(100) == b""
        assert 0.2 < time.monotonic() - began < PATIENCE / 2


def test_who_does_not_take_its_answer_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that nobody reads occupies a thread for so long and no longer."""
    monkeypatch.setattr(listeners, "LONGEST", 0.3)
    over = threading.Event()

    def much(one: Client) -> None:
        one.asked()
        one.answered()
        try:
            one.sock.sendall(b"x" * (32 << 20))
        finally:
            over.set()

    with listening(tmp_path / "s", much), client(tmp_path / "s"):
        assert over.wait(PATIENCE)


def test_the_one_that_is_silent_for_longest_makes_room(tmp_path: Path) -> None:
    """With every place taken by clients that say nothing a newcomer gets the oldest one's; who is at work stays."""
    let_go = threading.Event()

    def work(one: Client) -> None:
        if one.sock.recv(100) == b"work":
            one.asked()
            let_go.wait(PATIENCE)
            one.answered()
            one.sock.sendall(b"done")

    with contextlib.ExitStack() as stack:
        made = stack.enter_context(listening(tmp_path / "s", work))
        busy = stack.enter_context(client(tmp_path / "s"))
        busy.sendall(b"work")
        eventually(lambda: any(not one.asking for one in list(made._clients)), "it is at work")
        silent = [stack.enter_context(client(tmp_path / "s")) for _ in range(listeners.MOST - 1)]
        eventually(lambda: len(made._clients) == listeners.MOST, "all places are taken")
        newcomer = stack.enter_context(client(tmp_path / "s"))
        assert silent[0].recv(100) == b""
        let_go.set()
        assert busy.recv(100) == b"done"
        newcomer.sendall(b"work")
        assert newcomer.recv(100) == b"done"


def test_closing_waits_for_nobody_who_says_nothing(tmp_path: Path) -> None:
    """At the end silent clients are cut off, and the socket's file goes."""
    with listening(tmp_path / "s", ask) as made, client(tmp_path / "s") as silent:
        eventually(lambda: made._clients, "it is there")
        began = time.monotonic()
        made.close()
        assert time.monotonic() - began < 1.0
        assert silent.recv(100) == b""
        assert not (tmp_path / "s").exists()


def test_what_a_client_still_sends_does_not_take_its_answer_back(tmp_path: Path) -> None:
    """A client that goes on sending after its request gets the whole answer all the same."""

    def refuse(one: Client) -> None:
        one.sock.recv(10)
        one.asked()
        one.answered()
        one.sock.sendall(b"too much")

    with listening(tmp_path / "s", refuse):
        for _ in range(20):
            with client(tmp_path / "s") as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(b"x" * 100_000)
                assert sock.recv(100) == b"too much"


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_socket_whose_file_is_gone_is_bound_anew(tmp_path: Path, how: str, confined: bool) -> None:
    """Somebody removed the admin socket's file, or put a stale one there: SIGHUP makes it anew, for its owner alone; at
    the end it goes."""
    place = tmp_path / "run"
    place.mkdir()
    path = place / "admin.sock"
    text = "confine: {}\n" if confined else ""
    text += (
        f"admin: {{socket: 'unix://{path}'}}\nroutes: {{r: {{source: 'tcp://127.0.0.1:0', sink: 'null:'}}}}\n"
    )
    with serving(text, tmp_path) as served:
        served.said("ready")
        path.unlink()
        if how == "replaced":
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(path))
        served.signal(signal.SIGHUP)
        served.until(lambda: [line.get("event") for line in served.lines].count("admin") == 2)
        assert asked(path, "/livez")[0] == 200
        assert path.stat().st_mode & 0o777 == 0o600
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert not path.exists()


def test_a_socket_whose_path_somebody_took_is_left_to_them(tmp_path: Path) -> None:
    """Another program listens at the admin socket's path: relay says so and has it when it is free."""
    path = tmp_path / "admin.sock"
    text = (
        f"admin: {{socket: 'unix://{path}'}}\nroutes: {{r: {{source: 'tcp://127.0.0.1:0', sink: 'null:'}}}}\n"
    )
    with serving(text, tmp_path) as served:
        served.said("ready")
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen(1)
            served.signal(signal.SIGHUP)
            served.said("EADDRINUSE")
        served.signal(signal.SIGHUP)
        served.until(lambda: [line.get("event") for line in served.lines].count("admin") == 2)
        assert asked(path, "/readyz")[0] == 200
