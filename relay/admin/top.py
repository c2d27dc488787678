"""`relay top`: what flows in a running relay, drawn again and again on a terminal."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from relay.admin.asking import checked, rate, sink_words
from relay.admin.client import NoAnswer, ask
from relay.admin.where import place_to_ask
from relay.endpoints.address import Address
from relay.errors import UsageError
from relay.units import show_size

HISTORY = 24  # looks that the little curve of a route shows
GIVEN_UP = 3  # looks in a row without an answer after which it ends
BARS = " ▁▂▃▄▅▆▇█"
COLOURS = {"flowing": "green", "held": "yellow", "failed": "red", "draining": "yellow", "starting": "yellow"}


class Screen:
    """Draws one status after another; remembers the rates of each route."""

    def __init__(self) -> None:
        self._history: dict[str, deque[float]] = {}

    def frame(self, data: dict[str, Any], height: int) -> Group:
        """What the terminal shows: the process, its routes, the sinks of those that fit, the last sessions."""
        held = data["resources"]
        pages = f" of {held['pipe_pages_limit']}" if held["pipe_pages_limit"] else ""
        busy = ", ".join(
            f"{each['name']} {(each['busy'] or 0) * 100:.0f} %"
            + ("" if each["lag"] is None else f" (lag {each['lag'] * 1e3:.1f} ms)")
            for each in data["engines"]
        )
        head = Text(f"relay {data['version']}  {data['state']}  up {data['uptime']:.0f} s  ", style="bold")
        line = Text(
            f"{held['fds']} of {held['fds_limit']} descriptors, {held['pipe_pages']}{pages} pipe pages; {busy}"
        )
        routes = sorted(data["routes"], key=lambda each: (each["state"] == "waiting", -(each["rate"] or 0)))
        room = max(1, height - 8)
        table = Table(box=None, pad_edge=False, expand=True)
        for title in ("route", "state", "streams", "in", "rate", "", "waits", "dropped", "lost", "sessions"):
            right = title in ("streams", "in", "rate", "waits", "dropped", "lost", "sessions")
            table.add_column(title, justify="right" if right else "left", no_wrap=True)
        shown = routes[: max(1, room // 2)]
        for route in shown:
            table.add_row(*self._row(route))
        sinks: list[Text] = []
        for route in shown:
            for sink in route["sinks"]:
                colour = {"open": "", "slow": "yellow", "away": "red", "failed": "red"}.get(
                    sink["state"], "dim"
                )
                sinks.append(Text(f"  {route['name']} -> {sink_words(sink)}", style=colour, no_wrap=True))
        left = room - len(shown)
        more = (
            Text(f"and {len(routes) - len(shown)} more routes", style="dim")
            if len(routes) > len(shown)
            else Text("")
        )
        last = [Text(f"  {each['text']}", no_wrap=True, style="dim") for each in data["recent"]]
        below = [*sinks[:left], more, *last[: max(0, left - len(sinks) - 1)]]
        return Group(head, line, table, *below)

    def _row(self, route: dict[str, Any]) -> Iterator[Text | str]:
        history = self._history.setdefault(route["name"], deque(maxlen=HISTORY))
        history.append(route["rate"] or 0.0)
        highest = max(history) or 1.0
        curve = "".join(BARS[round(value / highest * (len(BARS) - 1))] for value in history)
        yield Text(route["name"])
        yield Text(route["state"], style=COLOURS.get(route["state"], "dim"))
        yield str(route["streams"])
        yield show_size(route["bytes"])
        yield rate(route["rate"]).strip(" ()")
        yield Text(curve, style="cyan")
        for key in ("backlog", "dropped", "lost"):
            count = sum(sink[key] for sink in route["sinks"])
            yield show_size(count) if count else ""
        yield str(sum(route["sessions"].values()))


def top(admin: str | None, every: float) -> int:
    """Draws until q or Ctrl-C: 0; 1 when the relay does not answer any more."""
    if not sys.stdout.isatty():
        raise UsageError("relay top draws on a terminal; relay status --json is for scripts")
    address = place_to_ask(admin)
    console = Console()
    screen = Screen()
    vain = 0
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                live.update(screen.frame(_asked(address), console.size.height), refresh=True)
                vain = 0
            except NoAnswer as error:
                vain += 1
                live.update(Text(str(error), style="red"), refresh=True)
                if vain >= GIVEN_UP:
                    failed = str(error)
                    break
            try:
                if _told_to_end(every):
                    return 0
            except KeyboardInterrupt:
                return 0
    print(f"relay: {failed}", file=sys.stderr)
    return 1


def _asked(address: Address) -> dict[str, Any]:
    found: dict[str, Any] = checked(ask(address, "/api/v1/status")).data()
    return found


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Keys come one by one, without being shown, where there is a keyboard."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _told_to_end(seconds: float) -> bool:
    """Waits for so long; whether q was pressed meanwhile."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0] and sys.stdin.read(1) in ("q", "Q", ""):
            return True
    return False
