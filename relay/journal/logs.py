"""Log lines: text on a terminal, JSON elsewhere, one line an event, always to stderr.

A JSON line has `time` (UTC, RFC 3339), `level`, `event` (session, listening, or log), `message`, and the fields
of the event beside them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from functools import lru_cache
from typing import Any, Literal

from relay.journal.lines import Lines, handler_for
from relay.journal.record import SessionRecord
from relay.journal.repeats import Repeats
from relay.journal.secrets import hidden

Format = Literal["auto", "text", "json"]

log = logging.getLogger("relay")
_sessions = logging.getLogger("relay.session")

_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_LEVELS = {logging.INFO: "info", logging.WARNING: "warning"}
_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}


@lru_cache(2)
def _rfc3339(milliseconds: int) -> str:
    """UTC. Of one millisecond there may be many lines.

    datetime with a time zone looks `utcoffset` up by a name that it makes anew, and CPython's cache of attributes keeps
    thousands of these strings for good, each on a page of its own.
    """
    seconds, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:03d}+00:00"


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its extra fields."""
        fields: dict[str, Any] = {
            "time": _rfc3339(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "event": "log",
            "message": record.getMessage(),
        }
        fields.update({key: value for key, value in record.__dict__.items() if key not in _PLAIN})
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return hidden(json.dumps(fields, default=str, ensure_ascii=False))


class TextLines(logging.Formatter):
    """Time, level if it is worth saying, message."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """The record for people."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
            if self._colour:
                text = f"{_COLOURS.get(record.levelname, '')}{text}\x1b[0m"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return hidden(f"{at} {text}")


def set_up(form: Format = "auto", level: str = "info", *, records: bool = False) -> None:
    """Sends relay's log to stderr; what a `form` of auto means is decided by whether that is a terminal.

    `records`: session records pass whatever the level. Whoever logs never waits for whoever reads (journal.lines).
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    handler = handler_for(sys.stderr)
    if form == "json" or (form == "auto" and not terminal):
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(TextLines(colour=terminal and not os.environ.get("NO_COLOR")))
    handler.filters[:] = [Repeats()]
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    logging.getLogger("relay.session").setLevel(logging.INFO if records else logging.NOTSET)
    log.propagate = False


def session(record: SessionRecord) -> None:
    """The line of a finished session."""
    level = logging.INFO if record.result == "delivered" else logging.WARNING
    if not _sessions.isEnabledFor(level):
        return
    if not (record.plain and _put(record, level)):
        _sessions.log(level, "%s", record.as_text(), extra={"event": "session", **record.as_dict()})


def _put(record: SessionRecord, level: int) -> bool:
    """There may be thousands of duplex sessions a second: their JSON lines go straight to where all lines go.

    False where they do not: the logger takes them as any other.
    """
    handlers = log.handlers
    if len(handlers) != 1 or _sessions.handlers:
        return False
    handler = handlers[0]
    if not isinstance(handler, Lines) or not isinstance(handler.formatter, JsonLines):
        return False
    at = _rfc3339(int(time.time() * 1000))
    return handler.put(
        hidden(f'{{"time": "{at}", "level": "{_LEVELS[level]}", "event": "session", {record.as_json()}}}')
    )
