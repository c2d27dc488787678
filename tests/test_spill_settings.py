"""What the configuration refuses of logs and buffers, and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.config.load import load_to_run, loads
from relay.errors import ConfigErrors

HEAD = "routes: {a: {source: 'tcp://:1', "


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ("sink: {file: x, on_slow: {policy: spill, directory: d}}", "'x' is none; leave 'directory' out"),
        (
            "stages: [tee: {to: {file: x}, on_slow: {policy: spill, directory: d}}], sink: 'null:'",
            "leave 'directory'",
        ),
        (
            "sink: {listen: 'tcp://:2', on_slow: {policy: spill, directory: d}}",
            "its subscribers read from one ring in memory",
        ),
        ("sink: {connect: 'tcp://h:2', on_slow: {policy: spill, buffer: 1MiB}}", "'max' bounds it"),
        *(
            (
                f"stages: [tee: {{stages: [{stage}], to: 'tcp://h:2', on_slow: spill}}], sink: 'null:'",
                f"'{stage.partition(':')[0]}' cannot be in a branch that spills",
            )
            for stage in ("header: {text: x}", "limit: {stop: 1KB}", "checksum", "tee: {to: 'tcp://h:3'}")
        ),
        (
            "stages: [tee: {to: 'tcp://h:2', on_slow: {policy: spill, directory: d}}], "
            "sink: {connect: 'tcp://h:2', on_slow: {policy: spill, directory: d}}",
            "name another directory",
        ),
    ],
)
def test_what_a_log_cannot_do_is_refused(route: str, said: str) -> None:
    """A log that would give other bytes than promised is a configuration error that says what to do."""
    with pytest.raises(ConfigErrors) as caught:
        loads(HEAD + route + "}}", "f", to_run=True)
    (error,) = caught.value.errors
    assert said in str(error)
    assert error.line == 1
    assert error.column > len("routes: ")


def test_what_a_log_can_do_is_accepted(tmp_path: Path) -> None:
    """Logs and buffers in front of sinks of every kind that can have one."""
    (tmp_path / "c.yaml").write_text(
        HEAD
        + "stages: [tee: {stages: [meter, throttle: 1MB/s], to: 'unix:///s', on_slow: {policy: spill, directory: d}},"
        " tee: {to: {file: x}, on_slow: spill}, tee: {to: 'fifo:///f', on_slow: {policy: spill, directory: d}},"
        " tee: {to: {file: y, on_slow: {policy: drop, buffer: 1MiB, align: 188}}}],"
        " sink: {connect: 'tcp://h:2', on_slow: {policy: spill, directory: d, max: 1GiB, then: drop, align: 188}}}}"
    )
    assert load_to_run(str(tmp_path / "c.yaml")).routes
