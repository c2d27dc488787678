"""Who lives around a relay during a soak: feeders that stall, reset and are killed, receivers that come and go.

Everybody keeps what it saw; what that must be is for the test to say. Each has a thread and a seeded chance of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flapping import Receiver
from numbered import stream
from peers import connected, program, reset

SILENCE = 30.0  # seconds after which somebody gives up


@dataclasses.dataclass
class Given:
    """One stream given to a route: how large, what became of it, and when. `epoch` counts relays that ran before."""

    route: str
    number: int
    size: int
    epoch: int
    whole: bool = False  # relay said at its end that all is well, and was not killed meanwhile
    asked: bool = False  # the feeder ended it itself, whole


@dataclasses.dataclass
class Piece:
    """What one connection of a receiver brought; `ended`: an orderly end, `left`: the receiver itself broke it off."""

    who: str
    got: bytearray = dataclasses.field(default_factory=bytearray)
    ended: bool = False
    left: bool = False
    epoch: int = 0
    began: float = 0.0


class World:
    """What everybody shares: the numbers of streams, the relay's epoch, and the end."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.epoch = 0
        self.stop = threading.Event()  # nobody begins anything new
        self.calm = threading.Event()  # nobody misbehaves any more
        self.given: list[Given] = []
        self.pieces: list[Piece] = []
        self.trouble: list[BaseException] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def new_stream(self, route: str, size: int) -> Given:
        """The next stream."""
        with self._lock:
            given = Given(route, next(self._numbers), size, self.epoch)
            self.given.append(given)
        return given

    def new_piece(self, who: str) -> Piece:
        """The next connection of a receiver."""
        piece = Piece(who, epoch=self.epoch, began=time.monotonic())
        with self._lock:
            self.pieces.append(piece)
        return piece

    def thread(self, run: Callable[[], None], name: str) -> threading.Thread:
        """Starts a thread whose failure is kept."""

        def kept() -> None:
            try:
                run()
            except BaseException as error:  # told by the test's own thread
                self.trouble.append(error)

        thread = threading.Thread(target=kept, name=name)
        thread.start()
        return thread


def feed(world: World, route: str, address: str, seed: int) -> None:
    """One stream after another until the world stops; some are stalled, some reset, some fed by a killed nc."""
    chance = random.Random(seed)
    while not world.stop.is_set():
        given = world.new_stream(route, 2048 * chance.randrange(1, 400) + 8)
        how = chance.choice(["whole", "whole", "whole", "stalls", "resets", "killed", "late"])
        try:
            if how == "killed" and address.startswith("tcp:"):
                _feed_by_nc(world, given, address, chance)
            else:
                _feed(world, given, address, how, chance)
        except OSError:
            world.stop.wait(0.1)  # relay is not there, or has reset it


def _feed(world: World, given: Given, address: str, how: str, chance: random.Random) -> None:
    data = memoryview(stream(given.number, given.size))
    with connected(address) as sock:
        given.epoch = world.epoch
        sock.settimeout(SILENCE)
        if how == "late":
            world.calm.wait(chance.random() / 4)
        cut = chance.randrange(given.size)
        sock.sendall(data[:cut])
        if how == "resets":
            reset(sock)
            return
        if how == "stalls":
            world.calm.wait(chance.random() / 2)
        sock.sendall(data[cut:])
        sock.shutdown(socket.SHUT_WR)
        given.asked = True
        with contextlib.suppress(ConnectionResetError):
            given.whole = sock.recv(1) == b"" and world.epoch == given.epoch


