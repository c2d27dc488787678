"""Giving up rights: the user, files, ports and calls; what is outside is refused, what the routes need is not."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from confined import answers, config, needs, passes, probed
from forked import needs_root
from peers import PATIENCE, program, tcp_listener, there_and_back
from relays import ROOT, relay, run_relay

from relay.config.data import from_data
from relay.confinement.account import Account
from relay.confinement.wants import wants
from relay.errors import ConfigErrors
from relay.kernel import confine as kernel

NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that any user may enter: pytest's own are for their owner only."""
    made = Path(tempfile.mkdtemp(prefix="relay-confine-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def straight_in() -> Path:
    """A socket's path in the directory for everybody's temporary files itself."""
    return Path(tempfile.gettempdir()) / f"relay-{os.getpid()}"


def test_files_that_no_route_needs_are_refused(home: Path) -> None:
    """Landlock: what is outside cannot be read, written or listed, from any thread; the route's directory can."""
    needs(1)
    outside = home / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    served = probed(
        config(home, "{files: true}"),
        home,
        ("read", "/etc/shadow"),
        ("read", str(outside / "secret")),
        ("write", str(outside / "new")),
        ("listing", "/"),
        ("read", "/etc/hosts"),
        ("write", str(home / "out" / "new")),
        ("late",),
        ("resolve", "localhost"),
    )
    with served as process:
        assert answers(process) | {
            "read /etc/shadow": "EACCES",
            f"read {outside}/secret": "EACCES",
            f"write {outside}/new": "EACCES",
            "listing /": "EACCES",
            "read /etc/hosts": "done",
            f"write {home}/out/new": "done",
            "late": "done",
            "resolve localhost": "done",
            "NoNewPrivs": ["1"],
        } == answers(process)
        passes(process, home / "out")


def test_ports_that_no_route_needs_are_refused(home: Path) -> None:
    """Landlock: connecting and binding go to the ports of the configuration alone."""
    needs(4)
    with tcp_listener() as (inside, address), tcp_listener() as (outside, _address):
        port, other = inside.getsockname()[1], outside.getsockname()[1]
        text = f"""
confine: {{ports: true}}
routes:
  r: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: "{address}"}}
"""
        served = probed(text, home, ("connect", port), ("connect", other), ("bind", 0), ("bind", other + 1))
        with served as process:
            found = answers(process)
            assert found[f"connect {port}"] == found["bind 0"] == "done"
            assert found[f"connect {other}"] == found[f"bind {other + 1}"] == "EACCES"


def test_system_calls_that_relay_does_not_make_are_refused(home: Path) -> None:
    """seccomp: no new process, no program, no raw socket, no namespace, no signal to others; all else goes on."""
    served = probed(
        config(home, "{calls: true, files: false, ports: false}"),
        home,
        ("execute",),
        ("clone_process",),
        ("raw",),
        ("unshare",),
        ("kill", os.getpid()),
        ("thread",),
        ("late",),
        ("resolve", "localhost"),
        ("read", "/etc/hostname"),
    )
    with served as process:
        found = answers(process)
        refused = ("execute", "clone_process", "raw", "unshare", f"kill {os.getpid()}")
        assert {name: found[name] for name in refused} == dict.fromkeys(refused, "EPERM")
        assert {found[name] for name in ("thread", "late", "resolve localhost", "read /etc/hostname")} == {
            "done"
        }
        assert found["Seccomp"] == ["2"]
        passes(process, home / "out")
        tasks = Path(f"/proc/{process.pid}/task")
        for task in tasks.iterdir():  # those that were there before, too
            assert "Seccomp:\t2" in (task / "status").read_text()
            assert "NoNewPrivs:\t1" in (task / "status").read_text()


@needs_root
def test_root_becomes_another_user_once_it_has_bound(home: Path) -> None:
    """A low port is bound as root; then no thread is root, nor can become it, nor read what root alone may."""
    with socket.socket() as probe:
        port = next(port for port in range(600, 1000) if probe.connect_ex(("127.0.0.1", port)))
    text = config(home, f"{{user: {NOBODY}, files: false}}", f"tcp://127.0.0.1:{port}")
    served = probed(text, home, ("root",), ("read", "/etc/shadow"))
    with served as process:
        found = answers(process)
        assert found["read /etc/shadow"] == "EACCES"
        assert found["root"] == "EPERM"
        assert found["Uid"] == [str(NOBODY)] * 4
        assert int(found["CapEff"][0], 16) == 0
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            assert f"Uid:\t{NOBODY}" in (task / "status").read_text()
        passes(process, home / "out")
        (made,) = (home / "out").glob("got-*.bin")
        assert made.stat().st_uid == NOBODY
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


@needs_root
def test_the_admin_socket_is_the_users(home: Path) -> None:
    """Whom relay has become may ask it and tell it, and nobody else but root."""
    (home / "run").mkdir()
    text = config(
        home, f"{{user: {NOBODY}, files: false}}", more=f'admin: {{socket: "unix://{home}/run/admin"}}\n'
    )
    with probed(text, home) as process:
        process.said("ready")
        there = (home / "run" / "admin").stat()
        assert (there.st_uid, there.st_mode & 0o777) == (NOBODY, 0o600)
        done = run_relay("health", "--admin", f"unix://{home}/run/admin", cwd=home)
        assert done.returncode == 0, done.stderr


@needs_root
def test_the_command_line_names_the_user(home: Path) -> None:
    """--user is confine.user, and stays it over a reload."""
    text = f'routes: {{r: {{source: "tcp://127.0.0.1:0", sink: {{file: "{home}/out/got-{{id}}.bin"}}}}}}\n'
    served = probed(text, home, ("root",), arguments=("--user", str(NOBODY)))
    with served as process:
        assert answers(process)["Uid"] == [str(NOBODY)] * 4
        process.signal(signal.SIGHUP)
        process.said("reloaded")


def test_who_is_not_root_cannot_become_another(tmp_path: Path) -> None:
    """relay says so and opens nothing; a user that there is not is an error, too."""
    (tmp_path / "relay.yaml").write_text(
        'confine: {user: 1}\nroutes: {r: {source: "tcp://127.0.0.1:0", sink: "null:"}}\n'
    )
    if os.geteuid() == 0:
        (tmp_path / "relay.yaml").write_text(
            'confine: {user: no-such-user}\nroutes: {r: {source: "tcp://127.0.0.1:0", sink: "null:"}}\n'
        )
    done = run_relay("serve", tmp_path / "relay.yaml", cwd=tmp_path)
    assert done.returncode != 0
    assert b"confine: " in done.stderr


def test_a_reload_that_needs_what_was_given_up_is_refused(home: Path) -> None:
    """A new directory, a new port to connect to, another `confine`: refused with place and reason; the rest goes on."""
    needs(4)
    (home / "other").mkdir()
    first = config(home, "{files: true, ports: true}")
    served = probed(first, home)
    with served as process:
        process.said("ready")
        path = home / "conf" / "relay.yaml"
        cases = {
            first
            + f'  s: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: {{file: "{home}/other/{{id}}"}}}}\n': (
                f"gave up the right to write {home}/other (confine.files)"
            ),
            first + '  s: {source: {listen: "tcp://127.0.0.1:0"}, sink: "tcp://127.0.0.1:9"}\n': (
                "gave up the right to connect to port 9 (confine.ports)"
            ),
            first.replace("tcp://127.0.0.1:0", "tcp://127.0.0.1:7"): "gave up the right to listen on port 7",
            first.replace("ports: true", "ports: false"): "gives up when it starts",
        }
        for text, said in cases.items():
            path.write_text(text)
            process.signal(signal.SIGHUP)
            line = process.said(said)["message"]
            assert line.startswith(f"not reloaded: {path}:"), line
        path.write_text(
            first + f'  s: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: {{file: "{home}/out/s"}}}}\n'
        )
        process.signal(signal.SIGHUP)
        process.said("reloaded: added s")
        passes(process, home / "out")


@needs_root
def test_a_reload_that_needs_a_low_port_is_refused_once_relay_is_no_longer_root(home: Path) -> None:
    """A port below 1024 that relay does not listen on takes root; one that it has is kept."""
    with socket.socket() as probe:
        port = next(port for port in range(600, 1000) if probe.connect_ex(("127.0.0.1", port)))
    keys = f"{{user: {NOBODY}, files: false, ports: false}}"
    served = probed(config(home, keys, f"tcp://127.0.0.1:{port}"), home)
    with served as process:
        process.said("ready")
        path = home / "conf" / "relay.yaml"
        path.write_text(config(home, keys, "tcp://127.0.0.1:1"))
        process.signal(signal.SIGHUP)
        assert "port 1 takes root" in process.said("not reloaded")["message"]
        path.write_text(config(home, keys, f"tcp://127.0.0.1:{port}").replace("got-", "got-new-"))
        process.signal(signal.SIGHUP)
        process.said("reloaded: changed r")


def test_what_the_kernel_cannot_do_is_told_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Landlock `files: true` is an error, and where it is merely wished for relay says that it is not so."""
    from relay.confinement import confinement
    from relay.confinement.confinement import Confinement
    from relay.errors import KernelError

    monkeypatch.setattr(confinement, "_threads", lambda: 1)  # the tests' own have nothing to lose here
    monkeypatch.setattr(kernel, "landlock_version", lambda: 0)
    monkeypatch.setattr(kernel, "no_new_privileges", lambda: None)
    routes = {"r": {"source": "null:", "sink": "null:"}}
    with pytest.raises(KernelError, match="'files: true' cannot be done: this kernel has no Landlock"):
        Confinement(from_data({"routes": routes, "confine": {"files": True}}, "test")).begin()
    wished = Confinement(from_data({"routes": routes, "confine": {"calls": False}}, "test"))
    wished.begin()
    assert wished._lacks == ["files: this kernel has no Landlock", "ports: Landlock has version 0, not 4"]


def test_what_a_configuration_wants(tmp_path: Path) -> None:
    """Directories of its files, made if they are missing; ports; no directory that is shared with everything."""
    text = {
        "confine": {"read": ["/srv/more"]},
        "routes": {
            "a": {
                "source": {"listen": "tcp://127.0.0.1:9000"},
                "stages": [
                    {"header": {"file": "/etc/motd"}},
                    {"tee": {"to": {"file": f"{tmp_path}/x/{{id}}"}}},
                ],
                "sink": {
                    "connect": "tcp://example.org:80",
                    "on_slow": {"policy": "spill", "directory": f"{tmp_path}/log"},
                },
            },
            "b": {"source": "unix:///run/b.sock", "sink": {"connect": "unix://@name"}},
            "c": {
                "source": "tcp://127.0.0.1:9001",
                "duplex": True,
                "sink": {"connect": ["tcp://127.0.0.1:81", "tcp://127.0.0.1:82"]},
            },
        },
    }
    found = {(want.kind, want.path or want.port, want.make) for want in wants(from_data(text, "test"))}
    real = os.path.realpath
    assert found == {
        ("read", real("/srv/more"), 0),
        ("bind", 9000, 0),
        ("bind", 9001, 0),
        ("connect", 81, 0),
        ("connect", 82, 0),
        ("read", real("/etc/motd"), 0),
        ("write", real(tmp_path / "x"), 0o777),
        ("connect", 80, 0),
        ("connect", 53, 0),
        ("write", real(tmp_path / "log"), 0o700),
        ("write", real("/run/b.sock"), 0),
        ("abstract", "unix://@name", 0),
    }


def test_a_directory_that_nothing_can_be_allowed_in_is_told_before_relay_starts(tmp_path: Path) -> None:
    """A socket straight in everybody's directory of temporary files would take all of it: relay says so."""
    needs(1)
    path = tmp_path / "relay.yaml"
    path.write_text(
        f'confine: {{files: true}}\nroutes: {{r: {{source: "unix://{straight_in()}", sink: "null:"}}}}\n'
    )
    done = run_relay("serve", path, cwd=tmp_path)
    assert done.returncode == 1
    assert b"nothing can be allowed there" in done.stderr


@needs_root
def test_root_does_not_do_what_anybody_wrote(tmp_path: Path) -> None:
    """A configuration that anybody may write is refused to root, by check as by serve."""
    path = tmp_path / "relay.yaml"
    path.write_text('routes: {r: {source: "null:", sink: "null:"}}\n')
    path.chmod(0o666)
    for command in ("check", "serve"):
        done = run_relay(command, path, cwd=tmp_path)
        assert done.returncode == 3
        assert b"anybody may write it, and relay is root; chmod o-w" in done.stderr
    path.chmod(0o644)
    assert run_relay("check", path, cwd=tmp_path).returncode == 0


def test_a_python_that_the_user_cannot_read_is_told(tmp_path: Path) -> None:
    """What is imported after the change of user has to be readable to that user, all the way down."""
    account = Account("somebody", 54321, 54321, (54321,))
    assert account.reaches("/usr/lib")
    place = tmp_path / "closed" / "lib"
    place.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    assert not account.reaches(str(place))
    owner = Account("owner", os.getuid(), os.getgid(), (os.getgid(),))
    assert owner.reaches(str(place))


def test_a_group_needs_its_user() -> None:
    """The group alone would leave relay the rights of its user."""
    with pytest.raises(ConfigErrors, match="'group' needs 'user' beside it"):
        from_data({"confine": {"group": 1}, "routes": {"r": {"source": "null:", "sink": "null:"}}}, "test")


def test_a_duplex_route_works_when_all_of_it_is_confined(home: Path) -> None:
    """Sessions are accepted, connected by name, relayed and drained behind every fence at once."""
    with tcp_listener() as (behind, address):
        port = address.rpartition(":")[2]
        text = f"""
confine: {{files: where_possible, ports: where_possible, calls: true}}
routes:
  r: {{source: {{listen: "tcp://127.0.0.1:0"}}, sink: "tcp://localhost:{port}", duplex: true}}
"""
        served = probed(text, home)
        with served as process:
            with socket.create_connection(("127.0.0.1", process.port()), timeout=PATIENCE) as sock:
                there_and_back(sock, behind)
            process.signal(signal.SIGTERM)
            assert process.wait() == 0


def test_check_and_plan_tell_what_is_given_up(tmp_path: Path) -> None:
    """check says what keeps relay from it, plan what it will be, both before anything is given up."""
    path = tmp_path / "relay.yaml"
    path.write_text(
        "confine: {user: no-such-user, files: true, ports: false}\n"
        f'routes: {{r: {{source: "unix://{straight_in()}", sink: "null:"}}}}\n'
    )
    done = run_relay("check", path, cwd=tmp_path)
    assert done.returncode == 0
    assert b"warning: confine: there is no user 'no-such-user'; useradd --system no-such-user" in done.stderr
    if kernel.landlock_version():
        assert b"nothing can be allowed there; use a directory" in done.stderr
    plan = run_relay("plan", path, cwd=tmp_path).stdout.decode()
    assert "confined: relay becomes no-such-user when every address is bound; gets no new privileges" in plan
    assert "touches no files but those it needs; makes no system calls" in plan
    assert "tcp ports" not in plan


@needs_root
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_shipped_runs_confined(path: Path, home: Path) -> None:
    """Every shipped configuration opens all that it names behind every fence, in a network of its own."""
    program("ip")
    made = home / "relay.yaml"
    text = path.read_text().replace(":-/tmp}", f":-{home}}}")  # a directory of its own
    made.write_text(text if "confine:" in text else f"confine: {{calls: true}}\n{text}")
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    with relay("serve", "--log-format", "json", made, cwd=home, prefix=alone) as process:
        process.said("confined: ")
        process.said("ready")
        process.signal(signal.SIGTERM)
        process.wait()
        assert "EACCES" not in process.text
        assert "EPERM" not in process.text
