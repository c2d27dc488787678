"""Sinks under `block`: whoever has room in its backlog holds nobody, and whoever has none holds all."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from peers import (
    accept,
    assert_same,
    payload,
    receive_all,
    receive_exactly,
    send_all,
    tcp_listener,
)
from relays import serving

ROUTE = """
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: each}}
    method: {method}
    stages: [{stages}]
    sink: "{sink}"
"""


@pytest.mark.parametrize("method", ["zero-copy", "copy", "auto"])
@pytest.mark.parametrize("first", [True, False], ids=["in front", "behind"])
def test_a_sink_that_is_down_holds_nobody_while_its_backlog_has_room(
    tmp_path: Path, method: str, first: bool
) -> None:
    """A fifo that nobody reads yet keeps what is its own; the connection beside it, in whichever order, has every byte
    meanwhile, and the fifo's reader gets every byte when it comes."""
    data = payload(1, 300_000)
    fifo = tmp_path / "f"
    os.mkfifo(fifo)
    with tcp_listener() as (listening, address):
        down, up = f'{{tee: {{to: "fifo://{fifo}"}}}}', f'{{tee: {{to: "{address}"}}}}'
        config = ROUTE.format(
            method=method, stages=f"{down}, {up}" if first else f"{up}, {down}", sink="null:"
        )
        with (
            serving(config, tmp_path) as served,
            socket.create_connection(("127.0.0.1", served.port())) as source,
            accept(listening) as sink,
        ):
            send_all(source, data)
            assert_same(receive_exactly(sink, len(data)), data)
            got = bytearray()
            reader = threading.Thread(target=lambda: got.extend(fifo.read_bytes()))
            reader.start()
            source.shutdown(socket.SHUT_WR)
            assert receive_all(sink) == b""
            sink.close()
            reader.join()
            (record,) = served.sessions(1)
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
    assert_same(bytes(got), data)
    assert record["result"] == "delivered"


def test_one_byte_after_the_other_passes_a_stalled_neighbour(tmp_path: Path) -> None:
    """Each byte of a slow talker reaches the others while one of three sinks has not been read at all."""
    os.mkfifo(tmp_path / "f")
    with tcp_listener() as (one, tcp), tcp_listener() as (two, last):
        stages = f'{{tee: {{to: "fifo://{tmp_path}/f"}}}}, {{tee: {{to: "{tcp}"}}}}'
        with (
            serving(ROUTE.format(method="zero-copy", stages=stages, sink=last), tmp_path) as served,
            socket.create_connection(("127.0.0.1", served.port())) as source,
            accept(one) as middle,
            accept(two) as end,
        ):
            for number in range(100):
                byte = bytes([number])
                source.sendall(byte)
                assert receive_exactly(middle, 1) == receive_exactly(end, 1) == byte
            reader = os.open(tmp_path / "f", os.O_RDONLY)
            try:
                with os.fdopen(os.dup(reader), "rb") as fifo:
                    assert fifo.read(100) == bytes(range(100))
                source.shutdown(socket.SHUT_WR)
                assert receive_all(middle) == receive_all(end) == b""
                middle.close()
                end.close()
                served.sessions(1)
            finally:
                os.close(reader)


def test_a_full_backlog_holds_the_source_and_says_so(tmp_path: Path) -> None:
    """With more than the backlog takes, the source is held, a warning names the sink that is away, and every byte comes
    when it is back."""
    data = payload(2, 24 << 20)
    os.mkfifo(tmp_path / "f")
    with tcp_listener() as (listening, address):
        stages = f'{{tee: {{to: "fifo://{tmp_path}/f", on_slow: {{policy: block, after: 50ms}}}}}}'
        with (
            serving(ROUTE.format(method="zero-copy", stages=stages, sink=address), tmp_path) as served,
            socket.create_connection(("127.0.0.1", served.port())) as source,
            accept(listening) as sink,
        ):
            sender = threading.Thread(
                target=lambda: (send_all(source, data), source.shutdown(socket.SHUT_WR))
            )
            both = [bytearray(), bytearray()]
            other = threading.Thread(target=lambda: both[0].extend(receive_all(sink)))
            sender.start()
            other.start()
            served.said("is away: it holds the source")
            assert len(both[0]) < len(data)
            reader = threading.Thread(target=lambda: both[1].extend((tmp_path / "f").read_bytes()))
            reader.start()
            for thread in (sender, other, reader):
                thread.join()
            sink.close()
            (record,) = served.sessions(1)
    for got in both:
        assert_same(bytes(got), data)
    assert record["sinks"][0]["blocked_seconds"] > 0.04
