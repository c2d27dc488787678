"""header: bytes put in front of the stream."""

from __future__ import annotations

import base64 as _base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from relay.endpoints.template import check_text, fill_text
from relay.errors import SourceError
from relay.kernel.arena import Arena
from relay.settings import Problem
from relay.stages.base import StageSettings
from relay.stages.stage import Stage, Turn


def _check_base64(text: str) -> str:
    try:
        _base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"not base64: {str(error)[:1].lower()}{str(error)[1:]}") from error
    return text


class Settings(StageSettings):
    """Puts bytes in front of every stream; exactly one of `text`, `base64` and `file` says which."""

    kind = "header"

    text: Annotated[str, AfterValidator(check_text)] | None = Field(
        default=None, description="text, sent as UTF-8; {route} {time} {peer} {id} are filled in"
    )
    base64: Annotated[str, AfterValidator(_check_base64)] | None = Field(
        default=None, description="bytes in base64"
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="a file whose content is the header, read when a stream begins",
    )

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """The three ways to give a header exclude each other."""
        ways = [key for key in ("text", "base64", "file") if key in given]
        if not ways:
            yield Problem("header needs one of 'text', 'base64' and 'file'", at_key=True)
        for second in ways[1:]:
            yield Problem(
                f"header takes one of 'text', 'base64' and 'file'; '{ways[0]}' is given already",
                (second,),
                True,
            )

    def content(self) -> bytes | None:
        """The bytes given by `base64`; None if they come from `text` or `file`."""
        return None if self.base64 is None else _base64.b64decode(self.base64)

    @property
    def once(self) -> str:
        """Behind a log the header would come again with every new connection."""
        return "the header would come again with every new connection"

    def make(self) -> Header:
        """The stage at work for one pipeline."""
        return Header(self)


class Header(Stage):
    """Owns the arena whose pages are lent in front of each stream; they are written once and then unmapped."""

    of_a_stream = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.kind, settings.name or settings.kind)
        self._settings = settings
        self._arena: Arena | None = None

    def begin(self, turn: Turn) -> None:
        """Lays the header out in memory for the pump to lend. Raises SourceError when its file cannot be read."""
        self.close()
        content = self._content(turn)
        if content:
            self._arena = Arena(content)
            self.node.prefix = self._arena.pointer()
            self.node.prefix_left = self._arena.size

    def _content(self, turn: Turn) -> bytes:
        settings = self._settings
        if settings.text is not None:
            return fill_text(settings.text, turn.values()).encode()
        if settings.file is not None:
            try:
                return Path(settings.file).read_bytes()
            except OSError as error:
                raise SourceError(
                    settings.file,
                    "reading the header from",
                    error.errno or 0,
                    "check the path in the stage 'header'",
                ) from error
        return settings.content() or b""

    def close(self) -> None:
        """Unmaps the header; pages that were lent live on with their readers."""
        if self._arena is not None:
            self.node.prefix_left = 0
            self._arena.close()
            self._arena = None
