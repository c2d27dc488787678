"""checksum: the digest of the stream at this point of the chain, in the session record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import Field

from relay.endpoints.settings import Algorithm
from relay.stages.base import StageSettings


class Settings(StageSettings):
    """Computes a checksum of everything that passes; changes nothing."""

    kind = "checksum"
    short_schema: ClassVar[dict[str, Any] | None] = {"enum": list(get_args(Algorithm))}

    algorithm: Algorithm = Field(default="sha256", description="sha256, blake3, xxh3 (64 bits) or crc32c")

    @classmethod
    def from_short(cls, value: object) -> Mapping[str, Any]:
        """`checksum: sha256`."""
        return {"algorithm": value} if isinstance(value, str) else super().from_short(value)
