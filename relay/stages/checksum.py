"""checksum: the digest of the stream at this point of the chain, in the session record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import Field

from relay.endpoints.base import Sink
from relay.endpoints.digest import DigestSink
from relay.endpoints.settings import Algorithm
from relay.engine import Engine
from relay.stages.base import StageSettings
from relay.stages.stage import Stage


class Settings(StageSettings):
    """Computes a checksum of everything that passes; changes nothing."""

    kind = "checksum"
    short_schema: ClassVar[dict[str, Any] | None] = {"enum": list(get_args(Algorithm))}

    algorithm: Algorithm = Field(default="sha256", description="sha256, blake3, xxh3 (64 bits) or crc32c")

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """`checksum: sha256`."""
        return {"algorithm": value} if isinstance(value, str) else super().from_short(value)

    def holds(self) -> str:
        """While the thread that hashes is behind."""
        return "while hashing is slower than the stream"

    @property
    def once(self) -> str:
        """Behind a log it would cover only what went over the last connection."""
        return "it would cover only what went over the last connection"

    def make(self) -> Checksum:
        """The stage at work for one pipeline."""
        return Checksum(self.algorithm, self.name or self.kind)


class Checksum(Stage):
    """Tees the stream to a digest on a thread; `digest` is hexadecimal once a stream has passed."""

    def __init__(self, algorithm: Algorithm, name: str = "checksum") -> None:
        super().__init__("checksum", name)
        self.algorithm = algorithm
        self._digest: DigestSink | None = None

    def sink(self, engine: Engine) -> Sink:
        """A fresh digest for one stream."""
        self._digest = DigestSink(engine, self.algorithm)
        return self._digest

    @property
    def digest(self) -> str:
        """Of the last stream that passed whole."""
        return self._digest.hexdigest if self._digest is not None else ""

    def end(self) -> Mapping[str, Any]:
        """The algorithm and the digest."""
        return {"algorithm": self.algorithm, "digest": self.digest}
