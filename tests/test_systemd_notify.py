"""What a service manager hears: readiness, reloads, signs of life; and the end of an idle relay."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from manager import activated, ask, listener, manager, port_of, route
from peers import accept, eventually, receive_all, tcp_listener
from relays import run_relay

from relay.engine import Engine
from relay.serving.notify import Notifier
from relay.serving.vigil import Vigil


def duplex(source: str, sink: str) -> str:
    """One duplex route called r."""
    return f'drain: 5s\nroutes:\n  r: {{source: {{listen: "{source}"}}, sink: "{sink}", duplex: true}}\n'


def test_the_manager_hears_ready_reloading_and_stopping(tmp_path: Path) -> None:
    """READY comes when connections are taken, RELOADING with its time and READY after it, STOPPING with the drain."""
    with manager(tmp_path) as told, activated(route("tcp://127.0.0.1:0"), tmp_path, notified=told) as served:
        ready = told.hear("READY", "1")
        assert int(ready["MAINPID"]) == served.pid
        assert ready["STATUS"] == "1 route, listening on 1 addresses"
        with ask(served.port()) as sock:
            assert receive_all(sock) == b""
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        served.signal(signal.SIGHUP)
        reloading = told.hear("RELOADING", "1")
        assert (
            before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        )
        told.hear("READY", "1")
        served.config.write_text("routes: {}\n")
        served.signal(signal.SIGHUP)
        told.hear("RELOADING", "1")
        assert "the last reload was refused" in told.hear("READY", "1")["STATUS"]
        served.signal(signal.SIGTERM)
        assert told.hear("STOPPING", "1")["EXTEND_TIMEOUT_USEC"] == "10000000"
        assert served.wait() == 0


def test_signs_of_life_stop_when_a_loop_hangs(tmp_path: Path) -> None:
    """WATCHDOG=1 comes several times in the time granted; from a stopped relay, none."""
    with manager(tmp_path) as told:
        text = route("tcp://127.0.0.1:0")
        with activated(text, tmp_path, notified=told, WATCHDOG_USEC="400000") as served:
            told.hear("READY")
            began = time.monotonic()
            for _ in range(5):
                told.hear("WATCHDOG", "1")
            assert time.monotonic() - began < 2.0
            served.signal(signal.SIGTERM)
            assert served.wait() == 0


def test_an_engine_that_hangs_is_no_sign_of_life(tmp_path: Path) -> None:
    """As long as one engine has not answered, the manager is told nothing."""
    with manager(tmp_path) as told:
        notifier = Notifier({"NOTIFY_SOCKET": str(told.path), "WATCHDOG_USEC": "4000"})
        engine = Engine("hangs")  # its loop does not run until it is turned
        vigil = Vigil(notifier)
        vigil.begin([engine])
        for _ in range(3):
            assert vigil.due is not None
            eventually(lambda: vigil.due == 0.0, "a sign of life is due")
            vigil.look(())
        notifier.tell(END=1)
        told.hear("END")
        assert not any("WATCHDOG" in word for word in told.words)
        engine.turn(0)
        eventually(lambda: vigil.due == 0.0, "a sign of life is due")
        vigil.look(())
        told.hear("WATCHDOG", "1")
        notifier.close()
        engine.close()


def test_no_manager_or_one_that_is_gone_is_no_trouble(tmp_path: Path) -> None:
    """Without NOTIFY_SOCKET, or with one where nobody is, relay serves and ends as ever."""
    for env in ({}, {"NOTIFY_SOCKET": str(tmp_path / "nobody")}, {"NOTIFY_SOCKET": "vsock:2:1"}):
        with activated(route("tcp://127.0.0.1:0"), tmp_path, **env) as served:
            with ask(served.port()) as sock:
                assert receive_all(sock) == b""
            served.signal(signal.SIGTERM)
            assert served.wait() == 0


def test_the_manager_may_have_an_abstract_name() -> None:
    """NOTIFY_SOCKET=@name is a name without a file."""
    name = f"relay-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("\0" + name)
        notifier = Notifier({"NOTIFY_SOCKET": "@" + name})
        notifier.tell(STATUS="two\nlines")
        notifier.close()
        assert heard.recv(100) == b"STATUS=two lines"


def test_an_idle_relay_ends_and_one_in_use_does_not(tmp_path: Path) -> None:
    """The time counts from the last session's end; while a session is open, however quiet, relay stays."""
    with manager(tmp_path) as told, listener() as web, tcp_listener() as (behind, address):
        with activated(
            duplex("systemd://web", address), tmp_path, [("web", web)], told, ["--exit-idle", "300ms"]
        ) as served:
            told.hear("READY")
            with socket.create_connection(("127.0.0.1", port_of(web))) as sock, accept(behind) as other:
                until = time.monotonic() + 0.9
                eventually(lambda: time.monotonic() > until, "three times the idle time has passed")
                assert served.process.poll() is None
                sock.sendall(b"still here")
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(other) == b"still here"
            ended = time.monotonic()
            assert "nobody has needed relay" in told.hear("STOPPING")["STATUS"]
            assert time.monotonic() - ended > 0.25
            assert served.wait() == 0


def test_whoever_watches_a_broadcast_keeps_relay_up(tmp_path: Path) -> None:
    """A viewer that waits for a stream is somebody who needs relay; when it leaves relay is idle."""
    with manager(tmp_path) as told, listener() as out:
        text = 'routes: {r: {source: "tcp://127.0.0.1:0", sink: {listen: "systemd://out"}}}\n'
        with activated(text, tmp_path, [("out", out)], told, ["--exit-idle", "300ms"]) as served:
            with socket.create_connection(("127.0.0.1", port_of(out))):
                told.hear("READY")
                until = time.monotonic() + 0.9
                eventually(lambda: time.monotonic() > until, "three times the idle time has passed")
                assert served.process.poll() is None
            assert "nobody has needed relay" in told.hear("STOPPING")["STATUS"]
            assert served.wait() == 0


def test_exit_idle_wants_a_time(tmp_path: Path) -> None:
    """What is no time, or none at all, is a wrong command line."""
    for text in ("soon", "0s"):
        done = run_relay("serve", "--exit-idle", text, cwd=tmp_path)
        assert done.returncode == 2
        assert b"--exit-idle" in done.stderr
