"""Every error relay raises, by whose fault it is.

EAGAIN, end of stream and a peer's close are states of a stream, not errors: they never appear here.
An error's text names the operation, the object, the errno in words, and what to do next.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterable, Sequence


def name_of(code: int) -> str:
    """EINVAL rather than 22."""
    return _errno.errorcode.get(code, str(code))


class RelayError(Exception):
    """Above all errors that relay raises on purpose.

    `hint` says what the operator can do next; it is part of the text when it is not empty.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(RelayError):
    """A configuration is wrong at `file`:`line`:`column` (both from 1; 0 where there is no place)."""

    def __init__(
        self, message: str, *, file: str = "", line: int = 0, column: int = 0, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.file = file
        self.line = line
        self.column = column

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        return f"{place}: {super().__str__()}" if place else super().__str__()


class ConfigErrors(RelayError):
    """A configuration is refused: `errors` holds every problem found, in the order of their places.

    Its text has one `file:line:column: message` a line.
    """

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = tuple(errors)


class UsageError(RelayError):
    """The command line asks for something that no command does: exit code 2."""


class EndpointError(RelayError):
    """A source or a sink failed: `operation` on `address` answered `errno` (0 when no call failed), for `reason`."""

    def __init__(
        self, address: str, operation: str, errno: int = 0, hint: str = "", *, reason: str = ""
    ) -> None:
        self.address = address
        self.operation = operation
        self.errno = errno
        code = f" ({_errno.errorcode.get(errno, errno)})" if errno else ""
        self.reason = (reason or (os.strerror(errno) if errno else "failed")) + code
        super().__init__(f"{operation} {address}: {self.reason}", hint=hint)


class SourceError(EndpointError):
    """The source failed: where bytes enter."""


class SinkError(EndpointError):
    """A sink failed: where bytes leave."""


class KernelError(RelayError):
    """The kernel refused what relay cannot do without, with `errno` (0: none); `hint` says what to raise or allow."""

    def __init__(self, message: str, *, hint: str = "", errno: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class ShareError(RelayError):
    """What a peer shared, or said about it, is refused: nothing of it was mapped or trusted."""


class TransferError(RelayError):
    """A transfer from code was not delivered whole; `outcome` (a relay.Outcome) says what was."""

    def __init__(self, message: str, *, outcome: object) -> None:
        super().__init__(message)
        self.outcome = outcome


class TransferCancelled(TransferError):
    """It was cancelled before it was done."""


class RelayBug(RelayError):
    """An invariant of relay's own is broken."""

    def __init__(self, message: str) -> None:
        super().__init__(f"bug in relay: {message}", hint="please report this with the log around it")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'listen'?` if `word` looks like a slip for one of `known`, otherwise nothing."""
    from difflib import get_close_matches  # only on the way to an error message

    lowered = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""
