"""Plans: methods and reasons, who can hold whom, limits."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from planned import PLAIN, planned, planned_route

from relay import needs
from relay.planning import drawing
from relay.planning.hops import RoutePlan, hops


def words(route: RoutePlan) -> dict[str, str]:
    """Who holds the source, and how."""
    return {hold.who: hold.words for hold in route.holds}


# -- methods and reasons


def test_every_hop_has_a_method_and_a_reason() -> None:
    """A route's tree names, hop by hop, how bytes leave it and why."""
    route = planned_route("source: 'tcp://:1', stages: [meter, tee: {to: f}, checksum], sink: 'tcp://h:2'")
    assert [(hop.role, hop.kind, hop.choice.method) for hop in hops(route)] == [
        ("source", "tcp", "splice"),
        ("stage", "meter", "splice"),
        ("stage", "tee", "tee"),
        ("sink", "file", "splice"),
        ("stage", "checksum", "tee"),
        ("sink", "digest", "copy"),
        ("sink", "tcp", "splice"),
    ]
    assert all(hop.choice.reason for hop in hops(route))


@pytest.mark.parametrize(
    ("body", "method"),
    [
        ("source: f, sink: 'tcp://h:1'", "sendfile"),
        ("source: f, sink: {connect: 'tcp://h:1', on_slow: drop}", "splice"),
        ("source: f, stages: [meter], sink: 'tcp://h:1'", "splice"),
        ("source: f, sink: {listen: 'tcp://:1'}", "splice"),
        ("source: f, sink: g", "splice"),
        ("source: f, sink: 'tcp://h:1', method: copy", "copy"),
    ],
)
def test_a_file_goes_straight_to_one_socket(body: str, method: str) -> None:
    """sendfile is for a file and one socket with nothing between, and no subscribers to come."""
    assert planned_route(body).source.choice.method == method


def test_what_copies_says_why() -> None:
    """A forced method, a refused call and a file that is appended to are copied, with the reason."""
    forced = planned_route("source: 'tcp://:1', stages: [tee: {to: f}], sink: 'tcp://h:2', method: copy")
    assert {hop.choice.method for hop in hops(forced)} == {"copy"}
    assert {hop.choice.reason for hop in hops(forced)} == {"asked for by method: copy"}
    refused = planned_route("source: 'tcp://:1', sink: 'tcp://h:2'", replace(PLAIN, splice=errno.ENOSYS))
    assert [hop.choice.reason for hop in hops(refused)] == ["splice is refused here (ENOSYS)"] * 2
    appended = planned_route("source: 'tcp://:1', sink: {file: f, append: true}").chain[0].choice
    assert appended.method == "copy"
    assert "append" in appended.reason


def test_what_only_opening_tells_is_not_sure() -> None:
    """stdin, stdout and inherited descriptors may turn out to be terminals: the plan says so."""
    route = planned_route("source: '-', stages: [tee: {to: 'fd://5'}], sink: 'null:'")
    assert [hop.sure for hop in hops(route)] == [False, True, False, True]
    assert "known when it is opened" in drawing.as_text(planned("routes: {a: {source: '-', sink: x}}"))


# -- who can hold whom


def test_a_sink_that_blocks_holds_everybody() -> None:
    """block says that the source and everybody else wait, and after which time relay warns."""
    said = words(
        planned_route("source: 'tcp://:1', sink: {connect: 'tcp://h:2', on_slow: {policy: block, after: 3s}}")
    )
    assert said["tcp://h:2"] == (
        "holds the source, and with it everybody on the route, for as long as it is slow; "
        "after 3 s relay warns"
    )


def test_other_policies_let_go_in_time() -> None:
    """drop and disconnect hold until their time has passed, by their defaults 200 ms and 5 s."""
    route = planned_route(
        "source: 'tcp://:1', stages: [tee: {name: d, to: 'tcp://h:2', on_slow: drop}], sink: {listen: 'tcp://:3'}"
    )
    assert [(hold.who, hold.seconds, hold.then) for hold in route.holds] == [
        ("d", 0.2, "drop"),
        ("each subscriber of tcp://:3", 5.0, "disconnect"),
    ]
    assert "until its backlog of" in words(route)["d"]


def test_a_branchs_policy_covers_all_that_is_in_it() -> None:
    """What blocks inside a branch holds the source only until the branch's own policy lets go."""
    inner = "tee: {name: in, to: f}"
    route = planned_route(
        "source: 'tcp://:1', sink: 'null:', stages: [tee: {name: out, to: 'tcp://h:2', "
        f"stages: [throttle: 1MB/s, {inner}], on_slow: {{policy: drop, after: 2s}}}}]"
    )
    held = {hold.who: (hold.seconds, hold.by, hold.then) for hold in route.holds}
    assert held["throttle"] == held["in"] == (2.0, "out", "drop")
    assert held["null:"][0] is None
    blocking = planned_route(
        "source: 'tcp://:1', sink: 'null:', stages: [tee: {to: f, stages: [throttle: 1MB/s]}]"
    )
    assert (
        words(blocking)["throttle"] == "holds the source to 976.6 KiB/s, and with it everybody on the route"
    )


def test_limits_of_connections_multiply() -> None:
    """A route with a limit is planned at it: so many streams, or one stream and the rest waiting."""
    each = planned_route("source: {listen: 'tcp://127.0.0.1:1', limits: {connections: 7}}, sink: 'tcp://h:1'")
    assert (each.turns, each.streams, each.waiting) == ("each", 7, 0)
    assert each.at_limit == each.standing + each.stream.times(7)
    one = planned_route("source: {listen: 'tcp://127.0.0.1:1', limits: {connections: 7}}, sink: f")
    assert (one.turns, one.streams, one.waiting) == ("one", 1, 6)
    assert one.at_limit == one.standing + one.stream + needs.Need(6)
    unlimited = planned_route("source: {listen: 'tcp://127.0.0.1:1'}, sink: 'tcp://h:1'")
    assert unlimited.streams is None
    assert unlimited.at_limit == unlimited.standing + unlimited.stream


def test_pages_follow_what_the_machine_grants() -> None:
    """An unprivileged user's pipes are no larger than pipe-max-size, in halving steps down to 64 KiB."""
    assert needs.granted(1 << 20, PLAIN) == 1 << 20
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=1 << 18)) == 1 << 18
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=4096 * 20)) == 65536
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=8192)) == 8192
    assert needs.granted(1 << 20, replace(PLAIN, pipe_max=4096, privileged=True)) == 1 << 20
