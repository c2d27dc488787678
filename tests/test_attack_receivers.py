"""Receivers that stop, half-close, come late or not at all, and sizes nobody expects: policies keep their promises."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from attacks import MIB, connect, finish, routes
from peers import (
    accept,
    assert_same,
    eventually,
    payload,
    receive_all,
    receive_exactly,
    refused_address,
    send_all,
    tcp_listener,
    unix_listener,
)
from relays import end, serving

RECEIVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
out = open(sys.argv[1], "wb")
try:
    while piece := sock.recv(1 << 16):
        out.write(piece)
    out.close()
    print("end", flush=True)
except ConnectionResetError:
    out.close()
    print("reset", flush=True)
"""


@pytest.mark.parametrize("policy", ["block", "drop", "disconnect", "spill"])
def test_a_stopped_receiver(tmp_path: Path, policy: str) -> None:
    """A receiver that is stopped by SIGSTOP in mid-stream and goes on later: what each policy promises, to the byte."""
    data = payload(1, 48 * MIB)
    argv = [sys.executable, "-c", RECEIVER, str(tmp_path / "got")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout is not None
        port = int(receiver.stdout.readline())
        after = "200ms" if policy != "spill" else "1s"
        config = routes(
            "{source: {listen: 'tcp://127.0.0.1:0', connections: each}, sink: 'all-{id}', stages: ["
            f"{{tee: {{to: 'tcp://127.0.0.1:{port}', on_slow: {{policy: {policy}, after: {after}}}}}}}]}}"
        )
        with serving(config, tmp_path) as served, connect(served) as source:
            send_all(source, data[:MIB])
            eventually(lambda: (tmp_path / "got").exists(), "it receives")
            receiver.send_signal(signal.SIGSTOP)
            sender = threading.Thread(target=lambda: (send_all(source, data[MIB:]), source.shutdown(1)))
            sender.start()
            if policy == "block":
                served.said("it holds the source")
            elif policy == "disconnect":
                served.sessions(1)
            elif policy == "drop":
                served.said("dropping for it alone")
                sender.join()
            else:
                sender.join()
            receiver.send_signal(signal.SIGCONT)
            sender.join()
            (record,) = served.sessions(1)
            how = receiver.stdout.readline().decode().strip()
            end(served)
    got = (tmp_path / "got").read_bytes()
    tee, file = record["sinks"]
    assert (file["result"], file["bytes"]) == ("delivered", len(data))
    assert_same((tmp_path / "all-1").read_bytes(), data)
    assert tee["bytes"] + tee["dropped"] == len(data), tee
    if policy in ("block", "spill"):
        assert how == "end"
        assert_same(got, data)
        assert tee["result"] == "delivered"
    elif policy == "disconnect":
        assert how == "reset"
        assert_same(got, data[: len(got)])
        assert tee["result"] == "failed"
    elif tee["result"] == "delivered":
        assert (how, len(got)) == ("end", tee["bytes"])


@pytest.mark.parametrize("policy", ["block", "drop", "disconnect", "spill"])
def test_after_is_zero(tmp_path: Path, policy: str) -> None:
    """`after: 0s`: a full backlog is slow at once, nothing spins, every byte is accounted for."""
    data = payload(2, 32 * MIB)
    with tcp_listener() as (listening, address):
        slow = (
            f"{{policy: {policy}, after: 0s}}"
            if policy != "spill"
            else "{policy: spill, max: 1MiB, then: drop, after: 0s}"
        )
        config = routes(
            f"{{source: 'tcp://127.0.0.1:0', sink: 'all-{{id}}', "
            f"stages: [{{tee: {{to: '{address}', on_slow: {slow}}}}}]}}"
        )
        with serving(config, tmp_path) as served, connect(served) as source, accept(listening) as sink:
            sender = threading.Thread(target=lambda: (send_all(source, data), source.shutdown(1)))
            sender.start()
            if policy == "block":
                served.said("it holds the source")
            elif policy == "disconnect":
                served.sessions()
            else:
                sender.join()
            with contextlib.suppress(ConnectionResetError):
                got = receive_all(sink)
            sender.join()
            sink.close()
            (record,) = served.sessions()
            end(served)
    tee, file = record["sinks"]
    assert file["result"] == "delivered"
    assert tee["bytes"] + tee["dropped"] == len(data)
    if policy == "block":
        assert_same(got, data)


@pytest.mark.parametrize("piece", [3 * MIB, 12 * MIB], ids=["more than the pipe", "more than the ring"])
@pytest.mark.parametrize("kind", ["tee", "broadcast"])
def test_align_larger_than_what_holds_it(tmp_path: Path, piece: int, kind: str) -> None:
    """Gaps begin and end between pieces, however large those are: each piece comes whole or not at all."""
    data = b"".join(bytes([number]) * piece for number in range(8))
    with tcp_listener() as (listening, address):
        slow = f"on_slow: {{policy: drop, after: 50ms, align: {piece}}}"
        where = "connect: '" + address + "'" if kind == "tee" else "listen: 'tcp://127.0.0.1:0'"
        config = routes(
            "{source: {listen: 'tcp://127.0.0.1:0', connections: "
            + ("each" if kind == "tee" else "one")
            + "}, sink: 'all-{id}', "
            f"stages: [{{tee: {{to: {{{where}}}, {slow}}}}}]}}"
        )
        with serving(config, tmp_path) as served:
            if kind == "tee":
                source = connect(served)
                sink = accept(listening)
            else:
                sink = connect(served)
                source = connect(served, 1)
            first = threading.Thread(target=send_all, args=(source, data))
            first.start()
            first.join()
            got = bytearray()

            def read() -> None:
                with contextlib.suppress(ConnectionResetError):
                    while piece_of := sink.recv(1 << 20):
                        got.extend(piece_of)

            reader = threading.Thread(target=read)
            reader.start()
            finish(source)
            (record,) = served.sessions()
            if kind == "broadcast":
                end(served)  # until then a subscriber waits for the next stream
            reader.join()
            sink.close()
            if kind == "tee":
                end(served)
    (tee, _file) = record["sinks"]
    if tee["result"] == "delivered" and kind == "tee":
        assert len(got) == tee["bytes"]
        assert tee["bytes"] + tee["dropped"] == len(data)
        assert len(got) % piece == 0
    at = 0
    while at + piece <= len(got):
        assert len(set(got[at : at + piece])) == 1
        at += piece


def test_bytes_one_by_one_to_eight_sinks(tmp_path: Path) -> None:
    """A source that sends each byte by itself: eight sinks of all kinds get every one."""
    data = payload(5, 20_000)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(tcp_listener()) for _ in range(3)]
        listeners += [stack.enter_context(unix_listener(tmp_path / f"s{i}")) for i in range(2)]
        slow = ["block", "drop", "disconnect", "spill", "{policy: spill, directory: spill}"]
        tees = ", ".join(
            f"{{tee: {{to: '{address}', on_slow: {how}}}}}"
            for (_, address), how in zip(listeners, slow, strict=True)
        )
        tees += ", {tee: {to: 'a-{id}'}}, {tee: {to: 'b-{id}', on_slow: spill}}"
        config = routes(f"{{source: 'tcp://127.0.0.1:0', sink: 'c-{{id}}', stages: [{tees}]}}")
        served = stack.enter_context(serving(config, tmp_path))
        source = stack.enter_context(connect(served))
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sinks = [accept(listener) for listener, _ in listeners]
        for at in range(len(data)):
            source.send(data[at : at + 1])
        source.shutdown(1)
        for sink in sinks:
            assert_same(receive_all(sink), data)
            sink.close()
        (record,) = served.sessions()
        end(served)
    assert [sink["result"] for sink in record["sinks"]] == ["delivered"] * 8
    for name in "abc":
        assert_same((tmp_path / f"{name}-1").read_bytes(), data)


