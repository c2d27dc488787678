"""Fuzzes the reader of PROXY headers, guided by coverage; nothing but Malformed may come out of it.

    pip install atheris
    python tests/fuzz/proxy_header.py -max_total_time=60

Every argument is libFuzzer's; a directory among them keeps what was found interesting. Stops at the first input that
breaks a promise, and writes it to a file that may be given as an argument to see it again.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["relay.endpoints.proxy_header"]):
    from relay.endpoints.proxy_header import LONGEST, SIGNATURE, Malformed, Origin, end_of, make, parse, scan

SEEDS = (
    b"",
    b"PROXY TCP4 ",
    b"PROXY TCP6 ",
    b"PROXY UNKNOWN",
    SIGNATURE,
    SIGNATURE + b"\x21\x11\x00\x0c",
    SIGNATURE + b"\x21\x21\x00\x24",
    SIGNATURE + b"\x20\x00\x00\x00",
)


def read(data: bytes) -> tuple[str, int, Origin]:
    """How the first bytes of a connection are taken: `whole`, `more` or `malformed`, how many, and who is named."""
    try:
        length, whole = scan(data)
        return ("whole", length, parse(data[:length])) if whole else ("more", length, Origin())
    except Malformed:
        return "malformed", 0, Origin()


def promises(data: bytes) -> None:
    """What holds for any bytes whatever."""
    said, length, origin = read(data)
    assert 0 <= length <= min(len(data), LONGEST)
    if said == "more":
        assert length == len(data), "what may be a header was not taken whole"
    if said != "whole":
        return
    assert read(data[:length] + b"\xff") == (said, length, origin), "what comes behind it changed it"
    for cut in range(length):
        assert read(data[:cut]) == ("more", cut, Origin()), "a truncated header was taken for something else"
    assert bool(origin.peer) == bool(origin.local)
    if origin.peer:
        assert end_of(origin.peer) is not None
        for version in ("v1", "v2"):
            assert parse(make(version, *origin)) == origin, "it names others when it is passed on"


def once(data: bytes) -> None:
    """One input: as it is, or behind the beginning of a header that its first byte picks."""
    promises(data)
    if data:
        promises(SEEDS[data[0] % len(SEEDS)] + data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()
