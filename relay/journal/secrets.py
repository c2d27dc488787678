"""What must not be read anywhere: values of environment variables whose names say that they are secret.

A configuration may take anything from the environment, and what is wrong in it is shown to whoever runs relay. So the
values of variables that are named like secrets, and that a configuration used, are blotted out of whatever leaves:
lines of the log, errors, answers of the admin sockets. And what a configuration has relay say to others may hold a
password, by which a protocol begins: such a file is nobody else's to read.
"""

from __future__ import annotations

import json
import re
from html import escape

NAMED = re.compile(
    r"PASS(WORD|WD|PHRASE)?($|_)|SECRET|TOKEN|CREDENTIAL|PRIVATE|(API|ACCESS|AUTH|SIGNING)_?KEY|_KEY$"
)
CREDENTIALS = re.compile(
    r"""^(?:
        (?:AUTH|PASS)[ \t]+\S | AUTH\r?\n\$\d+\r?\n\S | HELLO[ ]+\d+[ ]+AUTH[ ]+\S+[ ]+\S    # redis, mail, ftp
        | \S+[ ]+LOGIN[ ]+\S+[ ]+\S                                                       # imap
        | (?:Proxy-)?Authorization:[ \t]*\S+[ \t]+\S | (?:Cookie|X-[\w-]*(?:Key|Token|Secret)):[ \t]*\S
        | (?:GET|HEAD|POST)[ ]\S*(?:[?&][\w-]*(?:token|key|secret|password)=[^\s&] | //[^\s/@]+:[^\s/@]+@)
    )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
LEAST = 4  # letters: a shorter value would blot out half of what is said
BLOT = "***"

_values: set[str] = set()


def note(name: str, value: str) -> None:
    """A configuration uses the variable of that name."""
    if NAMED.search(name.upper()) and len(value) >= LEAST:
        for form in (
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            escape(value),
        ):
            _values.add(form)
        _values.add(repr(value)[1:-1])


def has_credentials(said: str) -> bool:
    """Whether what is said to a server tells it a password or a key, in one of the protocols that checks speak."""
    return CREDENTIALS.search(said) is not None


def hidden(text: str) -> str:
    """The text without them."""
    if not _values:
        return text
    for value in sorted(_values, key=len, reverse=True):
        text = text.replace(value, BLOT)
    return text
