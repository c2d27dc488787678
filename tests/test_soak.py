"""A soak: `relay serve` with routes of every kind among real feeders and receivers that stall, reset, die and are late.

Reloads, and a kill -9 of relay with a restart, come in between; in the end every promise is looked after, and relay
has given back what it took. RELAY_SOAK says for how many seconds (5, some 15 s in all); RELAY_SEED chooses another
course of events.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from flapping import SEND_QUEUE
from numbered import SURE, Run, runs
from peers import eventually
from relays import RELAY, environment
from soak import Given, Piece, Taking, World, feed, free_ports, subscribe

SECONDS = float(os.environ.get("RELAY_SOAK", "5"))
SEED = int(os.environ.get("RELAY_SEED", "1"))
ALIGN = 188
ROTATE = 200_000
UNREAD = 512 << 10  # bytes that may have come to a receiver's kernel when the receiver went
MIB = 1 << 20
MOST_MORE = 64 * MIB  # bytes in memory

CONFIG = """
drain: 20s
routes:
  archive:
    source: {{listen: "unix://archive.sock", connections: each}}
    stages:
      - tee: {{name: whole, to: {{file: "archive/whole-{{id}}"}}}}
      - tee: {{name: rotated, to: {{file: "archive/rotated-{{id}}", rotate: {{size: {rotate}}}}}}}
    sink: {{connect: "{block}"}}
  spill:
    source: {{listen: "{spill_source}", connections: each}}
    stages: [{{tee: {{name: memory, to: {{connect: "{memory}"}}, on_slow: spill}}}}]
    sink: {{connect: "{disk}", on_slow: {{policy: spill, directory: spill}}}}
  live:
    source: {{listen: "{live_source}", connections: one}}
    stages:
      - tee: {{name: drop, to: {{connect: "{drop}"}}, on_slow: {{policy: drop, after: {after}ms, align: {align}}}}}
      - tee: {{name: disconnect, to: {{connect: "{disconnect}"}}, on_slow: {{policy: disconnect, after: 100ms}}}}
      - tee: {{name: all, to: {{file: all.bin, append: true}}}}
    sink: {{listen: "{viewers}", burst: 64KiB, on_slow: {{policy: disconnect, after: 200ms}}}}
