"""What one sink that stalls costs the others: `python -m benchmarks.stall`.

One stream at a steady rate goes to eight tcp connections. For some seconds all read; then one of them reads
nothing for as long; the figure is the rate of the other seven while it stalls, in percent of theirs before. Run
under `drop` and under `spill` (in memory); the exit code is 1 if a figure is below 95 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SINKS = 8
LEAST = 95.0  # percent
CHUNK = bytes(1 << 20)
PATIENCE = 20.0


class Receivers(threading.Thread):
    """Listens on a port for each sink, reads and counts what comes, but for the one that is `stalled`."""

    def __init__(self) -> None:
        super().__init__(name="receivers", daemon=True)
        self.listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(SINKS)]
        self.counts = [0] * SINKS
        self.stalled = -1
        self.over = False

    def run(self) -> None:
        """Takes one connection on each port, then reads; the bytes are let go in the kernel."""
        socks = [listener.accept()[0] for listener in self.listeners]
        scratch = bytearray(1 << 20)
        poll = select.poll()
        number = {sock.fileno(): at for at, sock in enumerate(socks)}
        for sock in socks:
            sock.setblocking(False)
            poll.register(sock, select.POLLIN)
        stalled = -1
        while not self.over:
            if stalled != self.stalled:
                if self.stalled >= 0:
                    poll.unregister(socks[self.stalled])
                else:
                    poll.register(socks[stalled], select.POLLIN)
                stalled = self.stalled
            for fd, _ in poll.poll(50):
                at = number[fd]
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    self.counts[at] += socks[at].recv_into(scratch, 0, socket.MSG_TRUNC)
        for sock in [*socks, *self.listeners]:
            sock.close()


def config(ports: list[int], policy: str, rate: str) -> str:
    """A route with a sink for each port, the policy at every one of them."""
    slow = "{policy: spill, max: 8GiB}" if policy == "spill" else policy
    ends = [f"{{connect: 'tcp://127.0.0.1:{port}', on_slow: {slow}}}" for port in ports]
    tees = "".join(f"      - tee: {{to: {end}}}\n" for end in ends[:-1])
    return (
        "routes:\n  stall:\n    source: {listen: 'tcp://127.0.0.1:0', connections: one}\n"
        f"    stages:\n      - throttle: {{rate: {rate}}}\n{tees}    sink: {ends[-1]}\n"
    )


def feed(address: str) -> None:
    """Sends without end, as fast as it is taken."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port))) as sock, contextlib.suppress(OSError):
        while True:
            sock.sendall(CHUNK)


def rates(receivers: Receivers, seconds: float) -> list[float]:
    """Bytes a second of each sink over so many seconds from now."""
    before, began = list(receivers.counts), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return [(after - first) / took for after, first in zip(receivers.counts, before, strict=True)]


def measure(policy: str, rate: str, seconds: float) -> float:
    """The rate of the other seven while one stalls, in percent; the least of the seven."""
    receivers = Receivers()
    receivers.start()
    ports = [listener.getsockname()[1] for listener in receivers.listeners]
    with tempfile.TemporaryDirectory(prefix="relay-bench-stall-") as directory:
        path = Path(directory) / "stall.yaml"
        path.write_text(config(ports, policy, rate))
        argv = [sys.executable, "-m", "relay", "serve", "--log-format", "json", str(path)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
            try:
                address = _source(process)
                threading.Thread(target=feed, args=(address,), daemon=True).start()
                deadline = time.monotonic() + PATIENCE
                while min(receivers.counts) < 1 << 20:
                    if time.monotonic() > deadline:
                        raise SystemExit("relay did not reach every sink")
                    time.sleep(0.01)
                before = rates(receivers, seconds)
                receivers.stalled = 0
                during = rates(receivers, seconds)
            finally:
                process.kill()
                receivers.over = True
                receivers.join()
    percent = [100 * during[at] / before[at] for at in range(1, SINKS)]
    print(
        f"{policy}: one of {SINKS} stalled for {seconds:g} s; the others had {sum(before[1:]) / 7e6:.1f} MB/s each "
        f"before and {sum(during[1:]) / 7e6:.1f} MB/s meanwhile; the least of them {min(percent):.1f} % "
        f"(the stalled one {during[0] / 1e6:.1f} MB/s)"
    )
    return min(percent)


def _source(process: subprocess.Popen[bytes]) -> str:
    """Where relay listens; its log goes on being read, so that it never waits for a reader."""
    assert process.stderr is not None
    for line in process.stderr:
        said = json.loads(line)
        if said.get("event") == "listening":
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return str(said["address"])
    raise SystemExit("relay serve ended before it listened")


def main() -> None:
    """Measures under both policies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stall", description=__doc__)
    parser.add_argument("--rate", default="50MB/s", help="of the stream (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the stall (default %(default)s)")
    chosen = parser.parse_args()
    figures = [measure(policy, chosen.rate, chosen.seconds) for policy in ("drop", "spill")]
    raise SystemExit(int(min(figures) < LEAST))


if __name__ == "__main__":
    main()
