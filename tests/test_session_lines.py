"""Lines of finished sessions: the template that thousands a second go through says what records themselves say."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.journal import logs, secrets
from relay.journal.lines import Lines
from relay.journal.record import SessionRecord, SinkRecord

ODD = [
    "",
    'quoted "',
    "back\\slash",
    "tab\t",
    "line\nbreak",
    "ümlaut",
    "\u2028",
    "😀",
    "\x00",
    "{brace}",
    "%s",
]


def text(chance: random.Random) -> str:
    """Words with whatever a name or an errno's text may hold."""
    return " ".join(chance.choice(["reset", "tcp://a:1", "x", *ODD]) for _ in range(chance.randint(1, 4)))


def peer(chance: random.Random) -> str:
    """A peer's name as C or a PROXY header has it."""
    return chance.choice(["10.0.0.1:5", "[2001:db8::1]:65535", "[fe80::1%eth0]:7", "pid:4711"])


def duplex(chance: random.Random) -> SessionRecord:
    """The record of a duplex session without stages."""
    seconds = chance.choice([0.0, 1e-7, chance.random(), 86400 * chance.random(), 4e6])
    failed = chance.random() < 0.4
    method, result = chance.choice(["copy", "splice"]), "failed" if failed else "delivered"
    sink = SinkRecord(text(chance), text(chance), chance.randrange(1 << 50), seconds, method, result)
    sink.lost = chance.choice([0, chance.randrange(1 << 20)])
    if chance.random() < 0.8:
        sink.upstream, sink.tries = text(chance), chance.randint(1, 4)
        sink.connects = (chance.choice([1e-6, chance.random(), 30.0]),)
    if chance.random() < 0.3:
        sink.passed_over = tuple((text(chance), text(chance)) for _ in range(chance.randint(1, 3)))
    record = SessionRecord(
        text(chance), str(chance.randrange(1 << 40)), text(chance), peer(chance), sink.bytes + sink.lost, seconds,
        method, chance.choice(["source", "sinks", "relay"]), result,
    )  # fmt: skip
    record.sinks, record.reason = [sink], text(chance) if failed else ""
    record.back, record.back_lost = chance.randrange(1 << 50), chance.choice([0, 5])
    record.back_method = chance.choice(["copy", "splice"])
    record.via = peer(chance) if chance.random() < 0.3 else ""
    record.why_method = text(chance) if chance.random() < 0.3 else ""
    return record


def in_order(line: str) -> Any:
    """What a JSON text says, fields in their order."""
    return json.loads(line, object_pairs_hook=list)


@pytest.mark.parametrize("seed", range(20))
def test_the_template_says_what_the_record_says(seed: int) -> None:
    """Every field of `as_dict`, in its order, behind the words of `as_text`."""
    chance = random.Random(seed)
    for _ in range(100):
        record = duplex(chance)
        assert record.plain
        whole = {"message": record.as_text(), **record.as_dict()}
        assert in_order(f"{{{record.as_json()}}}") == in_order(json.dumps(whole))


@contextmanager
def straight(path: Path) -> Iterator[None]:
    """relay's log goes to a file as JSON lines, by the thread of its one handler; at the end all are there."""
    before = list(logs.log.handlers), logs.log.level
    with path.open("w") as stream:
        handler = Lines(stream)
        handler.setFormatter(logs.JsonLines())
        logs.log.handlers[:] = [handler]
        logs.log.setLevel(logging.INFO)
        try:
            yield
        finally:
            assert handler._writer.flush()
            logs.log.handlers[:] = before[0]
            logs.log.setLevel(before[1])
            logging.Handler.close(handler)


def lines(said: str) -> list[str]:
    """Those of a log; `splitlines` would split at more than it ends lines by."""
    return said.split("\n")[:-1]


def test_a_line_is_the_same_by_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight to the queue, or through the logger as any other event: the same line, and nothing secret in either."""
    monkeypatch.setattr(secrets, "_values", {"tcp://a:1"})
    chance = random.Random(3)
    records = [duplex(chance) for _ in range(200)]
    put, taken = logs._put, []

    def watched(record: SessionRecord, level: int) -> bool:
        taken.append(put(record, level))
        return taken[-1]

    monkeypatch.setattr(logs, "_put", watched)
    with straight(tmp_path / "short"):
        for record in records:
            logs.session(record)
    assert taken == [True] * len(records)
    with straight(tmp_path / "long"):
        monkeypatch.setattr(logs, "_put", lambda _record, _level: False)
        for record in records:
            logs.session(record)
    short, long = (lines((tmp_path / name).read_text(encoding="utf-8")) for name in ("short", "long"))
    assert len(short) == len(long) == len(records)
    for one, another in zip(short, long, strict=True):
        (name, at), *rest = in_order(one)
        assert name == "time"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", at)
        assert rest == in_order(another)[1:]
    assert "tcp://a:1" not in "".join((*short, *long))
    assert "***" in "".join(short)


@pytest.mark.parametrize(("level", "count"), [("INFO", 2), ("WARNING", 1), ("ERROR", 0)])
def test_levels_hold_for_sessions(tmp_path: Path, level: str, count: int) -> None:
    """A session that went well is information, one that failed a warning."""
    chance = random.Random(5)
    records = {record.result: record for record in (duplex(chance) for _ in range(50))}
    with straight(tmp_path / "lines"):
        logs.log.setLevel(level)
        for record in records.values():
            logs.session(record)
    told = [json.loads(line)["level"] for line in lines((tmp_path / "lines").read_text(encoding="utf-8"))]
    assert sorted(told) == ["info", "warning"][2 - count :]


def test_what_the_template_does_not_know_goes_the_long_way() -> None:
    """A record with stages, measurements, mirrors or waits of its own is not plain."""
    for field, value in {
        "back": None, "stages": [{"stage": "meter"}], "measured": {"to_sink": {}}, "sinks": [], "peer": "",
    }.items():  # fmt: skip
        record = duplex(random.Random(1))
        setattr(record, field, value)
        assert not record.plain
    for field, value in {"blocked_seconds": 1.0, "why_method": "x", "seconds": 1e9}.items():
        record = duplex(random.Random(1))
        setattr(record.sinks[0], field, value)
        assert not record.plain
