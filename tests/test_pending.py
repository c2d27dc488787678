"""What the configuration knows and this version does not do: refused by name, never ignored."""

from __future__ import annotations

import pytest

from relay.config.load import load_to_run, loads
from relay.errors import ConfigErrors


def test_what_asks_for_nothing_is_accepted() -> None:
    """A key that switches something off asks for nothing that is missing."""
    sink = "{file: x, direct: false, fsync: close, on_slow: {policy: drop, buffer: 0}}"
    loads(f"routes: {{a: {{source: '-', sink: {sink}, duplex: false}}}}", to_run=True)


def test_refusals_stand_beside_other_problems_of_the_text() -> None:
    """A duplicate key and a key that is not available come in one report."""
    with pytest.raises(ConfigErrors) as caught:
        loads(
            "routes:\n  a:\n    source: 'tcp://:1'\n    sink: 'tcp://h:2'\n    duplex: true\n"
            "    wait_for_sinks: 1s\n    method: copy\n    method: copy\n",
            "f",
            to_run=True,
        )
    assert [(error.line, error.column) for error in caught.value.errors] == [(6, 5), (8, 5)]


DUPLEX = {
    "source": ("source: {connect: 'tcp://h:1'}", "'connect' is not available on duplex routes"),
    "connections": ("source: {listen: 'tcp://:1', connections: one}", "'connections: one' means nothing"),
    "sink": ("sink: {fd: 3}", "'fd' is not available on duplex routes"),
    "on_slow": ("sink: {connect: 'tcp://h:2', on_slow: drop}", "'on_slow' means nothing"),
    "wait_for_sinks": ("wait_for_sinks: 1s", "'wait_for_sinks' means nothing"),
}


@pytest.mark.parametrize("key", DUPLEX)
def test_what_duplex_routes_do_not_have_is_refused(key: str) -> None:
    """Keys of one-way routes that a duplex route does not act on are refused by those who would run it."""
    line, words = DUPLEX[key]
    given = {"source": "source: 'tcp://:1'", "sink": "sink: 'tcp://h:2'", "duplex": "duplex: true"}
    given[line.partition(":")[0]] = line
    text = "routes:\n  a:\n" + "".join(f"    {one}\n" for one in given.values())
    loads(text)
    with pytest.raises(ConfigErrors) as caught:
        loads(text, "f", to_run=True)
    (error,) = caught.value.errors
    assert words in str(error)
    row = text.splitlines()[error.line - 1]
    assert row[error.column - 1 :].startswith(("connect", "fd", "on_slow", "wait_for_sinks"))


def test_the_built_in_default_can_run() -> None:
    """Without a path the built-in default is what runs, and all of it is available."""
    assert list(load_to_run(None).routes) == ["inbox"]
