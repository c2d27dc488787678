"""`relay run`: a route made from addresses instead of YAML, for one stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO, Any

from relay.config.data import from_data
from relay.errors import ConfigError, ConfigErrors, UsageError
from relay.journal import logs
from relay.journal.record import SessionRecord
from relay.serving.route import RunningRoute
from relay.serving.server import Server


def route_data(source: str, to: Sequence[str], method: str) -> dict[str, Any]:
    """The configuration that `relay run` stands for: every sink but the last is a tee's."""
    *tees, last = to
    route: dict[str, Any] = {"source": source, "sink": last, "method": method}
    if tees:
        route["stages"] = [{"tee": {"to": sink}} for sink in tees]
    return {"routes": {"run": route}, "drain": 0}


def run_once(source: str, to: Sequence[str], method: str) -> int:
    """Runs it to its end; prints a line a sink. Returns the exit code; 130 or 143 after a signal."""
    try:
        config = from_data(route_data(source, to, method), "relay run")
    except (ConfigError, ConfigErrors) as error:
        raise UsageError(str(error)) from error
    taken = any(sink.address.scheme == "stdio" for _place, sink in config.routes["run"].sinks())
    results = sys.stderr if taken else sys.stdout

    def ready(routes: list[RunningRoute]) -> None:
        for route in routes:
            for address in route.bound:
                print(f"listening on {address}", file=sys.stderr, flush=True)

    def over(record: SessionRecord) -> None:
        if sys.stderr is not None and not sys.stderr.isatty():  # people have the results, programs the record
            logs.session(record)
        tell(record, results)

    server = Server(config, once=True, on_record=over, on_ready=ready)
    code = server.run()
    return 128 + server.signalled if server.signalled else code


def tell(record: SessionRecord, out: IO[str]) -> None:
    """A line a sink: bytes, seconds, rate, method, how it ended."""
    for sink in record.sinks:
        out.write(f"{sink.as_line(*record.crossing(sink))}\n")
        out.flush()
