"""Sources that connect: again after each stream and each reset; and streams that wait for their sinks."""

from __future__ import annotations

import select
import signal
import socket
from pathlib import Path

import pytest
from peers import (
    accept,
    eventually,
    receive_exactly,
    refused_address,
    reset,
    send_all,
    tcp_listener,
    unix_listener,
)
from relays import serving
from standing import listening_at, source_of, standing

from relay.endpoints.address import Address

# --- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", ["one", "each"])
def test_a_source_that_connects_is_connected_again(tmp_path: Path, turns: str) -> None:
    """In serve each connection is a turn or a pipeline of its own, one after another; SIGTERM ends it with 0."""
    sink = "{file: 'out.bin', append: true}" if turns == "one" else "'{id}.bin'"
    address = refused_address()
    config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: {sink}}}}}"
    with serving(config, tmp_path) as served:
        refused = served.said("the source is away")
        with listening_at(Address.parse(address).port) as listener:
            for number in range(3):
                with accept(listener) as sock:
                    send_all(sock, b"stream %d\n" % number)
            records = served.sessions(3)
            served.said("its connection has ended")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    assert "connecting to" in refused["message"]
    assert "ECONNREFUSED" in refused["message"]
    assert [record["result"] for record in records] == ["delivered"] * 3
    assert [record["bytes"] for record in records] == [9, 9, 9]
    files = [tmp_path / "out.bin"] if turns == "one" else [tmp_path / f"{n}.bin" for n in (1, 2, 3)]
    assert b"".join(file.read_bytes() for file in files) == b"stream 0\nstream 1\nstream 2\n"


def test_a_source_that_resets_is_connected_again(tmp_path: Path) -> None:
    """A source's reset fails its own stream only: the next connection is a whole one."""
    with tcp_listener() as (listener, address):
        config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: '{{id}}.bin'}}}}"
        with serving(config, tmp_path) as served:
            first = accept(listener)
            send_all(first, b"broken")
            eventually(lambda: list(tmp_path.glob("1.bin.part")), "its file is begun")
            reset(first)
            with accept(listener) as second:
                send_all(second, b"whole")
            broken, whole = served.sessions(2)
            served.signal(signal.SIGTERM)
            served.wait()
    assert (broken["result"], whole["result"]) == ("failed", "delivered")
    assert (tmp_path / "2.bin").read_bytes() == b"whole"


def test_a_drain_lets_a_source_that_connected_go_on(tmp_path: Path) -> None:
    """SIGTERM while a source's stream is under way: it flows out, and nobody is connected to again."""
    with tcp_listener() as (listener, address):
        config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: '{{id}}.bin'}}}}"
        with serving(config, tmp_path) as served:
            with accept(listener) as sock:
                send_all(sock, b"begun, ")
                eventually(lambda: list(tmp_path.glob("1.bin.part")), "its file is begun")
                served.signal(signal.SIGTERM)
                served.said("draining")
                send_all(sock, b"done")
            assert served.wait() == 0
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert (tmp_path / "1.bin").read_bytes() == b"begun, done"


def test_a_unix_source_is_connected_again(tmp_path: Path) -> None:
    """A unix source is no different."""
    with unix_listener(tmp_path / "s") as (listener, address):
        config = f"routes: {{r: {{source: {{connect: '{address}'}}, sink: '{{id}}.bin'}}}}"
        with serving(config, tmp_path) as served:
            for number in range(2):
                with accept(listener) as sock:
                    send_all(sock, b"%d" % number)
            served.sessions(2)
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    assert [(tmp_path / f"{n}.bin").read_bytes() for n in (1, 2)] == [b"0", b"1"]


# --- waiting for sinks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", ["one", "each"])
def test_nothing_is_read_before_every_sink_is_open(tmp_path: Path, connections: str) -> None:
    """With wait_for_sinks a sink that is there gets nothing until the one that is refused is there as well."""
    address = refused_address()
    with tcp_listener() as (listener, there):
        config = standing(f"'{address}'", f"[tee: {{to: '{there}'}}]", "wait_for_sinks: 15s")
        with serving(config.replace("connections: one", f"connections: {connections}"), tmp_path) as served:
            with source_of(served) as source:
                send_all(source, b"all or nothing")
                source.shutdown(socket.SHUT_WR)
                with accept(listener) as early:
                    if connections == "one":
                        served.said("is away")
                    assert not select.select([early], [], [], 0.1)[0]
                    with listening_at(Address.parse(address).port) as late_listener:
                        late = accept(late_listener)
                    with late:
                        assert receive_exactly(late, 14) == b"all or nothing"
                        assert receive_exactly(early, 14) == b"all or nothing"
            if connections == "each":
                assert served.sessions()[0]["result"] == "delivered"


def test_a_stream_does_not_wait_for_ever(tmp_path: Path) -> None:
    """When the time is over the stream goes on without the sink that is not there, and the log names it."""
    address = refused_address()
    drop = f"[tee: {{to: '{address}', on_slow: drop}}]"
    with tcp_listener() as (listener, there):
        config = standing(f"'{there}'", drop, "wait_for_sinks: 300ms")
        with serving(config, tmp_path) as served, accept(listener) as sink, source_of(served) as source:
            send_all(source, b"late")
            said = served.said("goes on without")
            assert receive_exactly(sink, 4) == b"late"
    assert "goes on without tee" in said["message"] or address in said["message"]
