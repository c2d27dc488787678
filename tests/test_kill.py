"""kill -9 of a real relay at random instants under a log on disk, and what the next one makes of it.

RELAY_KILLS says how often (5; 200 takes some three minutes), RELAY_SEED with which chance.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
from pathlib import Path

import pytest
from flapping import MATCH, Receiver
from peers import assert_same, eventually, payload, receive_all, send_all
from relays import Process, serving

KILLS = int(os.environ.get("RELAY_KILLS", "5"))
SEED = int(os.environ.get("RELAY_SEED", "1"))
MOST = 6 << 20  # bytes sent in one run
SEND_QUEUE = 8 << 20  # the largest that net.ipv4.tcp_wmem allows here, and what the kernel adds to it

CONFIG = """
routes:
  r:
    source: {{listen: "tcp://127.0.0.1:0", connections: {connections}}}
    sink: {{connect: "{address}", on_slow: {{policy: spill, directory: spill}}}}
"""


def end_of(log: Path) -> int:
    """The position behind the last byte in a log's directory, from its names and sizes alone; 0 without one."""
    with contextlib.suppress(FileNotFoundError):
        last = max((path for path in log.iterdir() if path.name.isdigit()), default=None)
        return int(last.name) + last.stat().st_size if last else 0
    return 0


class Collector:
    """Takes connection after connection while it is up, each to its end; `pieces` has what each gave."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.pieces: list[bytearray] = []
        self._thread: threading.Thread | None = None
        self._stop = self._reading = False
        self.go = threading.Event()

    def up(self, *, stalled: bool = False) -> None:
        """Listens and reads; `stalled`: only once it is told to `go`."""
        self._stop = self._reading = False
        self.go.clear() if stalled else self.go.set()
        self._receiver.up()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        listener = self._receiver._listener
        assert listener is not None
        listener.settimeout(0.05)
        while not self._stop:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            piece = bytearray()
            self.pieces.append(piece)
            self._reading = True
            with connection:
                connection.settimeout(0.05)
                self.go.wait()
                while True:
                    try:
                        got = connection.recv(1 << 20)
                    except TimeoutError:
                        if self._stop:
                            return
                        continue
                    except ConnectionResetError:
                        break
                    if not got:
                        break
                    piece += got
            self._reading = False

    def has(self, end: bytes) -> bool:
        """Whether the last bytes that came are those."""
        return not end or any(piece.endswith(end[-MATCH:]) for piece in self.pieces)

    def idle(self) -> bool:
        """Whether every connection has come to its end."""
        return not self._reading

    def down(self) -> None:
        """Neither listens nor reads."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._receiver.down()


def source_of(port: int, data: bytes) -> threading.Thread:
    """Sends all of `data` to relay, or as much as it takes before it dies."""

    def send() -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as sock:
            send_all(sock, data)
            receive_all(sock, patience=60)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def sending(sock: socket.socket, data: bytes) -> threading.Thread:
    """Sends all of `data`, or as much as relay takes before it dies."""

    def send() -> None:
        with contextlib.suppress(OSError):
            send_all(sock, data)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def kill(served: Process) -> None:
    """SIGKILL, and the wait for it."""
    served.signal(signal.SIGKILL)
    served.process.wait(20)


