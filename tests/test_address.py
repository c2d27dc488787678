"""Addresses: text to address and back, and what is said about text that is none."""

from __future__ import annotations

import dataclasses

import pytest

from relay.endpoints.address import Address, AddressError
from relay.errors import RelayError

GOOD = [
    ("tcp://127.0.0.1:9000", Address("tcp", host="127.0.0.1", port=9000)),
    ("tcp://example.org:1", Address("tcp", host="example.org", port=1)),
    ("tcp://my_host:65535", Address("tcp", host="my_host", port=65535)),
    ("tcp://[::1]:9000", Address("tcp", host="::1", port=9000)),
    ("tcp://[fe80::1%eth0]:80", Address("tcp", host="fe80::1%eth0", port=80)),
    ("tcp://:9000", Address("tcp", host="", port=9000)),
    ("tcp://localhost:0", Address("tcp", host="localhost", port=0)),
    ("unix:///run/relay.sock", Address("unix", path="/run/relay.sock")),
    ("unix://relay.sock", Address("unix", path="relay.sock")),
    ("unix://@relay", Address("unix", path="@relay")),
    ("out.bin", Address("file", path="out.bin")),
    ("/var/out.bin", Address("file", path="/var/out.bin")),
    ("12:30", Address("file", path="12:30")),
    ("./tcp:x", Address("file", path="./tcp:x")),
    ("a b{time}.ts", Address("file", path="a b{time}.ts")),
    ("fifo:///tmp/f", Address("fifo", path="/tmp/f")),
    ("fd://3", Address("fd", number=3)),
    ("null:", Address("null")),
    ("-", Address("stdio")),
]


@pytest.mark.parametrize(("text", "address"), GOOD)
def test_text_becomes_an_address_and_the_same_text_again(text: str, address: Address) -> None:
    """An address in canonical form reads as its parts and writes itself as it was."""
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("file:///var/out.bin", "/var/out.bin"),
        ("file://out.bin", "out.bin"),
        ("tcp://host:007", "tcp://host:7"),
        ("file://-", "file://-"),
        ("file://null:", "file://null:"),
        ("file://tcp://x", "file://tcp://x"),
        ("file://host:80", "file://host:80"),
    ],
)
def test_another_spelling_becomes_the_canonical_one(text: str, canonical: str) -> None:
    """Every spelling of an address is written in one way, and that way reads as the same address."""
    address = Address.parse(text)
    assert str(address) == canonical
    assert Address.parse(canonical) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the address is empty"),
        ("a\0b", "NUL byte"),
        ("tpc://host:1", "unknown scheme 'tpc' in 'tpc://host:1'; did you mean 'tcp'?"),
        ("TCP://host:1", "did you mean 'tcp'?"),
        ("http://host:1", "unknown scheme 'http'"),
        ("unixx:///a", "did you mean 'unix'?"),
        ("tcp:host:1", "write tcp://host:port"),
        ("localhost:9000", "write tcp://localhost:9000, or ./localhost:9000 for the file"),
        ("[::1]:9000", "write tcp://[::1]:9000"),
        ("tcp://host", "has no port"),
        ("tcp://host:", "has no port"),
        ("tcp://", "has no port"),
        ("tcp://host:http", "port 'http' in 'tcp://host:http' is not a number"),
        ("tcp://host:-1", "is not a number"),
        ("tcp://host:\u0661", "is not a number"),
        ("tcp://host:65536", "port 65536 in 'tcp://host:65536' is out of range; ports go from 0 to 65535"),
        ("tcp://host:" + "9" * 5000, "is out of range"),
        ("tcp://host:80/", "is not a number"),
        ("tcp://ho st:80", "is not a host name"),
        ("tcp://user@host:80", "is not a host name"),
        ("tcp://*:80", "all interfaces are tcp://:80"),
        ("tcp://300.1.1.1:80", "is not an IPv4 address"),
        ("tcp://::1:9000", "an IPv6 address needs brackets"),
        ("tcp://fe80::1", "an IPv6 address needs brackets: tcp://[fe80::1]:PORT"),
        ("tcp://[::1:9000", "has '[' without ']'"),
        ("tcp://[::1]", "has no port"),
        ("tcp://[host]:80", "is not an IPv6 address"),
        ("unix://", "names no socket"),
        ("unix://@", "names no socket"),
        ("unix:///" + "a" * 107, "at most 107 bytes"),
        ("unix:/run/x", "write unix:///path or unix://@name"),
        ("file://", "names no file"),
        ("fifo://", "names no file"),
        ("fd://", "names no descriptor"),
        ("fd://-1", "names no descriptor"),
        ("fd://three", "such as fd://3"),
        ("null://", "write null:"),
        ("null:x", "write null:"),
        ("stdio://", "write -"),
    ],
)
def test_text_that_is_no_address_is_refused_with_the_way_to_write_it(text: str, said: str) -> None:
    """What is wrong is named, with a form that would be right."""
    with pytest.raises(AddressError) as caught:
        Address.parse(text)
    assert said in str(caught.value)


def test_the_longest_unix_path_is_accepted() -> None:
    """A path of 107 bytes still fits the kernel's structure."""
    assert Address.parse("unix:///" + "a" * 106).path == "/" + "a" * 106


def test_an_address_error_is_an_error_of_relay_and_a_value_error() -> None:
    """Callers that read text and callers that report errors both catch it by the class they know."""
    assert issubclass(AddressError, RelayError)
    assert issubclass(AddressError, ValueError)


def test_an_address_cannot_change() -> None:
    """Addresses are values: they can be keys, and nobody can change one that others hold."""
    address = Address.parse("-")
    assert {address: 1}[Address("stdio")] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        address.port = 1  # type: ignore[misc]
