"""`relay check`: what this machine lacks for a configuration, each with the command that mends it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from relay.config.load import load_to_run, loads
from relay.kernel.probe import CAP_NET_BIND_SERVICE, Machine
from relay.planning.plan import make_plan
from relay.planning.preflight import Finding, findings

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
ROOMY = Machine(cpus=2, files=100_000, files_hard=100_000, pipe_pages=10_000_000)
NOBODY = 65534


def found(body: str, here: Machine = ROOMY) -> list[Finding]:
    """The findings of a configuration with one route, whose body is in flow style."""
    config = loads(f"routes: {{r: {{{body}}}}}")
    return list(findings(config, make_plan(config, here)))


def only(body: str, here: Machine = ROOMY) -> str:
    """The text of the one finding."""
    (finding,) = found(body, here)
    return str(finding)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory that may be read and not written; a test run by root is nobody meanwhile."""
    place = Path(tempfile.mkdtemp())
    (place / "shut").mkdir()
    (place / "shut" / "secret").write_text("x")
    (place / "shut" / "secret").chmod(0)
    (place / "shut").chmod(0o555)
    place.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield place / "shut"
    if root:
        os.seteuid(0)
    (place / "shut").chmod(0o755)
    shutil.rmtree(place)


def test_a_machine_with_room_for_everything_finds_nothing(tmp_path: Path) -> None:
    """Right paths, free ports and high limits leave nothing to say."""
    source = tmp_path / "f"
    source.write_text("x")
    tee = f"tee: {{to: '{tmp_path}/new/{{id}}'}}"
    assert found(f"source: '{source}', stages: [{tee}], sink: 'tcp://h:1'") == []
    assert found(f"source: 'unix://{tmp_path}/s', sink: {{listen: 'tcp://:0'}}") == []


def test_too_few_descriptors() -> None:
    """The figure at the routes' limit is named with its ulimit, and beyond the hard limit the unit's key."""
    body = "source: {listen: 'tcp://:1024', limits: {connections: 1000}}, sink: 'tcp://h:1'"
    said = only(body, replace(ROOMY, files=1024))
    assert said == ("open files: the routes need 4012 descriptors, 1024 are allowed; ulimit -n 4012")
    assert "LimitNOFILE=4012" in only(body, replace(ROOMY, files=1024, files_hard=2048))
    assert found(body, replace(ROOMY, files=4012)) == []


def test_a_broadcast_needs_room_for_a_subscriber() -> None:
    """Room for the stream alone is not enough where somebody is to join."""
    body = "source: {listen: 'tcp://:1024', connections: one}, sink: {listen: 'tcp://:1025'}"
    config = loads(f"routes: {{r: {{{body}}}}}")
    total = make_plan(config, ROOMY).total.descriptors
    assert f"ulimit -n {total + 1}" in only(body, replace(ROOMY, files=total))
    assert found(body, replace(ROOMY, files=total + 1)) == []


def test_too_few_pipe_pages() -> None:
    """An unprivileged user's budget is named with the sysctl that raises it; a privileged one has none."""
    body = "source: {listen: 'tcp://:1024', limits: {connections: 100}}, sink: 'tcp://h:1'"
    config = loads(f"routes: {{r: {{{body}}}}}")
    pages = make_plan(config, ROOMY).total.pages
    said = only(body, replace(ROOMY, pipe_pages=pages - 1))
    assert said.startswith("pipe pages: ")
    assert said.endswith(f"; sysctl fs.pipe-user-pages-soft={pages}")
    assert found(body, replace(ROOMY, pipe_pages=0, privileged=True)) == []


def test_small_pipes() -> None:
    """A pipe-max-size below what relay asks for is named with its sysctl."""
    said = only("source: 'tcp://:1024', sink: 'tcp://h:1'", replace(ROOMY, pipe_max=1 << 16))
    assert said.endswith("; sysctl fs.pipe-max-size=1048576")