@pytest.mark.timeout(60 + 3 * KILLS)
def test_nothing_that_is_in_the_log_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed over and over while a source sends: what reached the log reaches the receiver, in order, by itself;
    nothing comes twice if the receiver was down, and at most one send queue if it was up."""
    chance = random.Random(SEED)
    stream = bytearray()  # what the log was given, by position
    have = 0  # how much of it the receiver has, without a gap
    doubled: list[int] = []
    largest_down = 0
    with Receiver(buffer=64 << 10) as receiver:
        config = CONFIG.format(connections="one", address=receiver.address)
        collector = Collector(receiver)

        def checked(exactly: bool) -> None:
            """Each connection went on with a byte that was there already, or with the next one."""
            nonlocal have, largest_down
            for piece in collector.pieces:
                if not piece:
                    continue
                begun = bytes(stream).find(piece[:MATCH], max(0, have - SEND_QUEUE))
                assert 0 <= begun <= have, f"a connection began at {begun}, the receiver had {have}"
                assert_same(bytes(piece), bytes(stream[begun : begun + len(piece)]))
                doubled.append(have - begun)
                if exactly:
                    largest_down = max(largest_down, have - begun)
                have = max(have, begun + len(piece))
            collector.pieces.clear()

        exactly = True  # whether the last connection broke while relay was there to see it
        for turn in range(KILLS):
            data = payload(SEED * 100_000 + turn, MOST)
            mode = chance.choice(["down", "up", "stalled", "left"])
            before = len(stream)
            with serving(config, tmp_path) as served:
                port = served.port()
                served.said("ready")
                (log,) = [path for path in (tmp_path / "spill").iterdir() if path.is_dir()]
                if mode != "down":
                    collector.up(stalled=mode == "stalled")
                sent = chance.randrange(MOST)
                wanted = before + sent
                if mode == "left":
                    with socket.create_connection(("127.0.0.1", port)) as source:
                        send_all(source, data[:sent])
                        eventually(lambda end=data[:sent]: collector.has(end), "the receiver has all")
                        collector.down()
                        wanted += chance.randrange(MOST - sent)
                        sender = sending(source, data[sent:])
                        served.said("is away")
                        eventually(lambda log=log, wanted=wanted: end_of(log) >= wanted, "the log has grown")
                        kill(served)
                        sender.join()
                else:
                    sender = source_of(port, data)
                    eventually(lambda log=log, wanted=wanted: end_of(log) >= wanted, "the log has grown")
                    kill(served)
                    sender.join()
            stream += data[: end_of(log) - before]
            assert len(stream) >= wanted
            collector.go.set()
            if mode in ("up", "stalled"):
                eventually(collector.idle, "what the kernel still had was read")
                collector.down()
            checked(exactly)
            exactly = mode == "left" or (mode == "down" and exactly)
        with serving(config, tmp_path) as served:
            served.port()
            collector.up()
            eventually(
                lambda: have + sum(map(len, collector.pieces)) >= len(stream), "the rest comes by itself"
            )
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
        collector.down()
        checked(exactly)
    assert have == len(stream)
    assert largest_down == 0, "something came twice though the receiver was down"
    assert max(doubled, default=0) <= SEND_QUEUE
    with capsys.disabled():
        print(
            f"\n{KILLS} kills: {len(stream)} bytes in the log, {have} received, 0 lost; "
            f"{sum(1 for count in doubled if count)} connections began with {sum(doubled)} bytes that had come, "
            f"{max(doubled, default=0)} at most"
        )


def test_a_stream_that_was_cut_off_is_delivered_and_not_taken_for_whole(tmp_path: Path) -> None:
    """With a log for each stream: after a kill each arrives on a connection of its own; one that had not ended is
    ended by a reset, one that had, cleanly; then the logs are gone."""
    data = [payload(31, 300_000), payload(32, 200_000)]
    with Receiver() as receiver:
        config = CONFIG.format(connections="each", address=receiver.address)
        spill = tmp_path / "spill"
        with serving(config, tmp_path) as served:
            port = served.port()
            for number, stream in enumerate(data):
                sock = socket.create_connection(("127.0.0.1", port))
                sock.sendall(stream)
                if number:
                    sock.shutdown(socket.SHUT_WR)
                eventually(
                    lambda number=number: (
                        sum(map(end_of, spill.glob("r.*"))) >= sum(map(len, data[: number + 1]))
                    ),
                    "it is in its log",
                )
                if number:
                    eventually(lambda: an_end_is_noted(spill), "its end is noted")
                    sock.close()
                else:
                    first = sock
            kill(served)
            first.close()
        receiver.up()
        with serving(config, tmp_path) as served:
            found: dict[int, bool] = {}
            for _ in data:
                connection = receiver.accept()
                got = bytearray()
                clean = True
                with connection:
                    try:
                        while piece := connection.recv(1 << 20):
                            got += piece
                    except ConnectionResetError:
                        clean = False
                number = data.index(bytes(got))
                found[number] = clean
            assert found == {0: False, 1: True}
            eventually(lambda: not list((tmp_path / "spill").glob("r.*")), "the logs are gone")
            served.signal(signal.SIGTERM)
            assert served.wait() == 0


def an_end_is_noted(spill: Path) -> bool:
    """Whether one of the logs says where its stream ended."""
    return any(path.read_bytes()[16:24] != bytes(8) for path in spill.glob("r.*/cursor"))
