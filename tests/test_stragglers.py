"""The end of a stream whose receivers have stopped: who may hold nobody is not waited for, and the account is exact."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from peers import (
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    send_all,
    tcp_listener,
    unix_listener,
)
from relays import Process, serving

MIB = 1 << 20


def each(sink: str, tee: str, on_slow: str) -> str:
    """A route with a pipeline for each connection, and a tee beside its sink."""
    return f"""
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: each}}
    stages: [{{tee: {{to: "{tee}", on_slow: {on_slow}}}}}]
    sink: "{sink}"
"""


def ended(served: Process, data: bytes, code: int = 0) -> dict[str, Any]:
    """Sends a stream whose end is answered with a close, and its record."""
    with socket.create_connection(("127.0.0.1", served.port())) as source:
        send_all(source, data)
        source.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            receive_all(source)
        (record,) = served.sessions(1)
    served.signal(signal.SIGTERM)
    assert served.wait() == code
    return record


@pytest.mark.parametrize(
    ("unix", "size"),
    [(False, 300_000), (False, 8 * MIB), (True, 500_000)],
    ids=["sent and not acknowledged", "in relay too", "unix"],
)
@pytest.mark.parametrize("more", ["", ", buffer: 16MiB"], ids=["pipe", "buffer"])
@pytest.mark.parametrize("policy", ["drop", "disconnect"])
def test_a_stalled_sink_does_not_hold_the_end(
    tmp_path: Path, policy: str, more: str, unix: bool, size: int
) -> None:
    """A connected sink that takes nothing after the stream's end is ended after `after`: every byte is accounted for,
    what it has is the beginning, and not taken for whole."""
    data = payload(1, size)
    listener = unix_listener(tmp_path / "s") if unix else tcp_listener()
    with listener as (listening, address):
        if not unix:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        config = each("all-{id}", address, f"{{policy: {policy}, after: 100ms{more}}}")
        with serving(config, tmp_path) as served:
            record = ended(served, data)
            got = bytearray()
            with accept(listening) as stalled, contextlib.suppress(ConnectionResetError):
                while piece := stalled.recv(1 << 20):
                    got += piece
                assert unix, "it was told that it had the whole stream"  # a unix socket knows no reset
    tee, file = record["sinks"]
    assert (file["result"], file["bytes"]) == ("delivered", size)
    assert (tee["result"], record["result"]) == ("failed", "partial")
    assert "took nothing for" in tee["reason"]
    assert tee["bytes"] + tee["dropped"] == size
    assert_same(bytes(got), data[: len(got)])
    if not unix:
        assert len(got) <= tee["bytes"]
    assert record["seconds"] < 10


def test_a_receiver_that_goes_on_taking_is_waited_for(tmp_path: Path) -> None:
    """Under drop a receiver slower than `after` for the whole, but never still for that long, gets every byte."""
    data = payload(2, 3 * MIB)
    with tcp_listener() as (listening, address):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        config = each("all-{id}", address, "{policy: drop, after: 400ms, buffer: 16MiB}")
        with serving(config, tmp_path) as served:
            got = bytearray()
            pause = threading.Event()

            def read() -> None:
                with accept(listening) as slow:
                    while piece := slow.recv(1 << 18):
                        got.extend(piece)
                        if len(got) > 2 * MIB:
                            pause.wait(0.02)  # the slow receiver's own pace, not the test's

            reader = threading.Thread(target=read)
            reader.start()
            record = ended(served, data)
            reader.join()
    tee = record["sinks"][0]
    assert (tee["result"], tee["bytes"], tee["dropped"]) == ("delivered", len(data), 0)
    assert_same(bytes(got), data)


@pytest.mark.parametrize("policy", ["drop", "disconnect"])
def test_a_fifo_without_a_reader_does_not_hold_the_end(tmp_path: Path, policy: str) -> None:
    """Nobody ever reads the fifo: under drop and disconnect the stream ends without it, and all of it was dropped."""
    os.mkfifo(tmp_path / "f")
    with serving(
        each("all-{id}", f"fifo://{tmp_path}/f", f"{{policy: {policy}, after: 100ms}}"), tmp_path
    ) as served:
        record = ended(served, payload(3, 5000))
    tee, file = record["sinks"]
    assert (file["result"], tee["result"]) == ("delivered", "failed")
    assert (tee["bytes"], tee["dropped"]) == (0, 5000)


@pytest.mark.parametrize("on_slow", ["block", "{policy: spill, then: drop}"])
def test_block_and_spill_wait(tmp_path: Path, on_slow: str) -> None:
    """Under block and spill the end waits for the stalled sink, which gets every byte when it goes on."""
    data = payload(4, 4 * MIB)
    with tcp_listener() as (listening, address):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        with (
            serving(each("all-{id}", address, on_slow), tmp_path) as served,
            socket.create_connection(("127.0.0.1", served.port())) as source,
            accept(listening) as sink,
        ):
            sender = threading.Thread(target=lambda: (send_all(source, data), source.shutdown(1)))
            sender.start()
            part = tmp_path / "all-1"
            if on_slow != "block":
                eventually(part.exists, "the other has the whole stream")
            got = receive_exactly(sink, MIB)
            assert_same(got + receive_all(sink), data)
            sink.close()
            sender.join()
            (record,) = served.sessions(1)
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    assert record["result"] == "delivered"


def test_a_branch_is_covered_whole(tmp_path: Path) -> None:
    """The policy at a branch's head covers the tee inside it: a stalled sink there does not hold the end either."""
    data = payload(5, MIB)
    with tcp_listener() as (one, inner), tcp_listener() as (two, leaf):
        for listening in (one, two):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        config = f"""
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: each}}
    stages:
      - tee: {{stages: [{{tee: {{to: "{inner}"}}}}], to: "{leaf}", on_slow: {{policy: disconnect, after: 100ms}}}}
    sink: "all-{{id}}"
"""
        with serving(config, tmp_path) as served:
            record = ended(served, data)
    inside, branch, file = record["sinks"]
    assert file["result"] == "delivered"
    for sink in (inside, branch):
        assert sink["result"] == "failed"
        assert sink["bytes"] + sink["dropped"] == len(data)
