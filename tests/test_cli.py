"""The command line: what each command answers, with which exit code, and how little `--help` loads."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from peers import eventually

from relay import __version__

GOOD = "routes: {r: {source: 'tcp://127.0.0.1:0', sink: 'null:'}}\n"
BAD = "routes: {r: {source: 'tcp://127.0.0.1:0', snk: 'null:'}}\n"


def relay(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """`relay` with these arguments and `given` on stdin."""
    return subprocess.run(
        [sys.executable, "-m", "relay", *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def good(tmp_path: Path) -> str:
    """The path of a configuration that is right."""
    (tmp_path / "good.yaml").write_text(GOOD)
    return str(tmp_path / "good.yaml")


@pytest.fixture
def bad(tmp_path: Path) -> str:
    """The path of a configuration with two errors in one line."""
    (tmp_path / "bad.yaml").write_text(BAD)
    return str(tmp_path / "bad.yaml")


def test_the_version() -> None:
    """`relay --version` says which it is."""
    done = relay("--version")
    assert (done.returncode, done.stdout) == (0, f"relay {__version__}\n")


def test_help_loads_nothing_heavy() -> None:
    """`relay --help` imports none of the libraries that take their time, nor the C core."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "relay", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    heavy = re.compile(r"(rich|pydantic|yaml|_?cffi|_cffi_backend|relay\.kernel|relay\.config)(\..*|_.*)?")
    assert sorted(name for name in loaded if heavy.fullmatch(name)) == []


@pytest.mark.parametrize("command", ["serve", "run", "check", "plan", "schema", "bench", "doctor"])
def test_every_command_has_help(command: str) -> None:
    """`--help` is on stdout and no error."""
    done = relay(command, "--help")
    assert done.returncode == 0
    assert f"relay {command}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["check", "plan"])
def test_exit_codes(command: str, good: str, bad: str) -> None:
    """0 for a right configuration, 3 for a wrong one or none, 2 for wrong usage; errors go to stderr."""
    assert relay(command, good).returncode == 0
    done = relay(command, bad)
    assert (done.returncode, done.stdout) == (3, "")
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [f"{bad}:1:10", f"{bad}:1:43"]
    assert relay(command, f"{bad}.no").returncode == 3
    assert relay(command, good, "--format", "pdf").returncode == 2
    assert relay(command, good, good).returncode == 2


@pytest.mark.parametrize("command", ["check", "plan"])
def test_the_default_and_stdin(command: str) -> None:
    """Without CONFIG it is the built-in default, as for serve; - reads stdin and says so in errors."""
    done = relay(command)
    assert done.returncode == 0
    assert "inbox" in done.stdout
    assert relay(command, "-", given=GOOD).returncode == 0
    done = relay(command, "-", given=BAD)
    assert done.returncode == 3
    assert done.stderr.startswith("<stdin>:1:10: ")


def test_check_says_ok(good: str) -> None:
    """The answer begins with `ok`, then what is needed and what is allowed."""
    first, *rest = relay("check", good).stdout.splitlines()
    assert first == "ok"
    assert rest[0].startswith("in all: ")


def test_warnings_are_no_errors(tmp_path: Path) -> None:
    """What the machine lacks is on stderr with the remedy; the configuration is still right."""
    text = f"routes: {{r: {{source: '{tmp_path}/no', sink: 'null:'}}}}"
    done = relay("check", "-", given=text)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "ok")
    assert done.stderr == (
        f"warning: r: {tmp_path}/no: the source cannot be read: No such file or directory; check the path\n"
    )
    data = json.loads(relay("check", "-", "--format", "json", given=text).stdout)
    assert list(data) == ["ok", "routes", "needs", "limits", "warnings"]
    assert [list(warning) for warning in data["warnings"]] == [["about", "what", "remedy"]]


@pytest.mark.parametrize("command", ["check", "plan", "serve"])
def test_all_refuse_what_is_not_available(command: str, tmp_path: Path) -> None:
    """check, plan and serve read configurations alike: what serve would not do, none of them accepts."""
    (tmp_path / "c.yaml").write_text("routes: {r: {source: '-', sink: {fd: 1}, duplex: true, snk: 1}}\n")
    found = relay(command, str(tmp_path / "c.yaml"))
    assert found.returncode == 3
    assert found.stdout == ""
    assert found.stderr == relay("check", str(tmp_path / "c.yaml")).stderr


def test_the_forms_of_a_plan(good: str) -> None:
    """text is a tree, json is JSON, mermaid is a flowchart."""
    assert "└─ null:" in relay("plan", good).stdout
    assert json.loads(relay("plan", good, "--format", "json").stdout)["routes"][0]["name"] == "r"
    assert relay("plan", good, "--format", "mermaid").stdout.startswith("flowchart LR\n")


def test_the_schema_is_json_and_a_schema() -> None:
    """`relay schema` prints a JSON Schema that is valid itself and accepts the shape of a configuration."""
    done = relay("schema")
    assert done.returncode == 0
    made = json.loads(done.stdout)
    Draft202012Validator.check_schema(made)
    assert Draft202012Validator(made).is_valid({"routes": {"r": {"source": "-", "sink": "null:"}}})
    assert relay("schema", "x").returncode == 2


def test_the_plan_counts_a_whole_server(tmp_path: Path) -> None:
    """A serving relay with one stream under way has exactly as many descriptors open as the plan says."""
    text = (
        "routes: {r: {source: 'tcp://127.0.0.1:0', sink: {listen: 'tcp://127.0.0.1:0'}, "
        f"stages: [checksum, tee: {{to: '{tmp_path}/{{id}}'}}]}}}}"
    )
    (tmp_path / "c.yaml").write_text(text)
    total = json.loads(relay("plan", str(tmp_path / "c.yaml"), "--format", "json").stdout)["needs"]
    assert total["exact"]
    server = subprocess.Popen(
        [sys.executable, "-m", "relay", "serve", "--log-format", "json", str(tmp_path / "c.yaml")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        events = (json.loads(line) for line in server.stderr)
        address = next(event["address"] for event in events if event.get("role") == "source")
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port))) as client:
            client.send(b"relay")
            opened = Path(f"/proc/{server.pid}/fd")
            eventually(lambda: len(list(opened.iterdir())) == total["descriptors"], "as many as planned")
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0


def test_a_plan_opens_nothing(tmp_path: Path) -> None:
    """A plan of a fifo, files and listeners leaves no trace of any of them."""
    text = (
        f"routes: {{r: {{source: 'unix://{tmp_path}/s', stages: [tee: {{to: '{tmp_path}/d/f'}}], "
        f"sink: 'fifo://{tmp_path}/p'}}}}"
    )
    for command in ("plan", "check"):
        assert relay(command, "-", given=text).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="root is missing: a PID namespace of its own")
def test_process_1_is_ended_while_it_starts() -> None:
    """As process 1, for whom the kernel drops signals without a handler, relay obeys SIGTERM before it is ready."""
    code = "import relay.cli, os; os.kill(1, 15); print('still there')"
    argv = ["unshare", "--pid", "--fork", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, ""), done.stderr
