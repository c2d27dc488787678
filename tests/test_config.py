"""Configurations: what a right one means."""

# ruff: noqa: E501 - each bad input, its place and its message stay on one line

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from route_texts import CONTRACT, route

from relay.config.data import from_data
from relay.config.load import default_text, load, load_default, loads
from relay.endpoints.address import Address
from relay.errors import ConfigErrors

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_contracts_example() -> None:
    """The example of the contract reads as what it says."""
    config = loads(CONTRACT)
    assert config.engines == 2
    assert config.drain == 10.0
    assert config.admin is not None
    assert str(config.admin.socket) == "unix:///run/relay/admin.sock"
    assert str(config.admin.http) == "tcp://127.0.0.1:9464"
    camera, web = config.routes["camera"], config.routes["web"]
    assert (camera.source.verb, str(camera.source.address)) == ("listen", "tcp://127.0.0.1:9000")
    assert [stage.kind for stage in camera.stages] == ["throttle", "tee", "tee"]
    throttle, spilling, dropping = (stage.model_dump() for stage in camera.stages)
    assert throttle["rate"] == 200_000_000
    assert spilling["on_slow"]["policy"] == "spill"
    assert dropping["on_slow"] | {"policy": "drop", "after": 2.0} == dropping["on_slow"]
    assert dropping["stages"] == ({"throttle": {"rate": 1_000_000}},)
    assert (camera.sink.verb, camera.sink.burst, camera.turns()) == ("listen", 1 << 20, "one")
    assert (web.duplex, web.source.limits.per_peer, web.source.limits.idle, web.turns()) == (
        True,
        50,
        60.0,
        "each",
    )
    places = [(place, str(sink.address)) for place, sink in camera.sinks()]
    assert places == [
        (("stages", 1, "tee", "to"), "archive/{route}-{time}-{id}.ts"),
        (("stages", 2, "tee", "to"), "tcp://127.0.0.1:9100"),
        (("sink",), "tcp://127.0.0.1:9001"),
    ]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_accepted(path: Path) -> None:
    """The examples are right, whatever the environment sets or leaves out."""
    assert load(path).routes


def test_the_default_is_one_of_the_configurations_and_binds_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The built-in default is the file in configs/, and RELAY_BIND moves both of its listeners."""
    monkeypatch.delenv("RELAY_BIND", raising=False)
    assert default_text() == (CONFIGS / "default.yaml").read_text()
    inbox = load_default().routes["inbox"]
    assert [str(inbox.source.address), *(str(sink.address) for _, sink in inbox.sinks())] == [
        "tcp://127.0.0.1:9000",
        "relay-inbox/{time}-{peer}-{id}.bin",
        "tcp://127.0.0.1:9001",
    ]
    monkeypatch.setenv("RELAY_BIND", "[::]")
    assert str(load_default().routes["inbox"].sink.address) == "tcp://[::]:9001"


@pytest.mark.parametrize(
    ("text", "source", "sink"),
    [
        ("tcp://127.0.0.1:1", "listen", "connect"),
        ("unix:///x", "listen", "connect"),
        ("x.bin", "read", "write"),
        ("fifo:///x", "read", "write"),
        ("fd://3", "read", "write"),
        ("null:", "read", "write"),
        ("-", "read", "write"),
    ],
)
def test_a_plain_address_is_a_short_form(text: str, source: str, sink: str) -> None:
    """A source listens on tcp and unix and reads the rest, a sink connects to tcp and unix and writes the rest."""
    first, second = route(f"source: '{text}'\nsink: 'null:'"), route(f"source: 'null:'\nsink: '{text}'")
    assert (first.source.verb, second.sink.verb) == (source, sink)
    assert first.source.address == second.sink.address == Address.parse(text)


def test_mappings_of_files_fifos_and_descriptors() -> None:
    """Behind file, fifo and fd stand paths and numbers; their addresses are complete."""
    made = route("source: {fifo: in}\nsink: {file: 'file:///x'}")
    assert (made.source.address, made.sink.address) == (
        Address("fifo", path="in"),
        Address("file", path="/x"),
    )
    assert route("source: {fd: 3}\nsink: {fd: 'fd://4'}").sink.address == Address("fd", number=4)


@pytest.mark.parametrize(
    ("sink", "turns"),
    [
        ("'tcp://h:1'", "each"),
        ("{listen: 'tcp://h:2'}", "one"),
        ("'-'", "one"),
        ("'fd://3'", "one"),
        ("x.bin", "one"),
        ("'{id}.bin'", "each"),
        ("'{time}-{peer}.bin'", "each"),
        ("'null:'", "each"),
        ("'fifo:///x'", "each"),
    ],
)
def test_whether_connections_take_turns(sink: str, turns: str) -> None:
    """A sink that all connections must share makes them take turns, wherever it stands; the source may say otherwise."""
    assert route(f"source: 'tcp://:1'\nsink: {sink}").turns() == turns
    inner = f"source: 'tcp://:1'\nstages: [{{tee: {{stages: [{{tee: {{to: {sink}}}}}], to: 'null:'}}}}]\nsink: 'null:'"
    assert route(inner).turns() == turns
    assert route(f"source: {{listen: 'tcp://:1', connections: one}}\nsink: {sink}").turns() == "one"


@pytest.mark.parametrize(
    ("sink", "policy", "after", "then", "most"),
    [
        ("'tcp://h:1'", "block", 1.0, None, None),
        ("{listen: 'tcp://h:1'}", "disconnect", 5.0, None, None),
        ("{listen: 'tcp://h:1', on_slow: block}", "block", 1.0, None, None),
        ("{file: x, on_slow: drop}", "drop", 0.2, None, None),
        ("{file: x, on_slow: {after: 0s}}", "block", 0.0, None, None),
        ("{connect: 'tcp://h:1', on_slow: spill}", "spill", 1.0, "block", 64 << 20),
        ("{listen: 'tcp://h:1', on_slow: spill}", "spill", 5.0, "disconnect", 64 << 20),
        (
            "{connect: 'tcp://h:1', on_slow: {policy: spill, directory: d, then: drop}}",
            "spill",
            0.2,
            "drop",
            None,
        ),
        ("{connect: 'tcp://h:1', on_slow: {policy: spill, max: 1GiB}}", "spill", 1.0, "block", 1 << 30),
    ],
)
def test_policies_in_force(sink: str, policy: str, after: float, then: str | None, most: int | None) -> None:
    """What a policy leaves out depends on the kind of sink; in a tee it is the same, beside `to` or inside it."""
    slow = route(f"source: '-'\nsink: {sink}").sink.slow
    assert (slow.policy, slow.after, slow.then, slow.max) == (policy, after, then, most)
    (stage,) = route(f"source: '-'\nstages: [{{tee: {{to: {sink}}}}}]\nsink: 'null:'").stages
    assert stage.slow == slow  # type: ignore[attr-defined]


def test_file_options() -> None:
    """Rotation is by size, by time or both; fsync is a word or an interval; a sidecar's true is sha256."""
    sinks = [
        route(f"source: '-'\nsink: {{file: x, {options}}}").sink
        for options in (
            "rotate: 1MiB",
            "rotate: 1h",
            "rotate: {size: 1KB, every: 1m}",
            "fsync: 2s, sidecar: true",
            "fsync: close",
        )
    ]
    assert [(s.rotate.size, s.rotate.every) for s in sinks[:3] if s.rotate] == [
        (1 << 20, None),
        (None, 3600.0),
        (1000, 60.0),
    ]
    assert (sinks[3].fsync, sinks[3].sidecar, sinks[4].fsync, sinks[4].sidecar) == (
        2.0,
        "sha256",
        "close",
        None,
    )