def test_wait_for_sinks_that_never_come(tmp_path: Path) -> None:
    """The wait ends: the stream goes to those who are there, whoever is not is that sink's failure, and is named."""
    config = routes(
        "{source: {listen: 'tcp://127.0.0.1:0', connections: each}, sink: 'all-{id}', wait_for_sinks: 300ms, "
        f"stages: [{{tee: {{to: '{refused_address()}', on_slow: drop}}}}]}}"
    )
    with serving(config, tmp_path) as served:
        with connect(served) as source:
            send_all(source, b"here")
            finish(source)
        (record,) = served.sessions()
        end(served)
    assert (tmp_path / "all-1").read_bytes() == b"here"
    tee, file = record["sinks"]
    assert (tee["result"], file["result"]) == ("failed", "delivered")
    assert tee["bytes"] + tee["dropped"] == 4


def test_a_burst_larger_than_the_ring(tmp_path: Path) -> None:
    """`burst: 64MiB`: a late subscriber gets that much of what was, and every byte from there on."""
    data = payload(6, 24 * MIB)
    config = routes("{source: 'tcp://127.0.0.1:0', sink: {listen: 'tcp://127.0.0.1:0', burst: 64MiB}}")
    with serving(config, tmp_path) as served:
        served.addresses(2)
        with connect(served, 1) as source, connect(served, 0) as early:
            sender = threading.Thread(target=send_all, args=(source, data))
            sender.start()
            assert_same(receive_exactly(early, len(data)), data)
            sender.join()
            with connect(served, 0) as late:
                source.sendall(b"more")
                got = receive_exactly(late, len(data) + 4)
                assert_same(got, data + b"more")
            finish(source)
        served.sessions()
        end(served)