def test_low_ports_take_a_capability() -> None:
    """Below the first unprivileged port listening takes CAP_NET_BIND_SERVICE; port 0 and sinks do not."""
    body = "source: 'tcp://:80', sink: {listen: 'tcp://:1024'}"
    said = only(body)
    assert said.startswith("r: tcp://:80: ")
    assert said.endswith("sysctl net.ipv4.ip_unprivileged_port_start=80")
    assert found(body, replace(ROOMY, capabilities=1 << CAP_NET_BIND_SERVICE)) == []
    assert found(body, replace(ROOMY, first_port=80)) == []
    assert found("source: 'tcp://:0', sink: 'tcp://h:80'") == []


def test_missing_directories(tmp_path: Path) -> None:
    """One missing directory is made by the sink; of two the first has to be there."""
    source = "source: 'tcp://:1024'"
    assert found(f"{source}, sink: '{tmp_path}/a/{{id}}'") == []
    assert only(f"{source}, sink: '{tmp_path}/a/b/{{id}}'").endswith(f"; mkdir -p {tmp_path}/a/b")
    assert found(f"{source}, sink: '{tmp_path}/{{route}}/{{id}}'") == []
    assert only(f"{source}, sink: '{tmp_path}/{{route}}/b/{{id}}'").endswith(f"; mkdir -p {tmp_path}/r/b")
    assert found(f"{source}, sink: '{tmp_path}/{{peer}}/{{id}}/x'") == []  # known when the stream comes
    (tmp_path / "file").write_text("")
    assert "is not a directory" in only(f"{source}, sink: '{tmp_path}/file/x'")
    assert "it is a directory" in only(f"{source}, sink: '{tmp_path}'")


def test_paths_that_may_not_be_used(unprivileged: Path) -> None:
    """A directory that cannot be written and a file that cannot be read are found before the stream comes."""
    source = "source: 'tcp://:1024'"
    assert "nothing can be made" in only(f"{source}, sink: '{unprivileged}/x'")
    assert "nothing can be made" in only(f"{source}, sink: {{fifo: '{unprivileged}/x'}}")
    assert "nothing can be made" in only(f"source: 'unix://{unprivileged}/s', sink: 'null:'")
    assert "may not be read" in only(f"source: '{unprivileged}/secret', sink: 'null:'")
    assert "may not be written" in str(
        found(f"{source}, sink: {{file: '{unprivileged}/secret', append: true}}")[0]
    )


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    """A missing file, a directory in a file's place and a header's file are named with what to do."""
    assert "No such file" in only(f"source: '{tmp_path}/no', sink: 'null:'")
    assert "not a regular file" in only(f"source: '{tmp_path}', sink: 'null:'")
    branch = f"tee: {{to: 'null:', stages: [header: {{file: '{tmp_path}/no'}}]}}"
    assert "the stage header cannot be read" in only(f"source: '-', stages: [{branch}], sink: 'null:'")
    (tmp_path / "plain").write_text("")
    assert "is not a fifo" in only(f"source: 'fifo://{tmp_path}/plain', sink: 'null:'")


def test_unix_listeners(tmp_path: Path) -> None:
    """What stands at a socket's path, and who is to own it, are looked at; abstract names have neither."""
    (tmp_path / "s").write_text("")
    said = only(f"source: 'unix://{tmp_path}/s', sink: 'null:'")
    assert "exists and is not a socket" in said
    listen = f"listen: 'unix://{tmp_path}/t'"
    said = only(f"source: {{{listen}, owner: nobody-of-that-name}}, sink: 'null:'")
    assert said.endswith("useradd --system nobody-of-that-name")
    said = only(f"source: {{{listen}, group: nobody-of-that-name}}, sink: 'null:'")
    assert said.endswith("groupadd --system nobody-of-that-name")
    assert found("source: 'unix://@name', sink: 'null:'") == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_is_shipped_can_be_run(path: Path) -> None:
    """Every configuration that comes with relay is accepted as `relay serve` accepts it, no key of it refused."""
    assert load_to_run(str(path)).routes
