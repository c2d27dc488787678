"""The other end of the line: real programs, payloads, and ways to wait for them without sleeping."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from relay.endpoints.address import Address

PATIENCE = 20.0  # seconds after which a wait is a failure; nothing here takes a tenth of it

# Where Debian keeps the programs; those not named are in a package of their own name.
PACKAGES = {
    "nc": "netcat-openbsd",
    "dd": "coreutils",
    "tee": "coreutils",
    "sha256sum": "coreutils",
    "b3sum": "b3sum",
    "prlimit": "util-linux",
    "ip": "iproute2",
    "promtool": "prometheus",
    "ss": "iproute2",
}


def program(name: str) -> str:
    """The path of a program; skips the test, naming the Debian package, where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: apt-get install {PACKAGES.get(name, name)}")
    return path


# --- payloads ---------------------------------------------------------------------------------------------


def payload_chunks(seed: int, size: int, chunk: int = 1 << 20) -> Iterator[bytes]:
    """`size` bytes of `seed` in pieces of `chunk`, a multiple of 4; the bytes do not depend on it.

    No two places look alike, so a block that is lost, doubled or misplaced changes the stream's hash.
    """
    generator = random.Random(seed)
    while size > 0:
        yield generator.randbytes(min(chunk, size))
        size -= chunk


def payload(seed: int, size: int) -> bytes:
    """`size` bytes that depend on `seed` alone, about 0.5 GB/s."""
    return b"".join(payload_chunks(seed, size))


def payload_file(path: Path, seed: int, size: int) -> str:
    """Writes the payload to `path` without holding it in memory; returns its sha256 in hex."""
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for chunk in payload_chunks(seed, size):
            stream.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def payload_digest(seed: int, size: int) -> str:
    """The sha256 in hex of that payload."""
    digest = hashlib.sha256()
    for chunk in payload_chunks(seed, size):
        digest.update(chunk)
    return digest.hexdigest()


def assert_same(got: bytes, expected: bytes) -> None:
    """Fails with the length and the first place that differs, not with megabytes of diff."""
    if got == expected:
        return
    common = min(len(got), len(expected))
    place = next((i for i in range(0, common, 4096) if got[i : i + 4096] != expected[i : i + 4096]), common)
    while place < common and got[place] == expected[place]:
        place += 1
    lengths = f"got {len(got)} bytes, expected {len(expected)}"
    pytest.fail(f"{lengths}, the first difference is at {place}", pytrace=False)


# --- waiting ----------------------------------------------------------------------------------------------


def wait_for(fd: int | socket.socket, events: int = select.POLLIN, patience: float = PATIENCE) -> int:
    """Waits until poll() reports one of `events`, an error or a hang-up on `fd`; returns what it reported."""
    waiter = select.poll()
    waiter.register(fd, events)
    found = waiter.poll(patience * 1000)
    assert found, f"nothing happened on {fd} within {patience} s"
    return found[0][1]


def eventually(
    predicate: Callable[[], Any], what: str, *watched: int | socket.socket, patience: float = PATIENCE
) -> Any:
    """Asks `predicate` until its answer is true and returns it; fails naming `what` after `patience`.

    Between two questions it waits for input on `watched`, for 0.2 ms at first and then twice as long up to
    50 ms, so a state that no event announces is found soon without a busy loop.
    """
    waiter = select.poll()
    for fd in watched:
        waiter.register(fd, select.POLLIN)
    deadline = time.monotonic() + patience
    pause = 0.2
    while True:
        answer = predicate()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {patience} s: {what}"
        waiter.poll(pause)
        pause = min(pause * 2, 50)


def read_all(fd: int, patience: float = PATIENCE) -> bytes:
    """Reads a pipe or file until its end, blocking or not."""
    pieces: list[bytes] = []
    while True:
        if not os.path.isfile(f"/proc/self/fd/{fd}"):  # noqa: PTH113 - a descriptor, no path to keep
            wait_for(fd, patience=patience)
        with contextlib.suppress(BlockingIOError):
            piece = os.read(fd, 1 << 20)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)


def receive_all(sock: socket.socket, patience: float = PATIENCE) -> bytes:
    """Receives until the peer's end of stream; `patience` is the longest silence. ECONNRESET is raised."""
    return b"".join(received(sock, patience))


def receive_digest(sock: socket.socket, patience: float = PATIENCE) -> tuple[int, str]:
    """As receive_all, for streams too large to hold: the number of bytes and their sha256 in hex."""
    digest, count = hashlib.sha256(), 0
    for piece in received(sock, patience):
        digest.update(piece)
        count += len(piece)
    return count, digest.hexdigest()


def receive_exactly(sock: socket.socket, count: int, patience: float = PATIENCE) -> bytes:
    """Receives `count` bytes; fails if the stream ends before."""
    got = bytearray()
    while len(got) < count:
        wait_for(sock, patience=patience)
        with contextlib.suppress(BlockingIOError):
            piece = sock.recv(count - len(got))
            assert piece, f"the stream ended after {len(got)} of {count} bytes"
            got += piece
    return bytes(got)


def send_all(sock: socket.socket, data: bytes, patience: float = PATIENCE) -> None:
    """Sends everything over a socket, blocking or not; `patience` is the longest time it may take nothing."""
    view = memoryview(data)
    while view:
        wait_for(sock, select.POLLOUT, patience)
        with contextlib.suppress(BlockingIOError):
            view = view[sock.send(view, socket.MSG_DONTWAIT) :]