@pytest.mark.parametrize("connections", ["each", "one"])
def test_thirty_two_tees_of_which_the_last_is_dead(tmp_path: Path, connections: str) -> None:
    """31 tees and the sink have the whole stream; the dead one is the only failure."""
    data = payload(7, 3 * MIB)
    with tcp_listener() as (listening, address):
        tees = ", ".join(f"{{tee: {{to: '{address}', on_slow: drop, name: t{i}}}}}" for i in range(31))
        tees += f", {{tee: {{to: '{refused_address()}', on_slow: {{policy: drop, after: 100ms}}}}}}"
        config = routes(
            f"{{source: {{listen: 'tcp://127.0.0.1:0', connections: {connections}}}, "
            f"sink: 'all-{{id}}', stages: [{tees}]}}"
        )
        with serving(config, tmp_path) as served, connect(served) as source:
            sinks = [accept(listening) for _ in range(31)]
            got: dict[int, bytes] = {}

            def take(number: int) -> None:
                got[number] = receive_exactly(sinks[number], len(data))

            threads = [threading.Thread(target=take, args=(i,)) for i in range(31)]
            for thread in threads:
                thread.start()
            send_all(source, data)
            source.shutdown(1)
            for thread in threads:
                thread.join()
            for sink in sinks if connections == "each" else []:
                assert receive_all(sink) == b""
                sink.close()
            (record,) = served.sessions()
            for sink in sinks:
                sink.close()
            end(served)
    for number in range(31):
        assert_same(got[number], data)
    assert_same((tmp_path / "all-1").read_bytes(), data)
    results = [sink["result"] for sink in record["sinks"]]
    assert results.count("failed") == 1
    assert results[31] == "failed"
    dead = record["sinks"][31]
    assert dead["bytes"] + dead["dropped"] + dead.get("backlog", 0) == len(data)


@pytest.mark.parametrize("when", ["before the first byte", "in mid-stream", "before the end"])
@pytest.mark.parametrize("policy", ["block", "drop", "disconnect", "spill"])
def test_a_receiver_that_half_closes(tmp_path: Path, policy: str, when: str) -> None:
    """A receiver that ends its own stream, at whatever moment, goes on receiving and gets every byte and the end."""
    data = payload(8, 2 * MIB)
    with tcp_listener() as (listening, address):
        config = routes(
            "{source: {listen: 'tcp://127.0.0.1:0', connections: each}, sink: 'all-{id}', "
            f"stages: [{{tee: {{to: '{address}', on_slow: {policy}}}}}]}}"
        )
        with serving(config, tmp_path) as served, connect(served) as source, accept(listening) as sink:
            got = b""
            if when == "before the first byte":
                sink.shutdown(socket.SHUT_WR)
            sender = threading.Thread(target=send_all, args=(source, data))
            sender.start()
            if when == "in mid-stream":
                got += receive_exactly(sink, MIB)
                sink.shutdown(socket.SHUT_WR)
            if when == "before the end":
                got += receive_exactly(sink, len(data))
                sink.shutdown(socket.SHUT_WR)
            sender_end = threading.Thread(target=lambda: (sender.join(), source.shutdown(1)))
            sender_end.start()
            got += receive_all(sink)
            sender_end.join()
            sink.close()
            (record,) = served.sessions()
            end(served)
    assert_same(got, data)
    assert record["result"] == "delivered"
    assert record["sinks"][0]["reconnects"] == 0


@pytest.mark.parametrize("policy", ["block", "spill"])
def test_a_fifo_whose_reader_comes_late(tmp_path: Path, policy: str) -> None:
    """Under block and spill a fifo without a reader is waited for, also when the stream has ended long ago."""
    os.mkfifo(tmp_path / "f")
    data = payload(9, 300_000)
    config = routes(
        "{source: {listen: 'tcp://127.0.0.1:0', connections: each}, sink: 'all-{id}', "
        f"stages: [{{tee: {{to: 'fifo://{tmp_path}/f', on_slow: {policy}}}}}]}}"
    )
    with serving(config, tmp_path) as served, connect(served) as source:
        send_all(source, data)
        source.shutdown(1)
        if policy == "spill":
            eventually(lambda: (tmp_path / "all-1").exists(), "the other has it whole")
        assert_same((tmp_path / "f").read_bytes(), data)
        (record,) = served.sessions()
        end(served)
    assert record["result"] == "delivered"
