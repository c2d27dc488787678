"""The status page: plain HTML without scripts, nothing in it comes from elsewhere, everything that others named is
escaped. A relay with many routes has them all in the table, and the pictures of the first; each route has a page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from urllib.parse import quote

from relay.admin.picture import picture
from relay.admin.status import RouteStatus, SessionStatus, SinkStatus, Status, StreamStatus
from relay.duplex.upstream import UpstreamState
from relay.planning.hops import RoutePlan
from relay.units import show_size

PICTURES = 40  # routes whose pictures are on the first page
EVERY = 5  # seconds after which a browser asks again
WORST = ("failed", "held", "draining", "starting", "flowing", "waiting", "done")

STYLE = """
:root{--ink:#1c2430;--dim:#5d6977;--paper:#fff;--line:#d4dae2;--box:#f4f6f9;--good:#2f8f4e;--idle:#8793a1;
--slow:#c77700;--bad:#c0362c;--run:#2b6cb0}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--dim:#97a3b2;--paper:#12161c;--line:#333c48;--box:#1b212a;
--good:#57c27d;--idle:#77828f;--slow:#f0a93b;--bad:#ef6a5f;--run:#63a7f0}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:1.5rem auto;max-width:1400px;
padding:0 1rem}
h1{font-size:1.25rem;margin:0}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}p{margin:.2rem 0;color:var(--dim)}
table{border-collapse:collapse;width:100%;margin:.5rem 0;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.22rem .6rem .22rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--dim);font-weight:500}td.n,th.n{text-align:right}td.wrap{overflow-wrap:anywhere}
a{color:var(--run)}.scroll{overflow-x:auto}
.state{font-weight:600}.flowing,.ready,.open,.delivered{color:var(--good)}.held,.slow,.draining,.partial,.opening,
.starting,.finishing{color:var(--slow)}.failed,.away{color:var(--bad)}.waiting,.done,.none,.finished{color:var(--idle)}
svg.pipeline{display:block;margin:.4rem 0;max-width:none}
.box rect{fill:var(--box);stroke:var(--idle);stroke-width:1.5}.box text{font:11px system-ui,sans-serif;fill:var(--ink)}
.box .kind{fill:var(--dim)}.box.flowing rect,.box.open rect{stroke:var(--good)}
.box.slow rect,.box.opening rect,.box.finishing rect{stroke:var(--slow);stroke-width:2.5}
.box.away rect,.box.failed rect{stroke:var(--bad);stroke-width:2.5}
.edge{fill:none;stroke:var(--idle);stroke-width:1.5}.edge.flow{stroke:var(--run);stroke-width:2.5;stroke-dasharray:7 5;
animation:flow .9s linear infinite}.tip{fill:var(--idle)}.method{font:10px system-ui,sans-serif;fill:var(--dim);
text-anchor:middle}@keyframes flow{to{stroke-dashoffset:-12}}
@media(prefers-reduced-motion:reduce){.edge.flow{animation:none}}
"""


def page(status: Status, plans: Mapping[str, RoutePlan], route: str = "") -> str:
    """The page of all routes, or of the one of that name."""
    shown = [one for one in status.routes if not route or one.name == route]
    title = f"relay: {route}" if route else "relay"
    body = [*_head(status), *(_engines(status) if not route else ('<p><a href="/">all routes</a></p>',))]
    if route and not shown:
        body.append(f"<p>There is no route {escape(route)}.</p>")
    if not route:
        body += _table(status.routes)
    worst = sorted(shown, key=lambda one: WORST.index(one.state))
    for one in worst[:PICTURES]:
        body += _route(one, plans.get(one.name), whole=bool(route))
    if len(worst) > PICTURES:
        body.append(
            f"<p>{len(worst) - PICTURES} more routes are in the table; each has a page of its own.</p>"
        )
    body += _sessions(session for session in status.recent if not route or session.route == route)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="{EVERY}">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _head(status: Status) -> Iterator[str]:
    held = status.resources
    pages = f" of {held.pipe_pages_limit}" if held.pipe_pages_limit else ""
    yield f'<h1>relay {escape(status.version)} <span class="state {status.state}">{status.state}</span></h1>'
    yield (
        f"<p>process {status.pid}, up for {_time(status.uptime)}, {escape(status.config)}; "
        f"{held.fds} of {held.fds_limit} descriptors, {held.pipe_pages}{pages} pipe pages, "
        f"{show_size(held.memory)} of memory; seen at {_clock(status.at)}</p>"
    )


def _engines(status: Status) -> Iterator[str]:
    words = []
    for engine in status.engines:
        busy = "" if engine.busy is None else f"{engine.busy * 100:.0f} % busy, "
        lag = "no answer" if engine.lag is None else f"lag {engine.lag * 1e3:.1f} ms"
        words.append(f"{escape(engine.name)}: {busy}{lag}")
    yield f"<p>{'; '.join(words)}</p>"


def _table(routes: Iterable[RouteStatus]) -> Iterator[str]:
    yield '<div class="scroll"><table id="routes"><thead><tr><th>route<th>state<th>listens on'
    yield '<th class="n">streams<th class="n">in<th class="n">rate<th class="n">waits<th class="n">dropped'
    yield '<th class="n">lost<th class="n">sessions<th class="n">failed</tr></thead><tbody>'
    for route in routes:
        waits = sum(sink.backlog for sink in route.sinks)
        dropped = sum(sink.dropped for sink in route.sinks)
        lost = sum(sink.lost for sink in route.sinks)
        where = ", ".join(route.listening) or route.source
        yield (
            f'<tr><td><a href="/?route={quote(route.name, safe="", errors="replace")}">{escape(route.name)}</a>'
            f'<td class="state {route.state}">{route.state}{" (late)" if route.unanswered else ""}'
            f'<td class="wrap">{escape(where)}<td class="n">{route.streams}'
            f'<td class="n">{show_size(route.bytes)}<td class="n">{_rate(route.rate)}'
            f'<td class="n">{_size(waits)}<td class="n">{_size(dropped)}<td class="n">{_size(lost)}'
            f'<td class="n">{sum(route.sessions.values())}<td class="n">{route.sessions.get("failed", 0) or ""}</tr>'
        )
    yield "</tbody></table></div>"


def _route(route: RouteStatus, plan: RoutePlan | None, *, whole: bool) -> Iterator[str]:
    yield f'<h2>{escape(route.name)} <span class="state {route.state}">{route.state}</span></h2>'
    if route.failed:
        yield f'<p class="failed">{escape(route.failed)}</p>'
    if plan is not None:
        yield f'<div class="scroll">{picture(plan, route)}</div>'
    if plan is None or whole:
        yield from _sinks(route.sinks)
    if len(route.upstreams) > 1:
        yield from _upstreams(route.upstreams)
    if whole:
        yield from _streams(route.details)


def _upstreams(upstreams: Iterable[UpstreamState]) -> Iterator[str]:
    yield '<table class="upstreams"><thead><tr><th>upstream<th>of<th>state<th class="n">sessions<th class="n">served'
    yield '<th class="n">failed<th>why</tr></thead><tbody>'
    for one in upstreams:
        colour = "open" if one.state == "up" else "away"
        yield (
            f'<tr><td>{escape(one.upstream)}<td>{escape(one.address)}<td class="state {colour}">{one.state}'
            f'<td class="n">{one.sessions}<td class="n">{one.served}<td class="n">{one.fails + one.failed_checks}'
            f'<td class="wrap">{escape(one.why)}</tr>'
        )
    yield "</tbody></table>"


def _sinks(sinks: Iterable[SinkStatus]) -> Iterator[str]:
    yield '<div class="scroll"><table class="sinks"><thead><tr><th>sink<th>state<th>policy<th>method<th class="n">sent'
    yield '<th class="n">rate<th class="n">waits<th class="n">full for<th class="n">dropped<th class="n">lost'
    yield '<th class="n">reconnects<th>reason</tr></thead><tbody>'
    for sink in sinks:
        yield (
            f'<tr><td class="wrap">{escape(sink.sink)}<td class="state {sink.state}">{sink.state}'
            f"<td>{escape(sink.policy)}<td>{escape(sink.method)}"
            f'<td class="n">{show_size(sink.bytes)}<td class="n">{_rate(sink.rate)}<td class="n">{_size(sink.backlog)}'
            f'<td class="n">{_time(sink.blocked_seconds) if sink.blocked_seconds else ""}'
            f'<td class="n">{_size(sink.dropped)}<td class="n">{_size(sink.lost)}'
            f'<td class="n">{sink.reconnects or ""}<td class="wrap">{escape(sink.reason)}</tr>'
        )
    yield "</tbody></table></div>"


def _streams(streams: Iterable[StreamStatus]) -> Iterator[str]:
    live = [stream for stream in streams if stream.id]
    if not live:
        return
    yield '<table class="streams"><thead><tr><th>stream<th>from<th class="n">for<th class="n">bytes<th class="n">rate'
    yield "<th>method<th>why</tr></thead><tbody>"
    for stream in live:
        yield (
            f'<tr><td>#{escape(stream.id)}<td class="wrap">{escape(stream.peer)}<td class="n">{_time(stream.seconds)}'
            f'<td class="n">{show_size(stream.bytes)}<td class="n">{_rate(stream.rate)}'
            f"<td>{escape(stream.method)}<td>{escape(stream.why_method)}</tr>"
        )
    yield "</tbody></table>"


def _sessions(sessions: Iterable[SessionStatus]) -> Iterator[str]:
    rows = list(sessions)
    if not rows:
        return
    yield '<h2>Last sessions</h2><div class="scroll"><table id="sessions"><thead><tr><th>ended<th>route<th>id<th>from'
    yield '<th class="n">bytes<th class="n">took<th>method<th>result<th>ended by<th>reason</tr></thead><tbody>'
    for one in rows:
        back = "" if one.bytes_back is None else f" / {show_size(one.bytes_back)}"
        yield (
            f"<tr><td>{_clock(one.at)}<td>{escape(one.route)}<td>#{escape(one.id)}"
            f'<td class="wrap">{escape(one.peer)}<td class="n">{show_size(one.bytes)}{back}'
            f'<td class="n">{_time(one.seconds)}<td>{escape(one.method)}<td class="state {escape(one.result)}">'
            f'{escape(one.result)}<td>{escape(one.ended_by)}<td class="wrap">{escape(one.reason)}</tr>'
        )
    yield "</tbody></table></div>"


def _size(count: int) -> str:
    return show_size(count) if count else ""


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{show_size(rate)}/s"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at))