"""


class Served:
    """relay serve, killed and started again; its log goes to a file."""

    def __init__(self, place: Path, world: World, addresses: dict[str, str]) -> None:
        self._place = place
        self._world = world
        self._addresses = addresses
        self._log = place / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(20)

    def configure(self, after: int) -> None:
        """The route `live` has another `after`; the others stay as they are."""
        told = {**self._addresses, "after": after, "align": ALIGN, "rotate": ROTATE}
        (self._place / "new.yaml").write_text(CONFIG.format(**told))
        (self._place / "new.yaml").rename(self._place / "relay.yaml")

    def start(self) -> None:
        """Starts it and waits until it is ready."""
        ready = self.count("ready")
        with self._log.open("ab") as log:
            argv = [*RELAY, "serve", "--log-format", "json", "relay.yaml"]
            self.process = subprocess.Popen(
                argv, cwd=self._place, stderr=log, stdin=subprocess.DEVNULL, env=environment()
            )
        eventually(lambda: self.count("ready") > ready, "relay is ready")

    def kill(self) -> None:
        """SIGKILL; what it had open is closed by the kernel."""
        assert self.process is not None
        self._world.epoch += 1
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[dict[str, Any]]:
        """What was logged, by all of them."""
        found = []
        for line in self._log.read_bytes().splitlines() if self._log.exists() else []:
            with contextlib.suppress(ValueError):  # the last one of a killed relay
                found.append(json.loads(line))
        return found

    def count(self, event: str) -> int:
        """How often something was logged."""
        return sum(line.get("event") == event for line in self.lines())

    def has(self) -> dict[str, int]:
        """What it has: descriptors, threads, bytes in memory."""
        assert self.process is not None
        proc = Path(f"/proc/{self.process.pid}")
        return {
            "descriptors": len(list((proc / "fd").iterdir())),
            "threads": len(list((proc / "task").iterdir())),
            "bytes": int((proc / "statm").read_text().split()[1]) * 4096,
        }


def live_through(served: Served, world: World, takers: list[Taking], chance: random.Random) -> None:
    """Reloads, kills and restarts until the time is over."""
    until = time.monotonic() + SECONDS
    after = 20
    while time.monotonic() < until and not world.trouble:
        world.calm.wait(0.2 + chance.random())
        what = chance.choice(["reload", "reload", "reopen", "kill"])
        assert served.process is not None
        assert served.process.poll() is None, "relay has ended"
        if what == "kill":
            served.kill()
            world.calm.wait(chance.random() / 4)
            served.start()
        else:
            if what == "reload":
                after = 70 - after
                served.configure(after)
            served.process.send_signal(signal.SIGHUP)


@pytest.mark.timeout(SECONDS + 200)
def test_all_is_as_promised_after_a_life_of_trouble(tmp_path: Path) -> None:
    """Nothing that was promised is missing, nothing came that was not sent, and relay is as small as it was."""
    world, chance = World(tmp_path), random.Random(SEED)
    names = ("block", "memory", "disk", "drop", "disconnect")
    takers = {
        name: Taking(world, name, SEED + place, breaks=name != "block") for place, name in enumerate(names)
    }
    ports = [f"tcp://127.0.0.1:{port}" for port in free_ports(3, SEED)]
    addresses = dict(zip(("spill_source", "live_source", "viewers"), ports, strict=True))
    sources = {
        "archive": f"unix://{tmp_path}/archive.sock",
        "spill": addresses["spill_source"],
        "live": addresses["live_source"],
    }
    addresses |= {name: taker.receiver.address for name, taker in takers.items()}
    served = Served(tmp_path, world, addresses)
    threads = []
    try:
        served.start()
        eventually(lambda: {"drop", "disconnect"} <= {piece.who for piece in world.pieces}, "it is connected")
        fresh = served.has()
        threads += [
            world.thread(lambda r=route, s=100 * k + n: feed(world, r, sources[r], SEED + s), f"{route}-{n}")  # type: ignore[misc] # bound here
            for k, route in enumerate(sources)
            for n in range(2)
        ]
        threads += [
            world.thread(lambda n=n: subscribe(world, "viewer", ports[2], SEED + n), f"viewer-{n}")  # type: ignore[misc] # bound here
            for n in range(1000, 1002)
        ]
        live_through(served, world, list(takers.values()), chance)
        world.stop.set()
        world.calm.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} does not end"
        assert not world.trouble, world.trouble
        eventually(lambda: not list((tmp_path / "spill").glob("*.*")), "the logs are delivered", patience=40)
        assert served.process is not None
        gives_back(served, fresh)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    finally:
        world.stop.set()
        world.calm.set()
        if served.process is not None and served.process.poll() is None:
            served.process.kill()
            served.process.wait()
        for taker in takers.values():
            taker.close()
    assert not any("bug in relay" in line["message"] for line in served.lines())
    archive(world, tmp_path)
    spilled(world)
    lived(world, tmp_path)
    if SECONDS > 60:
        told = {what: sum(g.route == what for g in world.given) for what in sources}
        print(f"streams {told}, {world.epoch} kills, {len(world.pieces)} connections of receivers")


def gives_back(served: Served, fresh: dict[str, int]) -> None:
    """Once nothing is under way relay has what it had before its first stream, but for the thread and the engine that
    read the spill's directory, and memory of what was alive at once."""

    def quiet() -> bool:
        now = served.has()
        return now["descriptors"] <= fresh["descriptors"] + 6 and now["threads"] <= fresh["threads"] + 1

    eventually(quiet, f"relay gives back what it took, {served.has()} now, {fresh} before", patience=30)
    more = served.has()["bytes"] - fresh["bytes"]
    assert more < MOST_MORE, f"{more / MIB:.1f} MiB more than at the start"
    if SECONDS > 60:
        print(f"{fresh} before, {served.has()} at the end")


def of(world: World, who: str) -> list[tuple[Piece, list[Run]]]:
    """What a receiver's connections brought, as runs."""
    return [(piece, runs(bytes(piece.got))) for piece in world.pieces if piece.who == who]


