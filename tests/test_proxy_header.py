"""PROXY headers, read and made: every truncation, every wrong byte, whatever a hostile peer may say."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from relays import environment

from relay.endpoints.proxy_header import (
    FIXED,
    LONGEST,
    LONGEST_LINE,
    SIGNATURE,
    Malformed,
    Origin,
    end_of,
    make,
    name,
    parse,
    scan,
)

RUNS = settings(derandomize=True, deadline=None, max_examples=300)


def binary(command: int, kind: int, body: bytes, length: int | None = None) -> bytes:
    """A version 2 header, byte for byte as its description has it."""
    return SIGNATURE + struct.pack("!BBH", command, kind, len(body) if length is None else length) + body


V4 = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 56324, 443)
V6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + struct.pack("!HH", 1, 65535)
TLV = b"\x04\x00\x05hello" + b"\x20\x00\x03\x00\x00\x00"

WHOLE = {
    "tcp4": (
        b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n",
        Origin("192.0.2.1:56324", "198.51.100.2:443"),
    ),
    "tcp6": (b"PROXY TCP6 2001:db8::1 ::2 0 65535\r\n", Origin("[2001:db8::1]:0", "[::2]:65535")),
    "tcp6 that is IPv4": (b"PROXY TCP6 ::ffff:1.2.3.4 ::2 5 6\r\n", Origin("1.2.3.4:5", "[::2]:6")),
    "unknown": (b"PROXY UNKNOWN\r\n", Origin()),
    "unknown with words": (b"PROXY UNKNOWN whatever it is \xff\r\n", Origin()),
    "longest unknown": (b"PROXY UNKNOWN ".ljust(LONGEST_LINE - 2, b"f") + b"\r\n", Origin()),
    "v2 tcp4": (binary(0x21, 0x11, V4), Origin("192.0.2.1:56324", "198.51.100.2:443")),
    "v2 tcp6": (binary(0x21, 0x21, V6), Origin("[2001:db8::1]:1", "[2001:db8::2]:65535")),
    "v2 with records": (binary(0x21, 0x11, V4 + TLV), Origin("192.0.2.1:56324", "198.51.100.2:443")),
    "v2 as long as can be": (
        binary(0x21, 0x11, V4 + bytes(LONGEST - FIXED - 12)),
        Origin("192.0.2.1:56324", "198.51.100.2:443"),
    ),
    "v2 local": (binary(0x20, 0x00, b""), Origin()),
    "v2 local with addresses": (binary(0x20, 0x11, V4), Origin()),
    "v2 local with anything": (binary(0x20, 0xFF, b"anything"), Origin()),
    "v2 unspecified": (binary(0x21, 0x00, b"passed over"), Origin()),
    "v2 udp": (binary(0x21, 0x12, V4), Origin()),
    "v2 unix": (binary(0x21, 0x31, bytes(216)), Origin()),
}

WRONG = {
    "nothing like it": b"GET / HTTP/1.1\r\n\r\n",
    "lower case": b"proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
    "another family": b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
    "unknown and more": b"PROXY UNKNOWNS\r\n",
    "no family": b"PROXY \r\n",
    "only LF": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
    "LF within": b"PROXY UNKNOWN a\nb\r\n",
    "two spaces": b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
    "a word more": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
    "a word less": b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
    "IPv6 as TCP4": b"PROXY TCP4 ::1 ::2 1 2\r\n",
    "IPv4 as TCP6": b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
    "zeros in front": b"PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
    "a short address": b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
    "a scope": b"PROXY TCP6 fe80::1%eth0 ::2 1 2\r\n",
    "a port too large": b"PROXY TCP4 1.2.3.4 5.6.7.8 65536 2\r\n",
    "a port with a sign": b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
    "a port with zeros": b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
    "no port": b"PROXY TCP4 1.2.3.4 5.6.7.8  2\r\n",
    "an Arabic port": "PROXY TCP4 1.2.3.4 5.6.7.8 ٣ 2\r\n".encode(),
    "too long a line": b"PROXY UNKNOWN ".ljust(LONGEST_LINE - 1, b"f") + b"\r\n",
    "version 1 in binary": binary(0x11, 0x11, V4),
    "version 3": binary(0x31, 0x11, V4),
    "command 2": binary(0x22, 0x11, V4),
    "family 4": binary(0x21, 0x41, V4),
    "transport 3": binary(0x21, 0x13, V4),
    "shorter than its addresses": binary(0x21, 0x11, V4[:-1]),
    "IPv6 in the room of IPv4": binary(0x21, 0x21, V4),
    "longer than is read": binary(0x21, 0x11, V4, length=LONGEST - FIXED + 1),
    "the longest there is": binary(0x21, 0x11, V4, length=65535),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_header(kind: str) -> None:
    """Both ends are named as in records, IPv4 in IPv6's clothes as IPv4; without tcp addresses nobody is named."""
    header, origin = WHOLE[kind]
    assert scan(header) == (len(header), True)
    assert parse(header) == origin


