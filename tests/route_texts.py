"""The text of a route or a configuration, read, or refused line by line."""

# ruff: noqa: E501 - each bad input, its place and its message stay on one line

from __future__ import annotations

import pytest

from relay.config.load import loads
from relay.config.models import Route
from relay.errors import ConfigErrors

CONTRACT = """\
admin: {socket: "unix:///run/relay/admin.sock", http: "tcp://127.0.0.1:9464"}   # both optional
engines: 2                                        # default: one a CPU
routes:
  camera:
    source: {listen: "tcp://127.0.0.1:9000"}      # listen | connect | file | fifo; or a plain address
    stages:
      - throttle: {rate: 200MB/s}
      - tee: {to: {file: "archive/{route}-{time}-{id}.ts"}, on_slow: spill}
      - tee:
          stages: [{throttle: {rate: 1MB/s}}]     # a branch has stages of its own
          to: {connect: "tcp://127.0.0.1:9100"}
          on_slow: {policy: drop, after: 2s}
    sink: {listen: "tcp://127.0.0.1:9001", burst: 1MiB}   # connect | listen (broadcast) | file | fifo; or a plain address
  web:
    source: {listen: "tcp://127.0.0.1:8080", limits: {connections: 1000, per_peer: 50, idle: 60s}}
    duplex: true
    sink: {connect: "tcp://127.0.0.1:8000"}
"""

R = "routes: {a: {source: '-', sink: 'null:'}}\n"


def route(text: str) -> Route:
    """The only route of a configuration whose body is `text`, keys at the first column."""
    body = "".join(f"    {line}\n" for line in text.splitlines())
    return loads(f"routes:\n  a:\n{body}").routes["a"]


def problems(text: str, name: str = "f") -> list[str]:
    """The lines of the refusal of `text`, which must be refused."""
    with pytest.raises(ConfigErrors) as caught:
        loads(text, name)
    assert [str(error) for error in caught.value.errors] == str(caught.value).split("\n")
    return str(caught.value).split("\n")


def assert_refused(text: str, place: str, said: str) -> None:
    """`text` is refused for one thing, at `place` (line:col), in words with `said` among them."""
    (line,) = problems(text)
    assert line.startswith(f"f:{place}: ")
    assert said in line


def at(text: str) -> list[tuple[str, str]]:
    """The problems of a route whose body is `text`, as (line:col in the body, message without the route's path)."""
    body = "".join(f"    {line}\n" for line in text.splitlines())
    found = []
    for said in problems(f"routes:\n  a:\n{body}"):
        _, line, column, message = said.split(":", 3)
        found.append((f"{int(line) - 2}:{int(column) - 4}", message.strip()))
    return found
