"""The record of a finished session: what moved, how, how long it took, who ended it and why."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring as quoted
from typing import Any

from relay.units import show_size

STAYS = "; what was written stays"  # as errors of writing have it in their hints


@dataclass
class SinkRecord:
    """One sink's part. `result` is delivered or failed; `bytes` reached the sink, `lost` of these are known
    not to have arrived, `dropped` never left by policy, `backlog` waits in its log, `twice`
    were sent again after a connection broke. `reason` says why it ended when not by the stream. Of a duplex session:
    the `upstream` it had, in figures, how many `tries` that took, and who was `passed_over` with the reason."""

    sink: str
    address: str
    bytes: int
    seconds: float
    method: str
    result: str
    reason: str = ""
    lost: int = 0
    dropped: int = 0
    blocked_seconds: float = 0.0
    path: str = ""
    why_method: str = ""
    backlog: int = 0
    reconnects: int = 0
    twice: int = 0
    upstream: str = ""
    tries: int = 0
    passed_over: tuple[tuple[str, str], ...] = ()
    connects: tuple[float, ...] = ()  # how long each connect that went well took
    way: str = ""  # back: it took what came back on a duplex route

    def as_line(self, method: str, why: str = "", checksum: str = "") -> str:
        """The result for people, in one line: `method` is how its bytes crossed from the source on."""
        if not method:
            return f"{self.address}: {self.result}; {self.reason}"  # the source was never opened
        rate = show_size(self.bytes / max(self.seconds, 1e-9))
        name = self.path if self.path and self.result == "delivered" else self.address
        line = f"{name}: {self.bytes} bytes in {self.seconds:.2f} s ({rate}/s, {method}), {self.result}"
        if checksum:
            line += f", {checksum}"
        if why:
            line += f"; {method}: {why}"
        if self.dropped:
            line += f"; {self.dropped} bytes dropped"
        if self.lost:
            line += f"; {self.lost} bytes lost"
        if self.reason:
            line += f"; {self.reason}"
        if self.path.endswith(".part"):
            line = f"{line.removesuffix(STAYS)}{STAYS} in {self.path}"
        return line

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the figures always, words only where there are any."""
        found = {
            "sink": self.sink,
            "address": self.address,
            "bytes": self.bytes,
            "lost": self.lost,
            "dropped": self.dropped,
            "reconnects": self.reconnects,
            "seconds": round(self.seconds, 6),
            "method": self.method,
            "result": self.result,
        }
        for key in ("way", "reason", "backlog", "twice", "path", "why_method", "upstream", "tries"):
            if value := getattr(self, key):
                found[key] = value
        if self.passed_over:
            found["passed_over"] = [{"upstream": name, "why": why} for name, why in self.passed_over]
        if self.connects:
            found["connect_seconds"] = round(self.connects[-1], 6)
        if self.blocked_seconds > 0:
            found["blocked_seconds"] = round(self.blocked_seconds, 6)
        return found