@pytest.mark.parametrize("kind", WHOLE)
def test_no_byte_behind_a_header_belongs_to_it(kind: str) -> None:
    """Whatever stands behind it, be it another header, the header ends where it ends."""
    header, _origin = WHOLE[kind]
    for behind in (b"\0", b"\n", b"GET / HTTP/1.1\r\n\r\n", header, SIGNATURE * 9):
        assert scan(header + behind) == (len(header), True)
        with pytest.raises(Malformed):
            parse(header + behind)


@pytest.mark.parametrize("kind", WHOLE)
def test_every_truncation_waits_for_the_rest(kind: str) -> None:
    """Cut anywhere, all that is there belongs to the header, more is to come, and nothing is read out of it."""
    header, _origin = WHOLE[kind]
    for length in range(len(header)):
        assert scan(header[:length]) == (length, False)
        with pytest.raises(Malformed):
            parse(header[:length])


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_header_is_refused(kind: str) -> None:
    """It is refused, and so it is when it comes byte by byte."""
    wrong = WRONG[kind]
    with pytest.raises(Malformed, match="PROXY"):
        parse(wrong[: scan(wrong)[0]])

    def bytewise() -> None:
        for length in range(1, len(wrong) + 1):
            taken, whole = scan(wrong[:length])
            assert taken <= length
            if whole:
                parse(wrong[:taken])

    with pytest.raises(Malformed):
        bytewise()


@RUNS
@given(some.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    """Random bytes are refused, or are the beginning of a header; nothing else happens."""
    for start in (b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", SIGNATURE, SIGNATURE + b"\x21"):
        try:
            length, whole = scan(start + data)
            assert 0 <= length <= min(len(start + data), LONGEST)
            if whole:
                assert isinstance(parse((start + data)[:length]), Origin)
            else:
                assert length == len(start + data)
        except Malformed:
            pass


@RUNS
@given(some.sampled_from(sorted(WHOLE)), some.data())
def test_a_header_with_a_few_bytes_changed(kind: str, data: some.DataObject) -> None:
    """A header with some bytes replaced names addresses that are some, or nobody, or is refused."""
    header = bytearray(WHOLE[kind][0])
    for _ in range(data.draw(some.integers(1, 3))):
        header[data.draw(some.integers(0, len(header) - 1))] = data.draw(some.integers(0, 255))
    try:
        length, whole = scan(bytes(header))
        origin = parse(bytes(header[:length])) if whole else Origin()
    except Malformed:
        return
    assert (origin.peer == "") == (origin.local == "")
    if origin.peer:
        ends = [end_of(origin.peer), end_of(origin.local)]
        assert all(end is not None and 0 <= end[1] <= 65535 for end in ends)


@RUNS
@given(
    some.sampled_from(["v1", "v2"]),
    some.one_of(some.ip_addresses(v=4), some.ip_addresses(v=6)),
    some.one_of(some.ip_addresses(v=4), some.ip_addresses(v=6)),
    some.integers(0, 65535),
    some.integers(0, 65535),
)
def test_what_is_made_is_read_again(
    version: str, one: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address, here: int, there: int
) -> None:
    """Any two addresses, also of two families, come out as they went in; IPv4 in IPv6's clothes as IPv4."""
    peer, local = name(one, here), name(other, there)
    made = make(version, peer, local)  # type: ignore[arg-type] # as drawn
    assert scan(made + b"PROXY ") == (len(made), True)
    assert parse(made) == (peer, local)
    assert len(made) <= (LONGEST_LINE if version == "v1" else FIXED + 36)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("peer", "local"), [("pid:17", ""), ("pid:17", "1.2.3.4:5"), ("1.2.3.4:5", "")])
def test_who_has_no_address_is_unknown(version: str, peer: str, local: str) -> None:
    """For the peer of a unix socket the header says that nobody is named."""
    assert parse(make(version, peer, local)) == Origin()  # type: ignore[arg-type] # as given


def test_a_scope_is_left_out() -> None:
    """A link-local peer is named without its interface, which means nothing elsewhere."""
    assert make("v1", "[fe80::1%eth0]:5", "[fe80::2%eth0]:6") == b"PROXY TCP6 fe80::1 fe80::2 5 6\r\n"


def test_the_fuzzer_finds_nothing_in_a_moment(tmp_path: Path) -> None:
    """What tests/fuzz/proxy_header.py says of any bytes holds for a few thousand inputs (see docs/testing.md)."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("the fuzzer needs atheris: pip install atheris")
    target = Path(__file__).parent / "fuzz" / "proxy_header.py"
    argv = [sys.executable, str(target), "-runs=5000", "-seed=1", "-verbosity=0"]
    ran = subprocess.run(
        argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
