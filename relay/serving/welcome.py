"""What `relay serve` says when it is ready: what listens where, where files go, what to type next."""

from __future__ import annotations

import logging

from relay.endpoints.address import Address
from relay.serving.route import RunningRoute

log = logging.getLogger("relay.serve")


def welcome(routes: list[RunningRoute], *, built_in: bool) -> None:
    """Logs the summary; for the built-in default also the next commands."""
    for running in routes:
        for _place, sink in running.route.sinks():
            if sink.verb == "write":
                log.info("%s: writes to %s", running.name, sink.address, extra={"event": "sink"})
            elif sink.verb == "connect":
                log.info("%s: connects to %s", running.name, sink.address, extra={"event": "sink"})
    if built_in and routes and len(routes[0].bound) >= 2:
        watch, *_rest, into = routes[0].bound
        place = Address.parse(watch)
        log.info("ready: in another terminal type  relay send FILE --to %s", into, extra={"event": "ready"})
        log.info(
            "and in a third, to watch the bytes  nc %s %d", place.host, place.port, extra={"event": "ready"}
        )
    else:
        log.info("ready", extra={"event": "ready"})