@dataclass
class SessionRecord:
    """One stream from its first byte to the last sink's end. `ended_by` is source, sinks or relay. `measured`: what
    each way across cost, and which was chosen, where both were tried. `via`: the proxy that named the peer."""

    route: str
    id: str
    source: str
    peer: str
    bytes: int
    seconds: float
    method: str
    ended_by: str
    result: str
    reason: str = ""
    why_method: str = ""
    sinks: list[SinkRecord] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    source_failed: bool = False
    measured: dict[str, Any] = field(default_factory=dict)
    back: int | None = None  # of a duplex session: bytes from the sink that the source's kernel took
    back_lost: int = 0
    back_method: str = ""
    via: str = ""

    @property
    def failed_sinks(self) -> int:
        """How many sinks did not get their stream whole."""
        return sum(1 for sink in self.sinks if sink.result == "failed")

    @property
    def plain(self) -> bool:
        """Whether `as_json` says all there is, as of any duplex session without stages."""
        if self.back is None or len(self.sinks) != 1 or self.stages or self.measured or not self.peer:
            return False
        sink = self.sinks[0]
        return sink.seconds == self.seconds and not (sink.blocked_seconds or sink.why_method)

    def crossing(self, sink: SinkRecord) -> tuple[str, str]:
        """How bytes crossed from the source to `sink`, in one word, and why where that is worth saying."""
        if sink.method == "copy":
            return "copy", sink.why_method
        return self.method, self.why_method if self.method == "copy" else ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "route": self.route,
            "id": self.id,
            "source": self.source,
            "peer": self.peer,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 6),
            "method": self.method,
            "ended_by": self.ended_by,
            "result": self.result,
            "sinks": [sink.as_dict() for sink in self.sinks],
        }
        if self.back is not None:
            found["bytes_back"], found["lost_back"] = self.back, self.back_lost
            found["method_back"] = self.back_method
        for key in ("via", "reason", "why_method", "stages", "measured"):
            if value := getattr(self, key):
                found[key] = value
        return found

    def as_json(self) -> str:
        """`as_text` as its message, and the inside of `as_dict`, as JSON, of a session that is `plain`: one template
        costs a fifth of these."""
        sink, peer = self.sinks[0], self.peer
        message, route, source, where, upstream = _ends(
            self.route, self.source, sink.sink, sink.address, sink.upstream
        )
        whom, said, more = peer, "", ""
        if self.via:
            whom, more = f"{peer} via {self.via}", f', "via": "{self.via}"'
        if self.reason:
            reason = quoted(self.reason)
            said, more = f"; {reason[1:-1]}", f'{more}, "reason": {reason}'
        if self.why_method:
            more = f'{more}, "why_method": {quoted(self.why_method)}'
        if sink.tries:
            upstream = f'{upstream}, "tries": {sink.tries}'
        if sink.passed_over:
            said += quoted(_passed(sink))[1:-1]
            passed = [{"upstream": name, "why": why} for name, why in sink.passed_over]
            upstream = f'{upstream}, "passed_over": {_ENCODER.encode(passed)}'
        if sink.connects:
            upstream = f'{upstream}, "connect_seconds": {sink.connects[-1]:.6f}'
        there, back, took = self.bytes, self.back, f"{self.seconds:.6f}"
        result, ended_by = self.result, self.ended_by
        return (
            f"{message}{self.id} from {whom}: {there} B there and {back} B back in {self.seconds:.2f} s, {result}, "
            f'ended by {ended_by}{said}", {route}, "id": "{self.id}", {source}, "peer": "{peer}", '
            f'"bytes": {there}, "seconds": {took}, "method": "{self.method}", "ended_by": "{ended_by}", '
            f'"result": "{result}", "sinks": [{{{where}, "bytes": {sink.bytes}, "lost": {sink.lost}, '
            f'"dropped": 0, "reconnects": 0, "seconds": {took}, "method": "{sink.method}", '
            f'"result": "{sink.result}"{upstream}}}], "bytes_back": {back}, "lost_back": {self.back_lost}, '
            f'"method_back": "{self.back_method}"{more}'
        )

    def as_text(self) -> str:
        """One line for people."""
        if self.back is not None:
            said = (
                f"{self.route} #{self.id} from {self._whom}: {self.bytes} B there and {self.back} B back in "
                f"{self.seconds:.2f} s, {self.result}, ended by {self.ended_by}"
            )
            said = "; ".join([said, *([self.reason] if self.reason else [])])
            said += "".join(_passed(sink) for sink in self.sinks)
            return "; ".join([said, *self._parts()]) if len(self.sinks) > 1 or self.stages else said
        rate = show_size(self.bytes / self.seconds) if self.seconds > 0 else "0 B"
        parts = [
            f"{self.route} #{self.id} from {self._whom}: {show_size(self.bytes)} "
            f"in {self.seconds:.2f} s ({rate}/s, {self.method}), {self.result}, ended by {self.ended_by}"
        ]
        if self.reason:
            parts.append(self.reason)
        return "; ".join([*parts, *self._parts()])

    @property
    def _whom(self) -> str:
        peer = self.peer or self.source
        return f"{peer} via {self.via}" if self.via else peer

    def _parts(self) -> list[str]:
        """What sinks and stages have to say, for people."""
        parts = []
        for sink in self.sinks:
            way = f"{sink.way} " if sink.way else ""
            text = f"{way}{sink.sink} {show_size(sink.bytes)} {sink.method} {sink.result}"
            if sink.path:
                text += f" {sink.path}"
            if sink.dropped:
                text += f", {sink.dropped} bytes dropped"
            if sink.lost:
                text += f", {sink.lost} bytes lost"
            if sink.reason:
                text += f" ({sink.reason})"
            parts.append(text)
        parts += [
            f"{stage['stage']} {stage['algorithm']} {stage['digest']}"
            for stage in self.stages
            if "digest" in stage
        ]
        return parts


def _passed(sink: SinkRecord) -> str:
    """For people: which upstream it was, where others were passed over."""
    if not sink.passed_over:
        return ""
    passed = ", ".join(f"{name} ({why})" for name, why in sink.passed_over)
    return f"; {f'to {sink.upstream}, ' if sink.upstream else ''}passed over: {passed}"


_ENCODER = json.JSONEncoder(ensure_ascii=False)


@lru_cache(256)
def _ends(route: str, source: str, sink: str, address: str, upstream: str) -> tuple[str, str, str, str, str]:
    """What is the same in the JSON of every session of a duplex route that went to that upstream."""
    return (
        f'"message": {quoted(route)[:-1]} #',
        f'"route": {quoted(route)}',
        f'"source": {quoted(source)}',
        f'"sink": {quoted(sink)}, "address": {quoted(address)}',
        f', "upstream": {quoted(upstream)}' if upstream else "",
    )
