"""Configurations as text and files: variables, aliases, duplicate keys, encodings, sizes."""

# ruff: noqa: E501 - each bad input, its place and its message stay on one line

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from route_texts import R, assert_refused, at, problems, route

from relay.config.load import LARGEST, load, loads
from relay.errors import ConfigErrors, RelayError

# Variables


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${N:-2}", 2),
        ("${TWO}", 2),
        ("${TWO:-3}", 2),
        ("${EMPTY:-3}", 3),
        ("${EMPTY:-}", None),
    ],
)
def test_a_value_that_is_one_variable_keeps_its_type(
    text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unquoted variable is a number where the environment holds one, and nothing where it is empty."""
    monkeypatch.setenv("TWO", "2")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("N", raising=False)
    assert loads(f"routes: {{a: {{source: '-', sink: 'null:'}}}}\nengines: {text}\n").engines == value


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('"${TWO}"', "2"),
        ("'${TWO}'", "2"),
        ("a${TWO}b${TWO}", "a2b2"),
        ("$${TWO}-${TWO}", "${TWO}-2"),
        ("$TWO-$$", "$TWO-$$"),
        ("${NONE:-a b}", "a b"),
        ("${NONE:-a:-b}", "a:-b"),
    ],
)
def test_variables_within_text(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, or one part of many, a variable is text; $${ stands for itself."""
    monkeypatch.setenv("TWO", "2")
    monkeypatch.delenv("NONE", raising=False)
    assert (
        route(
            f"source: {{file: {text}}}\nsink: 'null:'"
            if text[0] in "\"'"
            else f"source:\n  file: {text}\nsink: 'null:'"
        ).source.address.path
        == path
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${NONE}", "the environment variable NONE is not set; set it, or write ${NONE:-default}"),
        ("x${NONE", "'${' without '}'"),
        ("${}", "'${}' is not a variable"),
        ("${2X}", "'${2X}' is not a variable"),
        ("${NONE-x}", "write ${NAME} or ${NAME:-default}"),
        ("${A:-${B}}", "with braces inside"),
    ],
)
def test_variables_that_cannot_be_filled_in(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset or misspelt variable is refused at its value, alone: nothing is guessed from its absence."""
    monkeypatch.delenv("NONE", raising=False)
    ((place, message),) = at(f"source: '-'\nsink: {text}")
    assert place == "2:7"
    assert said in message


# Bad input: text


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("", "1:1", "the configuration is empty"),
        ("# nothing\n---\n", "1:1", "the configuration is empty"),
        ("- a\n", "1:1", "expected a mapping that begins with 'routes:', got a list"),
        ("hello", "1:1", "got 'hello'"),
        ("17", "1:1", "got the number 17"),
        ("routes:\n\ta: 1\n", "2:1", "indent with spaces, not tabs"),
        ("routes: {a: b: c}\n", "1:14", "not valid YAML"),
        ("routes: [\n", "2:1", "not valid YAML"),
        ("routes: 'a\n", "2:1", "not valid YAML"),
        ("a: {b: ${X}}\n", "1:9", "inside { } and [ ] a value with ${...} needs quotes"),
        ("a: \x01\n", "1:4", "the character U+0001 is not allowed"),
        ("\u00e9: \x01\n", "1:4", "the character U+0001 is not allowed"),
        ("a: *b\n", "1:4", "undefined alias 'b'"),
        ("a: b\n---\nb: c\n", "2:1", "more than one YAML document"),
        ("a: &a [*a]\n", "1:4", "has no end"),
        ("[" * 100_000, "1:101", "nested deeper than 100 levels"),
        ("- " * 50_000 + "a", "1:201", "nested deeper than 100 levels"),
        ("<<: {a: 1}\n", "1:1", "merge keys (<<) are not supported"),
    ],
)  # fmt: skip
def test_text_that_is_no_configuration(text: str, place: str, said: str) -> None:
    """What cannot be read is refused in one line that says where and why, in words."""
    assert_refused(text, place, said)


def test_aliases_of_aliases_are_counted_before_they_are_laid_out() -> None:
    """Ten lines that stand for 10^9 values are refused at the first key that is too much."""
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for before, letter in zip("abcdefghi", "bcdefghij", strict=False):
        text += f"{letter}: &{letter} [{','.join([f'*{before}'] * 10)}]\n"
    (line,) = problems(text)
    assert line == "f:5:4: more than 100000 values once aliases are written out; use fewer aliases of aliases"


def test_an_alias_of_a_whole_value_is_fine() -> None:
    """Anchors and aliases work; only the growth is bounded."""
    made = loads("routes:\n  a: &a {source: '-', sink: 'null:'}\n  b: *a\n")
    assert made.routes["a"] == made.routes["b"]


def test_a_problem_in_an_alias_is_shown_where_it_is_written_once() -> None:
    """Two routes share a wrong value: both are named, both point at the one place to mend."""
    assert problems("routes:\n  a: &a {source: '-', sink: 3}\n  b: *a\n") == [
        f"f:2:29: routes.{name}.sink: expected an address or a mapping with one of listen, connect, file, fifo, fd or shared, got the number 3"
        for name in "ab"
    ]


def test_duplicate_keys_at_every_level() -> None:
    """The second of two equal keys is refused, with the line of the first; other problems are found as well."""
    text = "engines: 0\nroutes:\n  a:\n    source: '-'\n    sink: 'null:'\n    sink: x\n  a: {}\nengines: 2\n"
    assert problems(text) == [
        "f:1:10: engines: must be at least 1, got the number 0",
        "f:6:5: routes.a.sink: duplicate key 'sink'; it is given in line 5 already",
        "f:7:3: routes.a: duplicate key 'a'; it is given in line 3 already",
        "f:8:1: engines: duplicate key 'engines'; it is given in line 1 already",
    ]


def test_tags_are_refused() -> None:
    """A tag never makes an object, and one that contradicts its value is named."""
    text = (
        "routes: {a: {source: '-', sink: !!python/name:os.system x}}\nengines: !!int two\ndrain: !!float 3\n"
    )
    assert problems(text) == [
        "f:1:33: routes.a.sink: tags are not supported, here is '!!python/name:os.system'",
        "f:2:10: engines: 'two' is not what its tag '!!int' says",
    ]


# Bad input: meaning


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("routes:\n", "1:8", "expected a mapping, got nothing"),
        ("routes: {}\n", "1:9", "there are no routes"),
        ("routes: []\n", "1:9", "expected a mapping, got a list"),
        ("routes: {a: }\n", "1:13", "expected a mapping with source, stages,"),
        ("routes: {a: [1]}\n", "1:13", "got a list"),
        ("routes: {'': {source: '-', sink: '-'}}\n", "1:9", "'' is not a name for a route"),
    ],
)  # fmt: skip
def test_no_routes_to_speak_of(text: str, place: str, said: str) -> None:
    """A configuration needs a mapping of routes with at least one in it."""
    assert_refused(text, place, said)


# Bad input: files


def test_a_file_that_is_missing_or_a_directory(tmp_path: Path) -> None:
    """The path, the reason and what to do are in one line."""
    for path, said in (
        (tmp_path / "none.yaml", "No such file or directory (ENOENT)"),
        (tmp_path, "Is a directory (EISDIR)"),
    ):
        with pytest.raises(ConfigErrors) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: cannot read it: {said}; ")
    assert issubclass(ConfigErrors, RelayError)


def test_a_file_without_permission(tmp_path: Path) -> None:
    """A file that may not be read is named, with whose permission is needed."""
    path = tmp_path / "c.yaml"
    path.touch(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(
            ConfigErrors, match=r"Permission denied \(EACCES\); let the user that runs relay read it"
        ):
            load(path)
    finally:
        os.seteuid(user)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    """The first byte that is wrong is shown with its line and column, counted in characters."""
    path = tmp_path / "c.yaml"
    path.write_bytes("routes:\n  \u00e9".encode() + b"\xff: 1\n")
    with pytest.raises(ConfigErrors) as caught:
        load(path)
    assert str(caught.value) == f"{path}:2:4: not UTF-8: byte 0xff; save the file as UTF-8"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    """A file saved with a mark at its beginning reads like any other."""
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + R.encode())
    assert load(path) == loads(R)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    """100 MB are refused by their size, which is named together with the limit."""
    path = tmp_path / "c.yaml"
    path.touch()
    os.truncate(path, 100 << 20)
    with pytest.raises(ConfigErrors, match="the limit is 4 MiB, this is 100 MiB"):
        load(path)


def test_an_endless_device_is_read_up_to_the_limit() -> None:
    """What has no size is not read for ever."""
    with pytest.raises(ConfigErrors, match="the limit is 4 MiB"):
        load("/dev/zero")
    with pytest.raises(ConfigErrors, match="the limit is 4 MiB"):
        loads(" " * (LARGEST + 1))
