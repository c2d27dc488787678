"""How large a stream's first pieces are is seen before anything is measured, and may say which way is cheaper."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from faults import strace_prefix
from peers import accept, assert_same, connected, payload, receive_all, send_all, unix_listener
from relays import Relay, listening_on, relay

from relay.journal.record import SessionRecord
from relay.pipeline import crossing
from relay.ways import SMALL_ONES, Pieces

MIB = 1 << 20
EVER = 1 << 60  # nanoseconds


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Pieces]:
    """What is seen of streams, however slowly this machine lets them come."""
    found: list[Pieces] = []

    def pieces(first: int, filled: int) -> Pieces:
        found.append(Pieces(first, filled))
        return found[-1]

    monkeypatch.setattr(crossing, "Pieces", pieces)
    monkeypatch.setattr(crossing, "BUSY_NS", EVER)
    monkeypatch.setattr(crossing, "PATIENCE", 10.0)
    monkeypatch.setattr(crossing, "COUNTS", 1)
    return found


def send_in_pieces(end: socket.socket, data: bytes, size: int) -> None:
    """Each of `size` bytes is a message of its own, as unix sockets keep them."""
    for start in range(0, len(data), size):
        send_all(end, data[start : start + size])
    end.shutdown(socket.SHUT_WR)


def carried(data: bytes, size: int, folder: Path, **more: Any) -> SessionRecord:
    """`data` from a unix socket in pieces of `size` bytes to two others, which get it whole: the record."""
    with unix_listener(folder / "one") as (one, first), unix_listener(folder / "two") as (two, second):
        made = {"source": f"unix://{folder}/in", "stages": [{"tee": {"to": first}}], "sink": second, **more}
        with Relay(made) as running, connected(running.bound[-1]) as source:
            with accept(one) as near, accept(two) as far:
                feeder = threading.Thread(target=send_in_pieces, args=(source, data, size))
                feeder.start()
                other = [b""]
                reader = threading.Thread(target=lambda: other.append(receive_all(near)))
                reader.start()
                assert_same(receive_all(far), data)
                reader.join(30)
                feeder.join(30)
                assert_same(other[-1], data)
            record = running.wait()
    assert record is not None
    return record


@pytest.mark.parametrize("size", [64, 512, 1000])
def test_small_messages_are_copied_from_then_on(tmp_path: Path, seen: list[Pieces], size: int) -> None:
    """Of small messages each is a slot in every pipe: they are copied as soon as that was seen."""
    data = payload(1, 4 * MIB)
    record = carried(data, size, tmp_path)
    (found,) = seen
    assert size * 9 // 10 <= found.first <= size  # one that crosses the end of a page is two slots
    told = record.measured
    assert (told["began"], told["way"], told["changes"]) == ("zero-copy", "copy", 1)
    assert sum(told["bytes"].values()) == len(data)
    assert told["bytes"]["copy"] > told["bytes"]["zero-copy"] > 0
    assert record.method == "copy"
    assert record.why_method == SMALL_ONES or "CPU-seconds per GiB" in record.why_method


def test_large_messages_go_on_by_reference(tmp_path: Path, seen: list[Pieces]) -> None:
    """Of 64 KiB each page is a slot, which is what references are for: nothing changes."""
    data = payload(2, 6 * MIB)
    record = carried(data, 65536, tmp_path)
    assert len(seen) == 1
    assert seen[0].first > 2048
    assert record.method == "splice"
    assert record.measured["changes"] == 0


def test_what_comes_slowly_is_left_as_it_is(
    tmp_path: Path, seen: list[Pieces], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small messages that take their time cost little whatever the way, and larger ones may follow."""
    monkeypatch.setattr(crossing, "BUSY_NS", -1)
    record = carried(payload(3, MIB), 512, tmp_path)
    assert not seen
    assert record.method == "splice"


@pytest.mark.parametrize("method", ["zero-copy", "copy"])
def test_who_was_told_the_way_looks_at_nothing(tmp_path: Path, seen: list[Pieces], method: str) -> None:
    """With `method` the way is not a question, and nothing is looked at."""
    record = carried(payload(4, MIB), 512, tmp_path, method=method)
    assert not seen
    assert record.method == ("copy" if method == "copy" else "splice")


def test_where_tee_is_refused_nothing_is_known_and_nothing_lost(tmp_path: Path) -> None:
    """A sandbox without tee lets one sink be spliced to: how large its pieces are stays unknown, all of them arrive."""
    data = payload(5, 2 * MIB)
    with unix_listener(tmp_path / "out") as (listener, address):
        command = ("run", "tcp://127.0.0.1:0", "--to", address)
        with relay(*command, cwd=tmp_path, prefix=strace_prefix("tee:error=EPERM")) as running:
            with connected(f"tcp://127.0.0.1:{listening_on(running)}") as source, accept(listener) as sink:
                feeder = threading.Thread(target=send_in_pieces, args=(source, data, 512))
                feeder.start()
                assert_same(receive_all(sink), data)
                feeder.join(30)
            assert running.wait() == 0
