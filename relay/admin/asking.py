"""What the commands that talk to a running relay do: ask, show, and give the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from relay.admin.client import Answer, NoAnswer, ask
from relay.admin.where import place_to_ask
from relay.errors import UsageError
from relay.units import show_size

RELOADING = 70.0  # seconds: a little more than the relay itself waits


def health(admin: str | None, *, ready: bool, patience: float) -> int:
    """0 when the relay answers that it is alive (or ready), 1 with the reason on stderr when not."""
    try:
        answer = ask(place_to_ask(admin), "/readyz" if ready else "/livez", patience=patience)
    except NoAnswer as error:
        print(f"relay: {error}", file=sys.stderr)
        return 1
    if answer.status == 200:
        print(answer.text)
        return 0
    print(f"relay: {answer.text}", file=sys.stderr)
    return 1


def status(admin: str | None, *, as_json: bool) -> int:
    """Shows how everything stands."""
    data = checked(ask(place_to_ask(admin), "/api/v1/status")).data()
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(data)))
    return 0


def reload(admin: str | None) -> int:
    """Tells it to read its configuration again, and waits for the outcome: 0, or 3 when it was refused."""
    answer = ask(place_to_ask(admin), "/api/v1/reload", {}, patience=RELOADING)
    if answer.status not in (200, 409, 504):
        checked(answer)
    data = answer.data()
    for problem in data.get("problems", ()):
        print(problem, file=sys.stderr)
    if answer.status == 200:
        print(f"{data['result']}: {data['words']}")
        return 0
    print(f"relay: {data['words']}", file=sys.stderr)
    return 3 if data.get("result") == "refused" else 1


def drain(admin: str | None) -> int:
    """Tells it to end when what is under way has ended."""
    print(checked(ask(place_to_ask(admin), "/api/v1/drain", {})).data()["words"])
    return 0


def change(admin: str | None, route: str, stage: str, values: list[str]) -> int:
    """Other settings for a stage of a running relay: 0, or 2 when there is no such thing, with what there is."""
    given = {}
    for value in values:
        key, equals, said = value.partition("=")
        if not equals or not key:
            raise UsageError(f"{value!r} is no KEY=VALUE; write rate=5MB/s, for example")
        given[key] = said
    answer = ask(place_to_ask(admin), "/api/v1/set", {"route": route, "stage": stage, "values": given})
    if answer.status in (400, 404):
        raise UsageError(answer.data()["words"])
    print(checked(answer).data()["words"])
    return 0


def checked(answer: Answer) -> Answer:
    """The answer, if it is one. Raises NoAnswer with what was said instead."""
    if answer.status != 200:
        raise NoAnswer(f"the relay answered {answer.status}: {answer.text[:500]}")
    return answer


# -- in words


def lines(data: dict[str, Any]) -> Iterator[str]:
    """The status for people."""
    held = data["resources"]
    pages = held["pipe_pages_limit"]
    yield (
        f"relay {data['version']}, process {data['pid']}: {data['state']} for {_time(data['uptime'])}; "
        f"{held['fds']} of {held['fds_limit']} descriptors, {held['pipe_pages']} pipe pages"
        + (f" of {pages}" if pages else "")
    )
    for engine in data["engines"]:
        busy = "" if engine["busy"] is None else f"{engine['busy'] * 100:.0f} % busy, "
        lag = "no answer" if engine["lag"] is None else f"answers in {engine['lag'] * 1e3:.1f} ms"
        yield f"  {engine['name']}: {busy}{lag}"
    for route in data["routes"]:
        yield from route_lines(route)
    if data["recent"]:
        yield "last sessions:"
        yield from (f"  {session['text']}" for session in data["recent"][:5])


def route_lines(route: dict[str, Any]) -> Iterator[str]:
    """One route."""
    listening = f" on {', '.join(route['listening'])}" if route["listening"] else f" from {route['source']}"
    over = ", ".join(f"{count} {result}" for result, count in route["sessions"].items() if count)
    late = " (an engine did not answer: as it was before)" if route["unanswered"] else ""
    yield f"{route['name']}: {route['state']}{listening}{late}"
    waiting = f", {route['waiting']} waiting" if route["waiting"] else ""
    refused = f", {route['refused']} refused" if route["refused"] else ""
    yield (
        f"  {route['streams']} streams{waiting}{refused}; {show_size(route['bytes'])} in{rate(route['rate'])}"
        + (f", {show_size(route['bytes_back'])} back{rate(route['rate_back'])}" if route["duplex"] else "")
        + (f"; over: {over}" if over else "")
    )
    if route["failed"]:
        yield f"  failed: {route['failed']}"
    if stages := [f"{each['stage']} {stage_words(each['now'])}" for each in route["stages"] if each["now"]]:
        yield f"  stages: {'; '.join(stages)}"
    for sink in route["sinks"]:
        yield f"  -> {sink_words(sink)}"
    if len(route["upstreams"]) > 1 or any(one["state"] != "up" for one in route["upstreams"]):
        yield from (f"     {upstream_words(one)}" for one in route["upstreams"])


def stage_words(now: dict[str, Any]) -> str:
    """What can be changed of a stage, as it is, in the form in which it is set."""
    return " ".join(f"{key}={value}" for key, value in now.items())


def upstream_words(one: dict[str, Any]) -> str:
    """An upstream of a duplex route in one line."""
    parts = [f"{one['upstream']}: {one['state']} for {_time(one['seconds'])}", f"{one['sessions']} sessions"]
    if one["fails"]:
        parts.append(f"{one['fails']} failed connects")
    if one["failed_checks"]:
        parts.append(f"{one['failed_checks']} failed checks")
    return ", ".join([*parts, *([one["why"]] if one["why"] else [])])


def sink_words(sink: dict[str, Any]) -> str:
    """A sink in one line."""
    name = sink["sink"] if sink["sink"] == sink["address"] else f"{sink['sink']} ({sink['address']})"
    parts = [f"{name}: {sink['state']}", f"{show_size(sink['bytes'])}{rate(sink['rate'])}"]
    if sink["method"]:
        parts.append(sink["method"])
    if sink["subscribers"] is not None:
        parts.append(f"{sink['subscribers']} subscribers")
    for key, words in (("backlog", "waiting"), ("dropped", "dropped"), ("lost", "lost")):
        if sink[key]:
            parts.append(f"{show_size(sink[key])} {words}")
    if sink["spill"] and sink["spill"]["bytes"]:
        parts.append(f"oldest for {_time(sink['spill']['age'])}")
    if sink["blocked_seconds"] >= 0.01:
        parts.append(f"full for {_time(sink['blocked_seconds'])}")
    if sink["reconnects"]:
        parts.append(f"{sink['reconnects']} reconnects")
    if sink["reason"]:
        parts.append(sink["reason"])
    return ", ".join(parts)


def rate(value: float | None) -> str:
    """` (so much a second)`, or nothing."""
    return "" if value is None else f" ({show_size(value)}/s)"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