@pytest.mark.parametrize("mode", ["0660", "'0660'", "660", "0o660", "'660'"])
def test_the_mode_of_a_unix_socket_is_octal_however_it_is_written(mode: str) -> None:
    """YAML 1.2 has no octal numbers that begin with 0, and nobody means decimal permissions."""
    assert route(f"source: {{listen: 'unix:///x', mode: {mode}}}\nsink: 'null:'").source.mode == 0o660


@pytest.mark.parametrize(
    "text",
    ["on", "off", "yes", "no", "12:30", "0o17", "1_000", "0x1f", "2024-01-01", "1e", ".inf", "+.5.", "="],
)
def test_no_surprises_of_yaml_1_1(text: str) -> None:
    """What YAML 1.1 takes for booleans, times and odd numbers is text, as value and as key."""
    assert route(f"source: '-'\nsink: {text}").sink.address.path == text
    assert list(loads(f"routes:\n  {text}: {{source: '-', sink: 'null:'}}\n").routes) == [text]


def test_stages_bare_short_and_empty() -> None:
    """A stage is a bare name, a name with nothing, with its short form or with its settings."""
    stages = route(
        "source: '-'\nstages:\n- meter\n- meter:\n- checksum\n- checksum: crc32c\n- throttle: 8Mbit/s\n- limit: {stop: 1KB, name: l}\n"
        "- header: {text: '{id}\\n'}\n- header: {base64: aGk=}\nsink: 'null:'"
    ).stages
    assert [stage.model_dump(exclude_unset=True) for stage in stages] == [
        {}, {}, {}, {"algorithm": "crc32c"}, {"rate": 1_000_000}, {"stop": 1000, "name": "l"}, {"text": "{id}\\n"}, {"base64": "aGk="},
    ]  # fmt: skip


def test_models_are_frozen() -> None:
    """Settings are values: a reload replaces them, nobody changes them, and their sequences are tuples."""
    config = loads(CONTRACT)
    with pytest.raises(ValidationError):
        config.engines = 3
    assert isinstance(config.routes["camera"].stages, tuple)


def test_a_configuration_from_data_is_checked_the_same_way() -> None:
    """Data without a text gives the same models and the same messages, without lines."""
    assert from_data({"routes": {"a": {"source": "-", "sink": "null:"}}}) == loads(
        "routes: {a: {source: '-', sink: 'null:'}}"
    )
    with pytest.raises(ConfigErrors) as caught:
        from_data({"routes": {"a": {"source": "-", "snk": "null:"}}}, "run")
    assert str(caught.value).split("\n") == [
        "run: routes.a.snk: unknown key 'snk'; did you mean 'sink'?",
        "run: routes.a: missing key 'sink'",
    ]


def test_waiting_for_sinks_is_a_duration() -> None:
    """`wait_for_sinks` says for how long; left out or empty, nothing is waited for."""
    assert route("source: '-'\nsink: 'null:'\nwait_for_sinks: 10s").wait_for_sinks == 10.0
    assert route("source: '-'\nsink: 'null:'\nwait_for_sinks:").wait_for_sinks is None
    assert route("source: '-'\nsink: 'null:'").wait_for_sinks is None
