"""Configurations that are wrong: every slip is refused at its key or value, in words that tell what to write."""

# ruff: noqa: E501 - each bad input, its place and its message stay on one line

from __future__ import annotations

import pytest
from route_texts import R, assert_refused, at, problems

from relay.config.load import loads
from relay.config.models import Config
from relay.errors import ConfigErrors


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
    assert_refused(R + text, place, said)


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