def _feed_by_nc(world: World, given: Given, address: str, chance: random.Random) -> None:
    """nc, which may be killed before it has sent everything."""
    path = world.place / f"given-{given.number}"
    path.write_bytes(stream(given.number, given.size))
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with path.open("rb") as file:
        argv = [program("nc"), "-N", host, port]
        with subprocess.Popen(argv, stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as nc:
            try:
                nc.wait(chance.random() / 10)
            except subprocess.TimeoutExpired:
                nc.send_signal(signal.SIGKILL)
    path.unlink()


class Taking:
    """A receiver at one address: takes every connection; some stall, some are reset, and at times nobody listens."""

    def __init__(
        self, world: World, name: str, seed: int, *, breaks: bool = True, buffer: int = 64 << 10
    ) -> None:
        self._world = world
        self._name = name
        self._chance = random.Random(seed)
        self._breaks = breaks
        self.receiver = Receiver(buffer=buffer)
        self.receiver.up()
        self.over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._threads.append(world.thread(self._accept, name))

    def _accept(self) -> None:
        """Until it is over; between two connections it may be down for a while."""
        while not self.over.is_set():
            listener = self.receiver._listener
            assert listener is not None
            listener.settimeout(0.1)
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            piece, chance = self._world.new_piece(self._name), random.Random(self._chance.random())
            self._threads.append(
                self._world.thread(lambda s=sock, p=piece, c=chance: self._read(s, p, c), self._name)  # type: ignore[misc] # bound here
            )
            if self._breaks and not self._world.calm.is_set() and self._chance.random() < 0.1:
                self.receiver.down()
                self._world.calm.wait(self._chance.random())
                self.receiver.up()

    def _read(self, sock: socket.socket, piece: Piece, chance: random.Random) -> None:
        how = chance.choice(["reads", "reads", "stalls", "resets", "ends"]) if self._breaks else "reads"
        at = chance.randrange(1 << 20)
        with sock:
            sock.settimeout(0.2)
            while True:
                try:
                    got = sock.recv(1 << 18)
                except TimeoutError:
                    if self.over.is_set():
                        return
                    continue
                except ConnectionResetError:
                    return
                if not got:
                    piece.ended = True
                    return
                piece.got += got
                calm = self._world.calm
                if len(piece.got) < at or calm.is_set():
                    continue
                if how == "stalls":
                    calm.wait(chance.random())
                    at += 1 << 20
                elif how == "ends":  # a half-close is no goodbye
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_WR)
                    how = "reads"
                elif how == "resets":
                    piece.left = True
                    reset(sock)
                    return

    def close(self) -> None:
        """Nobody listens or reads any more."""
        self.over.set()
        for thread in self._threads:
            thread.join(SILENCE)
        self.receiver.down()
        self.receiver.__exit__()


def subscribe(world: World, name: str, address: str, seed: int) -> None:
    """Joins a broadcast again and again; stalls, leaves, or is a socat that is killed."""
    chance = random.Random(seed)
    while not world.stop.is_set():
        how = chance.choice(["reads", "stalls", "leaves", "killed"])
        piece = world.new_piece(name)
        until = time.monotonic() + 0.2 + 2 * chance.random()
        try:
            if how == "killed":
                _subscribe_by_socat(world, piece, address, until)
                continue
            with connected(address) as sock:
                sock.settimeout(0.1)
                while not world.stop.is_set() and not (how == "leaves" and time.monotonic() > until):
                    with contextlib.suppress(TimeoutError):
                        got = sock.recv(1 << 18)
                        if not got:
                            break
                        piece.got += got
                        if how == "stalls":
                            world.calm.wait(chance.random() / 2)
        except OSError:
            world.stop.wait(0.1)


def _subscribe_by_socat(world: World, piece: Piece, address: str, until: float) -> None:
    path = world.place / f"viewer-{id(piece)}"
    argv = [program("socat"), "-u", address.replace("tcp://", "TCP:"), f"CREATE:{path}"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as viewer:
        with contextlib.suppress(subprocess.TimeoutExpired):
            viewer.wait(max(0.0, until - time.monotonic()))
        viewer.kill()
    if path.exists():
        piece.got += path.read_bytes()
        path.unlink()
    else:
        world.stop.wait(0.1)


def free_ports(count: int, seed: int) -> list[int]:
    """Ports that nobody has, none of which the kernel gives to connections while a killed relay is away."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chance = random.Random(f"{seed} {os.getpid()}")
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port = chance.randrange(2048, lowest)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found
