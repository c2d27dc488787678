"""Passwords in a configuration: who may read the file, and what of it may come from elsewhere."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from relays import environment, run_relay, serving

from relay.config.load import load_with_places
from relay.errors import ConfigErrors
from relay.journal.secrets import has_credentials

AUTH = "AUTH hunter2\r\nPING\r\n"


def written(tmp_path: Path, send: str, mode: int) -> Path:
    """A configuration whose health check says that."""
    path = tmp_path / "relay.yaml"
    health = f'{{every: 50s, send: {json.dumps(send)}, expect: "+PONG"}}'
    path.write_text(
        "routes:\n  r:\n    source: {listen: 'tcp://127.0.0.1:0'}\n    duplex: true\n"
        f"    sink: {{connect: 'tcp://127.0.0.1:6379', health: {health}}}\n"
    )
    path.chmod(mode)
    return path


def test_a_password_that_anybody_may_read_is_refused(tmp_path: Path) -> None:
    """By check, plan and serve, with its place, the reason and what to do, and without the password itself."""
    path = written(tmp_path, AUTH, 0o644)
    for command in ("check", "plan", "serve"):
        done = run_relay(command, path, cwd=tmp_path)
        assert done.returncode == 3
        said = done.stderr.decode()
        assert f"{path}:5:" in said
        assert "routes.r.sink.health.send: a password, and anybody may read the file; chmod o-r" in said
        assert "hunter2" not in said


def test_a_password_that_its_owner_alone_may_read_is_taken(tmp_path: Path) -> None:
    """Closed to others, or to all but a group, the file may hold it; and one that holds none may be open to all."""
    for mode, send in ((0o600, AUTH), (0o640, AUTH), (0o644, "PING\r\n")):
        assert run_relay("check", written(tmp_path, send, mode), cwd=tmp_path).returncode == 0


def test_a_password_from_the_environment_may_be_named_by_anybody(tmp_path: Path) -> None:
    """What the file says is a variable's name; but a default is written in it."""
    path = written(tmp_path, "AUTH ${REDIS_PASSWORD}\r\nPING\r\n", 0o644)
    env = environment(REDIS_PASSWORD="hunter2")
    assert run_relay("check", path, cwd=tmp_path, env=env).returncode == 0
    path = written(tmp_path, "AUTH ${REDIS_PASSWORD:-hunter2}\r\nPING\r\n", 0o644)
    assert run_relay("check", path, cwd=tmp_path, env=env).returncode == 3


def test_a_reload_from_a_file_that_anybody_may_read_is_refused(tmp_path: Path) -> None:
    """SIGHUP looks again: everything goes on as it was."""
    text = written(tmp_path, AUTH, 0o600).read_text()
    with serving(text.replace("AUTH hunter2", "PING"), tmp_path) as served:
        served.said("ready")
        served.config.write_text(text)
        served.config.chmod(0o644)
        served.signal(signal.SIGHUP)
        assert "anybody may read the file" in served.said("not reloaded")["message"]
        served.config.chmod(0o600)
        served.signal(signal.SIGHUP)
        served.until(lambda: any(line.get("event") == "reload" for line in served.lines))


def test_an_alias_of_a_check_is_seen(tmp_path: Path) -> None:
    """One health check for several routes, by an anchor: each place is named."""
    path = written(tmp_path, AUTH, 0o644)
    one = path.read_text().replace("health: {", "health: &h {")
    other = one.partition("routes:\n")[2].replace("  r:\n", "  s:\n")
    path.write_text(one + other[: other.index("health:")] + "health: *h}\n")
    with pytest.raises(ConfigErrors) as refused:
        load_with_places(path, to_run=True)
    assert [str(error).count("health.send") for error in refused.value.errors] == [1, 1]


@pytest.mark.parametrize(
    "said",
    [
        AUTH,
        "auth user hunter2\n",
        "*2\r\n$4\r\nAUTH\r\n$7\r\nhunter2\r\n",
        "HELLO 3 AUTH user hunter2\r\n",
        "USER me\r\nPASS hunter2\r\n",
        "a1 LOGIN me hunter2\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Basic bWU6aHVudGVyMg==\r\n\r\n",
        "GET / HTTP/1.1\r\nCookie: session=hunter2\r\n\r\n",
        "GET / HTTP/1.1\r\nX-Api-Key: hunter2\r\n\r\n",
        "GET /health?probe=1&access_token=hunter2 HTTP/1.0\r\n\r\n",
        "GET http://me:hunter2@host/ HTTP/1.0\r\n\r\n",
    ],
)
def test_passwords_are_known_by_their_protocols(said: str) -> None:
    """Redis, mail, ftp, and what HTTP has for it."""
    assert has_credentials(said)


@pytest.mark.parametrize(
    "said",
    [
        "PING\r\n",
        "AUTH \r\nPING\r\n",
        "QUIT\r\n",
        "GET /health HTTP/1.1\r\nHost: passport.example\r\nAccept: */*\r\n\r\n",
        "GET /token/keys?page=1 HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.1\r\nAuthorization: Bearer \r\n\r\n",
        "GET / HTTP/1.1\r\nX-Api-Key: \r\nX-Forwarded-For: 10.0.0.1\r\n\r\n",
        "EHLO relay\r\n",
        "HELLO 3\r\n",
    ],
)
def test_questions_without_a_password_are_none(said: str) -> None:
    """Neither are those whose password was left to the environment."""
    assert not has_credentials(said)
