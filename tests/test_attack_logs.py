"""Logs of odd sizes and names, limits that end their streams, and two relays on one directory."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from attacks import MIB, connect, finish, routes
from peers import accept, assert_same, payload, receive_all, send_all, tcp_listener
from relays import end, relay, run_relay, serving


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
