"""A digest as the end of a branch: it reads what a teed pipe holds and forgets the bytes.

Hashing must see the bytes, so they are copied out of the pipe, on a ferry's thread: the chain moves on by
reference meanwhile. hashlib lets go of the GIL for buffers above 2 KiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from relay.endpoints.ferried import FerriedSink
from relay.endpoints.file import Identity, identity
from relay.engine import Engine

PIECE = 256 * 1024

ALGORITHMS = ("sha256", "blake3", "xxh3", "crc32c")


class Digest(Protocol):
    """What a running digest can do."""

    def update(self, data: Any, /) -> Any:
        """Takes more bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far, in hexadecimal."""


class _Crc32c:
    """CRC-32C (RFC 3720, appendix B.4) behind a digest's face."""

    def __init__(self) -> None:
        from crc32c import crc32c

        self._crc32c: Callable[..., int] = crc32c
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = self._crc32c(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def new_digest(algorithm: str) -> Digest:
    """A running digest; the library is loaded on first use."""
    if algorithm == "sha256":
        import hashlib

        return hashlib.sha256()
    if algorithm == "blake3":
        import blake3

        digest: Digest = blake3.blake3()
        return digest
    if algorithm == "xxh3":
        import xxhash

        return xxhash.xxh3_64()
    return _Crc32c()


def sidecar_line(algorithm: str, digest: str) -> str:
    """What `sha256sum -c`, `b3sum -c` and `xxhsum -c` read; {name} stands for the file's name.

    crc32c has no standard tool that verifies a list; it gets the same form.
    """
    if algorithm == "xxh3":
        return f"XXH3 ({{name}}) = {digest}\n"
    return f"{digest}  {{name}}\n"


def digest_of_file(
    path: str,
    algorithm: str,
    *,
    offset: int = 0,
    length: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[str, Identity]:
    """The digest of `length` bytes of a file (None: to its end) and which state of which file that was.

    Blocks; raises OSError. Once `stopped` says so it gives up and the digest is empty.
    """
    digest = new_digest(algorithm)
    memory = memoryview(bytearray(PIECE))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        state = identity(os.fstat(fd))
        while length is None or length > 0:
            if stopped():
                return "", state
            count = os.preadv(fd, [memory[: PIECE if length is None else min(PIECE, length)]], offset)
            if not count:
                break
            digest.update(memory[:count])
            offset += count
            length = None if length is None else length - count
        return digest.hexdigest(), state
    finally:
        os.close(fd)


class DigestSink(FerriedSink):
    """Hashes on a thread; `hexdigest` is there once it has finished, empty before."""

    def __init__(self, engine: Engine, algorithm: str) -> None:
        super().__init__(engine, algorithm)
        self.hexdigest = ""
        self._algorithm = algorithm
        self._moved = 0

    @property
    def moved(self) -> int:
        """Bytes hashed."""
        return self._moved

    def open(self) -> None:
        """Starts the thread."""
        self.embark(1 << 20, self._hash, self._hashed)
        self.opened()

    def _hash(self) -> str:
        assert self._ferry is not None
        digest = new_digest(self._algorithm)
        memory = memoryview(bytearray(PIECE))
        while True:
            pipe, load = self._ferry.wait()
            if not load:
                return digest.hexdigest()
            while load:
                count = os.readv(pipe.read_fd, [memory[: min(load, PIECE)]])
                digest.update(memory[:count])
                self._moved += count
                load -= count
            self._ferry.give_back()

    def _hashed(self, digest: Any, failed: BaseException | None) -> None:
        if failed is not None:
            self.fail(self.error("hashing", getattr(failed, "errno", 0) or 0, reason=str(failed)))
        elif self.state == "finishing":
            self.hexdigest = str(digest)
            self.finished()