def whole(world: World, route: str) -> dict[int, Given]:
    """The streams that relay had said were delivered."""
    found = {given.number: given for given in world.given if given.route == route and given.whole}
    assert found or SECONDS < 5, f"{route}: not one stream was whole"
    return found


def archive(world: World, place: Path) -> None:
    """The receiver that blocks and both files have every stream that was said to be whole; others are beginnings."""
    sizes = {given.number: given.size for given in world.given}
    wanted = whole(world, "archive")
    got: dict[int, Piece] = {}
    for piece, found in of(world, "block"):
        assert len(found) <= 1, found
        for run in found:
            assert (run.begin, run.end) <= (0, sizes[run.stream])
            got[run.stream] = piece
    for number, given in wanted.items():
        assert number in got, f"stream {number} never came"
        assert len(got[number].got) == given.size
        assert got[number].ended
    for name in ("whole", "rotated"):
        files: dict[int, list[tuple[Run, Path]]] = {}
        for path in (place / "archive").glob(f"{name}-*"):
            found = runs(path.read_bytes())
            assert len(found) <= 1, (path, found)
            for run in found:
                files.setdefault(run.stream, []).append((run, path))
        for number, given in wanted.items():
            parts = sorted(files[number], key=lambda part: part[0].begin)
            assert [run.begin for run, _ in parts] == list(
                range(0, given.size, ROTATE if name == "rotated" else given.size)
            )
            assert parts[-1][0].end == given.size
            assert all(a.end == b.begin for (a, _), (b, _) in itertools.pairwise(parts))
            assert not any(path.suffix == ".part" for _, path in parts)


def spilled(world: World) -> None:
    """Through a log every stream is whole across reconnects, at most one send queue twice; so is, on disk, what there
    was of a stream whose relay was killed: nothing in it is skipped."""
    for name in ("disk", "memory"):
        reached: dict[int, int] = {}
        allowed: dict[int, int] = {}
        ended: dict[int, bool] = {}
        for piece, found in of(world, name):
            assert len({run.stream for run in found}) <= 1, found
            assert len(found) <= 1, found
            for run in found:
                so_far = reached.get(run.stream, 0)
                limit = max(so_far, allowed.get(run.stream, UNREAD))
                assert run.begin <= limit, f"{name}: {run} skips bytes after {so_far}"
                assert so_far - run.begin <= SEND_QUEUE
                reached[run.stream] = max(so_far, run.end)
                allowed[run.stream] = run.end + UNREAD
                ended[run.stream] = piece.ended or piece.left  # it may have left with all it was to get
        for number, given in whole(world, "spill").items():
            if reached.get(number, 0) == given.size:
                assert ended[number], f"{name}: stream {number} has no end"
            else:  # the rest came to the kernel of a receiver that did not read it
                assert allowed.get(number, UNREAD) >= given.size, (
                    f"{name}: {number} ends at {reached.get(number)}"
                )


def lived(world: World, place: Path) -> None:
    """Of the streams that took turns the file has all, and whoever was connected has them in order: with aligned gaps
    under drop, without any for a subscriber or under disconnect."""
    sizes = {given.number: given.size for given in world.given}
    in_file: dict[int, list[Run]] = {}
    for run in runs((place / "all.bin").read_bytes()):
        in_file.setdefault(run.stream, []).append(run)
    for number, given in whole(world, "live").items():
        (run,) = in_file[number]
        assert run.begin <= SURE
        assert run.end >= given.size
    for name in ("drop", "disconnect", "viewer"):
        for piece, found in of(world, name):
            for one, two in itertools.pairwise(found):
                if one.stream != two.stream:
                    continue
                assert name == "drop", f"{name}: a gap, {one} and {two}"
                assert aligned(one.end, two.begin), f"{one} and {two}: not aligned"
            assert all(run.end <= sizes[run.stream] + SURE for run in found)
            seen = [run.stream for run in found]
            assert len(set(seen)) == sum(a != b for a, b in itertools.pairwise(seen)) + bool(seen)
            del piece


def aligned(end: int, begin: int) -> bool:
    """Whether a gap is of whole pieces. Words look alike: its ends may have moved by some bytes that are the same."""
    return any((end - by) % ALIGN == 0 and (begin - by) % ALIGN == 0 for by in range(SURE))