def received(sock: socket.socket, patience: float = PATIENCE) -> Iterator[bytes]:
    """Piece by piece what arrives until the peer's end of stream. ECONNRESET is raised."""
    while True:
        wait_for(sock, patience=patience)
        with contextlib.suppress(BlockingIOError):
            piece = sock.recv(1 << 20)
            if not piece:
                return
            yield piece


# --- sockets without port numbers -------------------------------------------------------------------------


@contextlib.contextmanager
def tcp_listener(host: str = "127.0.0.1", backlog: int = 64) -> Iterator[tuple[socket.socket, str]]:
    """A listener on a port of the kernel's choice, and its address as relay writes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(backlog)
        port = listener.getsockname()[1]
        yield listener, f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"


@contextlib.contextmanager
def unix_listener(path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A unix listener at `path`, and its address as relay writes it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        yield listener, f"unix://{path}"


def accept(listener: socket.socket, patience: float = PATIENCE) -> socket.socket:
    """Accepts one connection; the caller closes it."""
    wait_for(listener, patience=patience)
    return listener.accept()[0]


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """The address of a tcp listener whose backlog is full: connects to it hang."""
    with tcp_listener(backlog=0) as (listener, address), contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            if not select.select([], [sock], [], 0.1)[1]:
                break
        else:
            pytest.fail("the backlog is never full")
        yield address


def connected(address: str, receive_buffer: int = 0) -> socket.socket:
    """A blocking socket connected to an address as relay writes it."""
    where = Address.parse(address)
    if where.scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        path = where.path
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        return sock
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    sock = socket.socket(family)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect((where.host, where.port))
    return sock


def reset(sock: socket.socket) -> None:
    """Closes a socket so that its peer sees a reset: an RST on tcp, unread bytes thrown away on unix."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def there_and_back(client: socket.socket, listener: socket.socket) -> None:
    """Words from `client` through a two-way relay to whoever `listener` accepts, and others back, each to their end."""
    client.sendall(b"there")
    client.shutdown(socket.SHUT_WR)
    with accept(listener) as server:
        assert receive_all(server) == b"there"
        server.sendall(b"and back")
    assert receive_all(client) == b"and back"


_refusing: list[socket.socket] = []


def refused_address() -> str:
    """A tcp address that nobody listens on; nobody is given its port by chance before the test is over.

    The port is bound here; a listener with SO_REUSEADDR can still have it.
    """
    sock = socket.socket()
    _refusing.append(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return f"tcp://127.0.0.1:{sock.getsockname()[1]}"


def refused(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def give_ports_back() -> None:
    """Lets go of all that refused_address() holds; at the end of each test."""
    while _refusing:
        _refusing.pop().close()


# --- programs ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(argv: Sequence[str | Path], **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a program, looked up with `program`; at the end of the block it is killed and reaped.

    Takes Popen's arguments. A test that cares how the program ends waits for it inside the block.
    """
    path = program(str(argv[0]))
    with subprocess.Popen([path, *map(str, argv[1:])], **popen) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)  # a stopped program takes no other signal but SIGKILL
                process.kill()


def read_until(stream: IO[bytes], pattern: str, patience: float = PATIENCE) -> re.Match[str]:
    """Reads a program's output line by line until one matches `pattern`; returns the match.

    Reads the descriptor and not the buffer: call it on a raw pipe (`bufsize=0`) or before anybody else reads.
    """
    seen = ""
    while True:
        wait_for(stream.fileno(), patience=patience)
        piece = os.read(stream.fileno(), 1)
        assert piece, f"the output ended before {pattern!r}; it was:\n{seen}"
        seen += piece.decode(errors="replace")
        if piece == b"\n" and (match := re.search(pattern, seen.splitlines()[-1])):
            return match


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program at work and the tcp port it listens on."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def address(self) -> str:
        """As relay writes it."""
        return f"tcp://127.0.0.1:{self.port}"

    def wait(self, patience: float = PATIENCE) -> int:
        """Its exit status."""
        return self.process.wait(patience)


@contextlib.contextmanager
def listening(argv: Sequence[str | Path], pattern: str, **popen: Any) -> Iterator[Peer]:
    """A program that says on stderr where it listens: `pattern`'s first group is the port."""
    with running(argv, stderr=subprocess.PIPE, bufsize=0, **popen) as process:
        assert process.stderr is not None
        yield Peer(process, int(read_until(process.stderr, pattern)[1]))


@contextlib.contextmanager
def socat_receiver(path: Path, *options: str) -> Iterator[Peer]:
    """socat takes one connection, writes what arrives to `path` and ends with the stream."""
    argv = ["socat", "-d", "-d", *options, "-u", "TCP-LISTEN:0,bind=127.0.0.1", f"CREATE:{path}"]
    with listening(argv, r"listening on AF=2 127\.0\.0\.1:(\d+)") as peer:
        yield peer


@contextlib.contextmanager
def nc_receiver(path: Path, *options: str) -> Iterator[Peer]:
    """nc takes one connection and writes what arrives to `path`; `-N` half-closes at once, stdin is empty."""
    with path.open("wb") as output:
        argv = ["nc", "-v", "-n", *options, "-l", "127.0.0.1", "0"]
        said = r"Listening on 127\.0\.0\.1 (\d+)"
        with listening(argv, said, stdin=subprocess.DEVNULL, stdout=output) as peer:
            yield peer


def run(
    argv: Sequence[str | Path], *, patience: float = PATIENCE, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Runs a program to its end with stdout and stderr captured; takes subprocess.run's arguments."""
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run([program(str(argv[0])), *map(str, argv[1:])], timeout=patience, **options)
