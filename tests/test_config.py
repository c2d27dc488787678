"""Configurations: what a right one means, and where and how a wrong one is refused."""

# ruff: noqa: E501 - each bad input, its place and its message stay on one line

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from relay.config.data import from_data
from relay.config.load import LARGEST, default_text, load, load_default, loads
from relay.config.models import Config, Route
from relay.endpoints.address import Address
from relay.errors import ConfigErrors, RelayError

CONFIGS = Path(__file__).parent.parent / "configs"

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


def at(text: str) -> list[tuple[str, str]]:
    """The problems of a route whose body is `text`, as (line:col in the body, message without the route's path)."""
    body = "".join(f"    {line}\n" for line in text.splitlines())
    found = []
    for said in problems(f"routes:\n  a:\n{body}"):
        _, line, column, message = said.split(":", 3)
        found.append((f"{int(line) - 2}:{int(column) - 4}", message.strip()))
    return found


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


# Variables


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${N:-2}", 2),
        ("${TWO}", 2),
        ("${TWO:-3}", 2),
        ("${EMPTY:-3}", 3),
        ("${EMPTY:-}", None),
    ],
)
def test_a_value_that_is_one_variable_keeps_its_type(
    text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unquoted variable is a number where the environment holds one, and nothing where it is empty."""
    monkeypatch.setenv("TWO", "2")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("N", raising=False)
    assert loads(f"routes: {{a: {{source: '-', sink: 'null:'}}}}\nengines: {text}\n").engines == value


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('"${TWO}"', "2"),
        ("'${TWO}'", "2"),
        ("a${TWO}b${TWO}", "a2b2"),
        ("$${TWO}-${TWO}", "${TWO}-2"),
        ("$TWO-$$", "$TWO-$$"),
        ("${NONE:-a b}", "a b"),
        ("${NONE:-a:-b}", "a:-b"),
    ],
)
def test_variables_within_text(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, or one part of many, a variable is text; $${ stands for itself."""
    monkeypatch.setenv("TWO", "2")
    monkeypatch.delenv("NONE", raising=False)
    assert (
        route(
            f"source: {{file: {text}}}\nsink: 'null:'"
            if text[0] in "\"'"
            else f"source:\n  file: {text}\nsink: 'null:'"
        ).source.address.path
        == path
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${NONE}", "the environment variable NONE is not set; set it, or write ${NONE:-default}"),
        ("x${NONE", "'${' without '}'"),
        ("${}", "'${}' is not a variable"),
        ("${2X}", "'${2X}' is not a variable"),
        ("${NONE-x}", "write ${NAME} or ${NAME:-default}"),
        ("${A:-${B}}", "with braces inside"),
    ],
)
def test_variables_that_cannot_be_filled_in(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset or misspelt variable is refused at its value, alone: nothing is guessed from its absence."""
    monkeypatch.delenv("NONE", raising=False)
    ((place, message),) = at(f"source: '-'\nsink: {text}")
    assert place == "2:7"
    assert said in message


# Bad input: text


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("", "1:1", "the configuration is empty"),
        ("# nothing\n---\n", "1:1", "the configuration is empty"),
        ("- a\n", "1:1", "expected a mapping that begins with 'routes:', got a list"),
        ("hello", "1:1", "got 'hello'"),
        ("17", "1:1", "got the number 17"),
        ("routes:\n\ta: 1\n", "2:1", "indent with spaces, not tabs"),
        ("routes: {a: b: c}\n", "1:14", "not valid YAML"),
        ("routes: [\n", "2:1", "not valid YAML"),
        ("routes: 'a\n", "2:1", "not valid YAML"),
        ("a: {b: ${X}}\n", "1:9", "inside { } and [ ] a value with ${...} needs quotes"),
        ("a: \x01\n", "1:4", "the character U+0001 is not allowed"),
        ("\u00e9: \x01\n", "1:4", "the character U+0001 is not allowed"),
        ("a: *b\n", "1:4", "undefined alias 'b'"),
        ("a: b\n---\nb: c\n", "2:1", "more than one YAML document"),
        ("a: &a [*a]\n", "1:4", "has no end"),
        ("[" * 100_000, "1:101", "nested deeper than 100 levels"),
        ("- " * 50_000 + "a", "1:201", "nested deeper than 100 levels"),
        ("<<: {a: 1}\n", "1:1", "merge keys (<<) are not supported"),
    ],
)  # fmt: skip
def test_text_that_is_no_configuration(text: str, place: str, said: str) -> None:
    """What cannot be read is refused in one line that says where and why, in words."""
    (line,) = problems(text)
    assert line.startswith(f"f:{place}: ")
    assert said in line


def test_aliases_of_aliases_are_counted_before_they_are_laid_out() -> None:
    """Ten lines that stand for 10^9 values are refused at the first key that is too much."""
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for before, letter in zip("abcdefghi", "bcdefghij", strict=False):
        text += f"{letter}: &{letter} [{','.join([f'*{before}'] * 10)}]\n"
    (line,) = problems(text)
    assert line == "f:5:4: more than 100000 values once aliases are written out; use fewer aliases of aliases"


def test_an_alias_of_a_whole_value_is_fine() -> None:
    """Anchors and aliases work; only the growth is bounded."""
    made = loads("routes:\n  a: &a {source: '-', sink: 'null:'}\n  b: *a\n")
    assert made.routes["a"] == made.routes["b"]


def test_a_problem_in_an_alias_is_shown_where_it_is_written_once() -> None:
    """Two routes share a wrong value: both are named, both point at the one place to mend."""
    assert problems("routes:\n  a: &a {source: '-', sink: 3}\n  b: *a\n") == [
        f"f:2:29: routes.{name}.sink: expected an address or a mapping with one of listen, connect, file, fifo, fd or shared, got the number 3"
        for name in "ab"
    ]


def test_duplicate_keys_at_every_level() -> None:
    """The second of two equal keys is refused, with the line of the first; other problems are found as well."""
    text = "engines: 0\nroutes:\n  a:\n    source: '-'\n    sink: 'null:'\n    sink: x\n  a: {}\nengines: 2\n"
    assert problems(text) == [
        "f:1:10: engines: must be at least 1, got the number 0",
        "f:6:5: routes.a.sink: duplicate key 'sink'; it is given in line 5 already",
        "f:7:3: routes.a: duplicate key 'a'; it is given in line 3 already",
        "f:8:1: engines: duplicate key 'engines'; it is given in line 1 already",
    ]


def test_tags_are_refused() -> None:
    """A tag never makes an object, and one that contradicts its value is named."""
    text = (
        "routes: {a: {source: '-', sink: !!python/name:os.system x}}\nengines: !!int two\ndrain: !!float 3\n"
    )
    assert problems(text) == [
        "f:1:33: routes.a.sink: tags are not supported, here is '!!python/name:os.system'",
        "f:2:10: engines: 'two' is not what its tag '!!int' says",
    ]


# Bad input: meaning


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("routes:\n", "1:8", "expected a mapping, got nothing"),
        ("routes: {}\n", "1:9", "there are no routes"),
        ("routes: []\n", "1:9", "expected a mapping, got a list"),
        ("routes: {a: }\n", "1:13", "expected a mapping with source, stages,"),
        ("routes: {a: [1]}\n", "1:13", "got a list"),
        ("routes: {'': {source: '-', sink: '-'}}\n", "1:9", "'' is not a name for a route"),
    ],
)  # fmt: skip
def test_no_routes_to_speak_of(text: str, place: str, said: str) -> None:
    """A configuration needs a mapping of routes with at least one in it."""
    (line,) = problems(text)
    assert line.startswith(f"f:{place}: ")
    assert said in line


R = "routes: {a: {source: '-', sink: 'null:'}}\n"


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("engine: 2", "2:1", "unknown key 'engine'; did you mean 'engines'?"),
        ("zebra: 2", "2:1", "unknown key 'zebra'; known here: routes, admin, confine, engines, drain"),
        ("engines: 0", "2:10", "must be at least 1, got the number 0"),
        ("engines: 2.0", "2:10", "expected a whole number, got the number 2.0"),
        ("engines: true", "2:10", "expected a whole number, got true"),
        ("engines: '2'", "2:10", "expected a whole number, got '2'"),
        ("engines: 9999", "2:10", "must be at most 1024"),
        ("drain: abc", "2:8", "drain: expected a duration such as 1.5s, got 'abc'"),
        ("drain: -1", "2:8", "expected a duration"),
        ("admin: {socket: 'tcp://127.0.0.1:1'}", "2:17", "the admin socket is a unix socket"),
        ("admin: {http: 'unix:///x'}", "2:15", "admin http listens on tcp"),
        ("admin: {htp: 'tcp://:1'}", "2:9", "did you mean 'http'?"),
        ("admin: yes", "2:8", "expected a mapping with socket, http or remote, got 'yes'"),
    ],
)  # fmt: skip
def test_wrong_keys_at_the_top(text: str, place: str, said: str) -> None:
    """Unknown keys are shown at the key, wrong values at the value."""
    (line,) = problems(R + text)
    assert line.startswith(f"f:{place}: ")
    assert said in line


SINK = "source: '-'\nsink: "
SOURCE = "sink: 'null:'\nsource: "


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("source: '-'", "0:-1", "a: missing key 'sink'"),
        (SINK + "3", "2:7", "expected an address or a mapping"),
        (SINK + "tpc://a:1", "2:7", "unknown scheme 'tpc' in 'tpc://a:1'; did you mean 'tcp'?"),
        (SINK + "tcp://a:99999", "2:7", "port 99999 in 'tcp://a:99999' is out of range"),
        (SINK + "'tcp://[::1:9'", "2:7", "has '[' without ']'"),
        (SINK + "tcp://a:0", "2:7", "port 0 in 'tcp://a:0' is for listening only"),
        (SINK + "tcp://:9", "2:7", "names no host to connect to; this machine is tcp://127.0.0.1:9"),
        (SINK + "'{tim}.ts'", "2:7", "unknown placeholder '{tim}' in '{tim}.ts'; did you mean 'time'?"),
        (SINK + "'{time.ts'", "2:7", "a brace that belongs to no placeholder"),
        (SINK + "out/", "2:7", "'out/' is a directory"),
        (SINK + "{}", "2:1", "a sink needs one of listen, connect, file, fifo, fd or shared"),
        (SINK + "{file: x, fifo: y}", "2:17", "'file' is given already"),
        (SINK + "{plain: '-', file: x}", "2:8", "unknown key 'plain'"),
        (SINK + "{connect: x.bin}", "2:17", "'connect' takes a tcp or unix address, got 'x.bin'; write file: 'x.bin'"),
        (SINK + "{listen: '-'}", "2:16", "write the plain address"),
        (SINK + "{file: '-'}", "2:14", "write the plain address '-' in place of the mapping"),
        (SINK + "{file: 'tcp://a:1'}", "2:14", "'file' takes a path, got the tcp address"),
        (SINK + "{file: 3}", "2:14", "expected the path of a file, got the number 3; put it in quotes"),
        (SINK + "{fd: x}", "2:12", "expected the number of a descriptor"),
        (SINK + "{file: x, burst: 1KB}", "2:17", "'burst' applies to sinks that listen only, this sink is 'file'"),
        (SINK + "{connect: 'tcp://a:1', append: true}", "2:30", "'append' applies to files only, this sink is 'connect to tcp'"),
        (SINK + "{listen: 'unix://@a', mode: 0660}", "2:29", "with an abstract name"),
        (SINK + "{connect: 'unix:///a', mode: 0660}", "2:30", "'mode' applies to unix sockets that listen on a path only"),
        (SINK + "{listen: 'unix:///a', mode: 999}", "2:35", "expected permissions such as 0660"),
        (SINK + "{connect: 'unix:///a', dead_after: 3s}", "2:30", "'dead_after' applies to tcp only"),
        (SINK + "{file: x, peer_eof: close}", "2:17", "'peer_eof' applies to tcp and unix only"),
        (SINK + "{file: x, connections: one}", "2:17", "unknown key 'connections'"),
        (SINK + "{file: x, append: yes}", "2:25", "expected true or false, got 'yes'"),
        (SINK + "{file: x, append: true, sidecar: true}", "2:31", "with 'append' it could not be verified"),
        (SINK + "{file: x, sidecar: md5}", "2:26", "expected sha256, blake3, xxh3 or crc32c, got 'md5'"),
        (SINK + "{file: x, fsync: always}", "2:24", "expected never, close or a duration such as 1s, got 'always'"),
        (SINK + "{file: x, rotate: often}", "2:25", "expected a size such as 100MiB or a duration such as 1h"),
        (SINK + "{file: x, rotate: 100}", "2:25", "expected a size such as 100MiB or a duration such as 1h"),
        (SINK + "{file: x, rotate: {}}", "2:17", "rotate needs 'size', 'every' or both"),
        (SINK + "{file: x, rotate: {size: 0}}", "2:32", "must be more than 0"),
        (SINK + "{file: x, on_slow: wait}", "2:26", "expected block, drop, disconnect or spill, got 'wait'"),
        (SINK + "{file: x, on_slow: {policy: dorp}}", "2:35", "did you mean 'drop'?"),
        (SINK + "{file: x, on_slow: {policy: drop, max: 1KB}}", "2:41", "'max' belongs to policy spill, this one is drop"),
        (SINK + "{file: x, on_slow: {directory: d}}", "2:27", "'directory' belongs to policy spill, and no policy is given"),
        (SINK + "{file: x, on_slow: {policy: block, then: drop}}", "2:42", "'then' belongs to policy spill"),
        (SINK + "{file: x, on_slow: {policy: block, align: 188}}", "2:42", "'align' belongs to policy drop"),
        (SINK + "{file: x, on_slow: {policy: drop, align: 0}}", "2:48", "must be more than 0"),
        (SINK + "{file: x, on_slow: {after: soon}}", "2:34", "expected a duration such as 1.5s, got 'soon'"),
        (SOURCE + "{listn: 'tcp://:1', file: x}", "2:10", "unknown key 'listn'; did you mean 'listen'?"),
        (SOURCE + "{listen: 'tcp://:1', limits: {idle: 0s}}", "2:45", "must be more than 0, got '0s'"),
        (SOURCE + "{listen: 'tcp://:1', limits: {connections: 0}}", "2:52", "must be at least 1"),
        (SOURCE + "{listen: 'tcp://:1', limits: {allow: [10.0.0.1/8]}}", "2:47", "did you mean '10.0.0.0/8'?"),
        (SOURCE + "{listen: 'tcp://:1', limits: {allow: [home]}}", "2:47", "expected an IP address or a network"),
        (SOURCE + "{listen: 'tcp://:1', limits: {allow: 10.0.0.0/8}}", "2:46", "expected a list, got '10.0.0.0/8'"),
        (SOURCE + "{listen: 'unix:///x', limits: {deny: []}}", "2:40", "'deny' applies to sources that listen on tcp only"),
        (SOURCE + "{file: x, limits: {idle: 1s}}", "2:19", "'limits' applies to sources that listen or connect only"),
        (SOURCE + "{connect: 'tcp://a:1', connections: one}", "2:32", "'connections' applies to sources that listen only"),
        (SOURCE + "{listen: 'tcp://:1', connections: two}", "2:43", "expected each or one, got 'two'"),
        (SOURCE + "{file: x, append: true}", "2:19", "unknown key 'append'"),
        (SINK + "x\nreplies: [meter]", "3:1", "'replies' needs 'duplex: true'"),
        (SINK + "x\nmethod: zerocopy", "3:9", "expected auto, zero-copy or copy, got 'zerocopy'; did you mean 'zero-copy'?"),
        (SINK + "x\nstages: {meter: {}}", "3:9", "expected a list, got a mapping"),
        (SINK + "x\nstages: [throtle: 1MB/s]", "3:10", "unknown stage 'throtle'; did you mean 'throttle'?"),
        (SINK + "x\nstages: [base]", "3:10", "unknown stage 'base'"),
        (SINK + "x\nstages: [throttle]", "3:10", "missing key 'rate'"),
        (SINK + "x\nstages: [throttle: 10MB]", "3:20", "did you mean 10MB/s?"),
        (SINK + "x\nstages: [throttle: {rate: 0MB/s}]", "3:27", "must be more than 0"),
        (SINK + "x\nwait_for_sinks: true", "3:17", "expected a duration such as 1.5s, got true"),
        (SINK + "x\nstages: [meter: {evry: 1s}]", "3:18", "did you mean 'every'?"),
        (SINK + "x\nstages: [limit: {}]", "3:10", "limit needs 'skip', 'stop' or both"),
        (SINK + "x\nstages: [checksum: md5]", "3:20", "expected sha256, blake3, xxh3 or crc32c"),
        (SINK + "x\nstages: [header: {text: a, file: b}]", "3:28", "'text' is given already"),
        (SINK + "x\nstages: [header: {text: '{name}'}]", "3:25", "unknown placeholder '{name}'"),
        (SINK + "x\nstages: [header: {base64: '?'}]", "3:27", "not base64"),
        (SINK + "x\nstages: [header]", "3:10", "header needs one of"),
        (SINK + "x\nstages: [{meter: {}, limit: {}}]", "3:10", "begin each with a dash"),
        (SINK + "x\nstages:\n- tee:\n  to: x", "4:3", "indent the settings of 'tee' under it"),
        (SINK + "x\nstages: [3]", "3:10", "expected a stage such as"),
        (SINK + "x\nstages: [tee: {to: {file: x, on_slow: drop}, on_slow: drop}]", "3:46", "a branch has one policy"),
        (SINK + "x\nstages: [tee: {to: x, stages: [tee: {to: 3}]}]", "3:42", "expected an address or a mapping"),
        ("source: x\nsink: 'tcp://a:1'\nduplex: true", "1:9", "duplex needs a socket at both ends; this source is 'x'"),
        ("source: 'tcp://:1'\nsink: {listen: 'tcp://:2'}\nduplex: true", "2:8", "duplex needs one peer at each end"),
        ("source: 'tcp://:1'\nsink: {connect: 'tcp://a:2', peer_eof: close}\nduplex: true", "2:30", "one-way sinks"),
        ("source: {listen: 'tcp://:1', connections: each}\nsink: {listen: 'tcp://:2'}", "1:43", "write 'one'"),
    ],
)  # fmt: skip
def test_wrong_routes(text: str, place: str, said: str) -> None:
    """Each slip is reported alone, at its key or value, in words that tell what to write."""
    ((spot, message),) = at(text)
    assert said in message
    assert spot == place


def test_waiting_for_sinks_is_a_duration() -> None:
    """`wait_for_sinks` says for how long; left out or empty, nothing is waited for."""
    assert route("source: '-'\nsink: 'null:'\nwait_for_sinks: 10s").wait_for_sinks == 10.0
    assert route("source: '-'\nsink: 'null:'\nwait_for_sinks:").wait_for_sinks is None
    assert route("source: '-'\nsink: 'null:'").wait_for_sinks is None


def test_every_problem_is_reported_at_once_in_the_order_of_the_text() -> None:
    """Text, keys, values, stages deep inside and clashes between routes come in one report."""
    text = """\
engines: 0
engines: 1
routes:
  a:
    source: {listen: "tcp://127.0.0.1:9000", limts: {}}
    stages:
      - tee: {to: {listen: "tcp://:9001"}, stages: [{throttle: {rate: x}}, metr]}
    sink: "tcp://h:99999"
    replies: [meter]
  b:
    source: "tcp://:9000"
    sink: {listen: "tcp://127.0.0.1:9001"}
  c:
    source: "tcp://127.0.0.1:9000"
    sink: {listen: "tcp://[::1]:9001"}
"""
    assert [line.split(": ", 1)[0] for line in problems(text, "x.yaml")] == [
        "x.yaml:1:10",
        "x.yaml:2:1",
        "x.yaml:5:46",
        "x.yaml:7:71",
        "x.yaml:7:76",
        "x.yaml:8:11",
        "x.yaml:9:5",
        "x.yaml:14:13",
    ]


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("tcp://127.0.0.1:9", "tcp://127.0.0.1:9", True),
        ("tcp://127.0.0.1:9", "tcp://:9", True),
        ("tcp://[::]:9", "tcp://127.0.0.1:9", True),
        ("tcp://0.0.0.0:9", "tcp://127.0.0.1:9", True),
        ("tcp://0.0.0.0:9", "tcp://[::1]:9", False),
        ("tcp://127.0.0.1:9", "tcp://127.0.0.2:9", False),
        ("tcp://127.0.0.1:9", "tcp://127.0.0.1:8", False),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", False),
        ("unix:///x", "unix:///x", True),
        ("unix:///x", "unix://@x", False),
    ],
)
def test_two_listeners_on_one_address(one: str, other: str, clash: bool) -> None:
    """What the kernel would refuse to bind a second time is refused before anything is bound."""
    text = f"routes:\n  a: {{source: '{one}', sink: 'null:'}}\n  b: {{source: '-', sink: {{listen: '{other}'}}}}\n"
    if not clash:
        assert isinstance(loads(text), Config)
        return
    (line,) = problems(text)
    assert line.startswith(f"f:3:35: routes.b.sink.listen: {other} is listened on by route 'a' already")


def test_the_admin_sockets_count_as_listeners() -> None:
    """A route cannot take the address of the admin server."""
    text = "admin: {http: 'tcp://127.0.0.1:9'}\nroutes: {a: {source: 'tcp://:9', sink: 'null:'}}\n"
    assert problems(text) == [
        "f:2:22: routes.a.source: tcp://:9 is listened on by admin http already as tcp://127.0.0.1:9"
    ]


# Bad input: files


def test_a_file_that_is_missing_or_a_directory(tmp_path: Path) -> None:
    """The path, the reason and what to do are in one line."""
    for path, said in (
        (tmp_path / "none.yaml", "No such file or directory (ENOENT)"),
        (tmp_path, "Is a directory (EISDIR)"),
    ):
        with pytest.raises(ConfigErrors) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: cannot read it: {said}; ")
    assert issubclass(ConfigErrors, RelayError)


def test_a_file_without_permission(tmp_path: Path) -> None:
    """A file that may not be read is named, with whose permission is needed."""
    path = tmp_path / "c.yaml"
    path.touch(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(
            ConfigErrors, match=r"Permission denied \(EACCES\); let the user that runs relay read it"
        ):
            load(path)
    finally:
        os.seteuid(user)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    """The first byte that is wrong is shown with its line and column, counted in characters."""
    path = tmp_path / "c.yaml"
    path.write_bytes("routes:\n  \u00e9".encode() + b"\xff: 1\n")
    with pytest.raises(ConfigErrors) as caught:
        load(path)
    assert str(caught.value) == f"{path}:2:4: not UTF-8: byte 0xff; save the file as UTF-8"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    """A file saved with a mark at its beginning reads like any other."""
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + R.encode())
    assert load(path) == loads(R)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    """100 MB are refused by their size, which is named together with the limit."""
    path = tmp_path / "c.yaml"
    path.touch()
    os.truncate(path, 100 << 20)
    with pytest.raises(ConfigErrors, match="the limit is 4 MiB, this is 100 MiB"):
        load(path)


def test_an_endless_device_is_read_up_to_the_limit() -> None:
    """What has no size is not read for ever."""
    with pytest.raises(ConfigErrors, match="the limit is 4 MiB"):
        load("/dev/zero")
    with pytest.raises(ConfigErrors, match="the limit is 4 MiB"):
        loads(" " * (LARGEST + 1))


@pytest.mark.parametrize(
    ("options", "column", "said"),
    [
        ("append: true, rotate: 1h", 59, "logrotate"),
        ("rotate: 1h, sidecar: true", 57, "'sidecar' covers one file"),
        ("append: true, direct: true", 59, "whole blocks"),
    ],
)
def test_file_options_that_exclude_each_other(options: str, column: int, said: str) -> None:
    """Options of a file sink that cannot both hold are refused at the second one's key."""
    with pytest.raises(ConfigErrors) as caught:
        loads(f"routes: {{a: {{source: '-', sink: {{file: out, {options}}}}}}}")
    (error,) = caught.value.errors
    assert error.column == column
    assert said in str(error)
