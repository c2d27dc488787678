"""header: bytes put in front of the stream."""

from __future__ import annotations

import base64 as _base64
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from relay.endpoints.template import check_text
from relay.settings import Problem
from relay.stages.base import StageSettings


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
