"""What relay says when it begins and while it runs: the summary, what comes again and again, what must not be read."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest
from admins import asked
from peers import eventually
from relays import environment, run_relay, serving

from relay.journal import secrets
from relay.journal.repeats import Repeats

ROUTES = """admin: {socket: 'unix://admin.sock'}
drain: 0s
engines: 1
routes:
  camera:
    source: {listen: 'tcp://127.0.0.1:0', limits: {connections: 7, idle: 60s}}
    stages:
      - tee: {to: 'unix://away.sock', on_slow: {policy: drop, after: 2s}}
      - tee: {to: {file: '{id}.bin'}, on_slow: spill}
    sink: 'null:'
  web: {source: 'tcp://127.0.0.1:0', duplex: true, sink: 'tcp://127.0.0.1:1'}
"""


def test_the_summary(tmp_path: Path) -> None:
    """At the start each route has a line: its addresses, methods, policies, who can hold whom, limits."""
    with serving(ROUTES, tmp_path) as process:
        process.said("ready")
        camera, web = [line for line in process.lines if line["event"] == "route"]
        (whole,) = [line for line in process.lines if line["event"] == "summary"]
    assert camera["source"] == "tcp://127.0.0.1:0"
    assert camera["bound"] == [
        line["address"]
        for line in process.lines
        if line.get("route") == "camera" and line["event"] == "listening"
    ]
    assert [(sink["address"], sink["policy"]) for sink in camera["sinks"]] == [
        ("unix://away.sock", "drop"), ("{id}.bin", "spill"), ("null:", "block"),
    ]  # fmt: skip
    assert all(sink["method"] for sink in camera["sinks"])
    assert camera["limits"] == {"connections": 7, "idle": 60.0}
    (hold,) = [hold for hold in camera["holds"] if hold["who"] == "unix://away.sock"]
    assert (hold["seconds"], hold["then"]) == (2.0, "drop")
    assert "unix://away.sock for 2 s, then drop" in camera["message"]
    assert "connections 7, idle 60 s" in camera["message"]
    assert "both ways between" in web["message"]
    assert (whole["routes"], whole["engines"]) == (2, 1)
    assert whole["message"].startswith("2 routes with 1 engines")


def test_text_lines_say_the_same(tmp_path: Path) -> None:
    """As text, and at a level that leaves it out."""
    (tmp_path / "r.yaml").write_text("admin: {}\nroutes: {r: {source: 'null:', sink: 'null:'}}\n")
    done = run_relay("serve", "--log-format", "text", "r.yaml", cwd=tmp_path)
    assert b"r: from null: (splice) to null: (splice, block)" in done.stderr
    quiet = run_relay("serve", "--log-format", "text", "--log-level", "warning", "r.yaml", cwd=tmp_path)
    assert quiet.stderr == b""


def test_a_thousand_routes_are_no_thousand_lines(tmp_path: Path) -> None:
    """Of many routes the first are told one by one."""
    routes = "".join(f"  r{number}: {{source: 'null:', sink: 'null:'}}\n" for number in range(60))
    with serving("admin: {}\nroutes:\n" + routes, tmp_path) as process:
        assert process.wait() == 0
    assert len([line for line in process.lines if line["event"] == "route"]) == 50
    assert any("and 10 more routes" in line["message"] for line in process.lines)


# -- again and again


def said(
    repeats: Repeats, text: str, *arguments: object, level: int = logging.WARNING, **more: object
) -> str | None:
    """What becomes of a line; None when it is held back."""
    record = logging.LogRecord("relay.x", level, "", 0, text, arguments, None)
    record.__dict__.update(more)
    return record.getMessage() if repeats.filter(record) else None


def test_what_comes_again_is_held_back_and_counted() -> None:
    """After a burst lines of one text are held back; the next that passes says how many."""
    repeats = Repeats(burst=3, between=0.05)
    assert [said(repeats, "%s is slow", number) for number in range(3)] == [
        "0 is slow",
        "1 is slow",
        "2 is slow",
    ]
    assert [said(repeats, "%s is slow", number) for number in range(5)] == [None] * 5
    assert said(repeats, "%s is away", 1) == "1 is away"
    line = eventually(lambda: said(repeats, "%s is slow", "a"), "one passes again")
    assert line.startswith("a is slow (and ")
    assert int(line.split("and ")[1].split()[0]) >= 5


@pytest.mark.parametrize("more", [{"level": logging.INFO}, {"event": "reload_refused"}])
def test_what_always_passes(more: dict[str, int]) -> None:
    """Lines below a warning and lines of an event are never held back."""
    repeats = Repeats(burst=1)
    assert all(said(repeats, "again", **more) for _ in range(10))  # type: ignore[arg-type] # a level or an event


# -- secrets


def test_secrets_are_blotted_out(tmp_path: Path) -> None:
    """The value of a variable that is named like a secret is in no line, no error and no answer; another one's is."""
    config = (
        "admin: {socket: 'unix://admin.sock'}\ndrain: 0s\nroutes:\n"
        "  r: {source: 'tcp://127.0.0.1:0', sink: {file: '${PLACE}/${API_TOKEN}/{id}.bin'}}\n"
    )
    env = environment(PLACE="in-plain-sight", API_TOKEN="hunter2-hunter2")
    with serving(config, tmp_path, env=env) as process:
        process.said("ready")
        answers = [
            asked(tmp_path / "admin.sock", path)[1]
            for path in ("/", "/metrics", "/api/v1/status", "/?route=r")
        ]
        process.config.write_text(config.replace("drain: 0s", "drain: ${API_TOKEN}"))
        process.signal(signal.SIGHUP)
        process.said("not reloaded")
        process.signal(signal.SIGTERM)
        process.wait()
    for text in (process.text, *answers):
        assert "hunter2" not in text
        assert "in-plain-sight/***" in text
    (tmp_path / "bad.yaml").write_text(config.replace("drain: 0s", "drain: ${API_TOKEN}"))
    done = run_relay("check", "bad.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 3
    assert b"hunter2" not in done.stderr
    assert b"'***'" in done.stderr


SECRET = ("DB_PASSWORD", "token", "AWS_SECRET_ACCESS_KEY", "SIGNING_KEY", "SSL_KEY", "PASS")
PLAIN = ("RELAY_BIND", "KEYBOARD", "PASSAGE")


@pytest.mark.parametrize(
    ("name", "secret"), [*((name, True) for name in SECRET), *((name, False) for name in PLAIN)]
)
def test_which_names_are_secret(monkeypatch: pytest.MonkeyPatch, name: str, secret: bool) -> None:
    """Names that end in a password, a token, a key or the like; not those that merely begin like one."""
    monkeypatch.setattr(secrets, "_values", set())
    secrets.note(name, 'a "value"')
    assert (secrets.hidden(json.dumps({"x": 'a "value"'})) == '{"x": "***"}') == secret
