"""Odd and hostile uses of the real program, from one sink of many to a flood of signals: what is promised holds."""

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
from relays import Process, relay, run_relay, serving

MIB = 1 << 20


def routes(text: str) -> str:
    """A configuration of one route called r."""
    return "drain: 5s\nroutes:\n  r: " + text + "\n"


def connect(served: Process, number: int = 0) -> socket.socket:
    """A connection to the address `number` that relay listens on."""
    return socket.create_connection(("127.0.0.1", served.port(number)))


def finish(sock: socket.socket) -> None:
    """Ends the stream and waits until relay has closed."""
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        receive_all(sock)
    sock.close()


def end(served: Process, code: int = 0) -> None:
    """SIGTERM, and the exit code that is expected."""
    served.signal(signal.SIGTERM)
    assert served.wait() == code, served.text


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


def test_a_log_smaller_than_a_segment(tmp_path: Path) -> None:
    """`max: 1` and `max: 4KiB` are logs, too: every byte goes through them."""
    data = payload(3, 300_000)
    for most, directory in (("1B", ""), ("4KiB", ", directory: spill"), ("4KiB", "")):
        with tcp_listener() as (listening, address):
            config = routes(
                f"{{source: 'tcp://127.0.0.1:0', sink: {{connect: '{address}', "
                f"on_slow: {{policy: spill, max: {most}{directory}}}}}}}"
            )
            size = 100 if most == "1B" else len(data)
            with serving(config, tmp_path) as served, connect(served) as source, accept(listening) as sink:
                send_all(source, data[:size])
                source.shutdown(1)
                assert_same(receive_all(sink), data[:size])
                sink.close()
                served.sessions()
                end(served)


@pytest.mark.parametrize(("limit", "words"), [("idle: 300ms", "idle"), ("lifetime: 700ms", "lifetime")])
def test_a_limit_during_a_catch_up(tmp_path: Path, limit: str, words: str) -> None:
    """A stream that a limit of time ended is delivered from its log all the same, and its receiver is reset."""
    data = payload(4, 6 * MIB)
    with tcp_listener() as (listening, address):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        config = routes(
            f"{{source: {{listen: 'tcp://127.0.0.1:0', limits: {{{limit}}}}}, "
            f"sink: {{connect: '{address}', on_slow: {{policy: spill, directory: spill}}}}}}"
        )
        with serving(config, tmp_path) as served, connect(served) as source, accept(listening) as sink:
            send_all(source, data)
            with pytest.raises(ConnectionResetError):  # though its receiver has not taken a byte
                source.recv(1)
            got = bytearray()
            how = "end"
            try:
                while piece := sink.recv(1 << 16):
                    got += piece
            except ConnectionResetError:
                how = "reset"
            (record,) = served.sessions()
            end(served)
    assert how == "reset"
    assert_same(bytes(got), data)
    assert words in record["reason"]


def test_a_finished_stream_is_not_idle_while_its_log_catches_up(tmp_path: Path) -> None:
    """`idle` and `lifetime` are the source's: a stream that ended in time is delivered whole."""
    data = payload(4, 6 * MIB)
    with tcp_listener() as (listening, address):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        config = routes(
            "{source: {listen: 'tcp://127.0.0.1:0', limits: {idle: 300ms, lifetime: 1s}}, "
            f"sink: {{connect: '{address}', on_slow: spill}}}}"
        )
        with serving(config, tmp_path) as served, connect(served) as source, accept(listening) as sink:
            send_all(source, data)
            source.shutdown(1)
            source.settimeout(1.5)
            with pytest.raises(TimeoutError):
                source.recv(1)
            assert_same(receive_all(sink), data)
            sink.close()
            (record,) = served.sessions()
            end(served)
    assert record["result"] == "delivered"


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


def test_names_that_are_too_long(tmp_path: Path) -> None:
    """A route's name of 64 KiB is refused; a log whose name no filesystem takes is its sink's failure, no bug."""
    tee = "stages: [{{tee: {{to: '{}', {}}}}}]"
    text = "routes:\n  ? {}\n  : {{source: 'tcp://127.0.0.1:0', sink: 'o-{{id}}', " + tee + "}}\n"
    spill = "on_slow: {policy: spill, directory: spill}"
    (tmp_path / "c.yaml").write_text(text.format("n" * 65536, "tcp://127.0.0.1:9", spill))
    done = run_relay("check", tmp_path / "c.yaml", cwd=tmp_path)
    assert (done.returncode, len(done.stderr) < 1000) == (3, True)
    assert b"is too long for a route" in done.stderr
    long = "tcp://" + ".".join(["h" * 60] * 4) + ":9"
    with serving(text.format("r", long, spill), tmp_path) as served:
        with connect(served) as source:
            send_all(source, b"here")
            finish(source)
        (record,) = served.sessions()
        end(served)
    assert "bug" not in served.text
    assert [sink["result"] for sink in record["sinks"]] == ["failed", "delivered"]
    assert "ENAMETOOLONG" in record["sinks"][0]["reason"]


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


def test_two_relays_on_one_spill_directory(tmp_path: Path) -> None:
    """The second is told who has it and ends with 4; the first one's streams notice nothing."""
    with tcp_listener() as (listening, address):
        config = routes(
            f"{{source: 'tcp://127.0.0.1:0', sink: {{connect: '{address}', "
            "on_slow: {policy: spill, directory: spill}}}"
        )
        with serving(config, tmp_path) as first, connect(first) as source, accept(listening) as sink:
            send_all(source, b"before ")
            with relay("serve", "--log-format", "json", first.config, cwd=tmp_path) as second:
                assert second.wait() == 4
                assert "another relay uses it" in second.text
            send_all(source, b"after")
            source.shutdown(1)
            assert receive_all(sink) == b"before after"
            sink.close()
            first.sessions()
            end(first)


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


def test_a_sidecar_does_not_stand_with_rotate(tmp_path: Path) -> None:
    """One checksum for many files says nothing: refused with its line."""
    text = routes(
        "{source: 'tcp://127.0.0.1:0', sink: {file: 'o-{id}', rotate: {size: 1MiB}, sidecar: sha256}}"
    )
    (tmp_path / "c.yaml").write_text(text)
    done = run_relay("check", tmp_path / "c.yaml", cwd=tmp_path)
    assert done.returncode == 3
    assert b"c.yaml:3:" in done.stderr
