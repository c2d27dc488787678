"""What every source and every sink must do, whatever its kind: checks as plain functions."""

from __future__ import annotations

import threading
from typing import Any

from givers import Giver
from peers import PATIENCE, assert_same, payload
from relays import Relay
from takers import Taker

from relay.journal.record import SessionRecord, SinkRecord

METHOD = "auto"  # of every route that does not ask for one; the fixture either_way changes it


def route_of(giver: Giver, takers: list[Taker], on_slow: object = None, **more: Any) -> dict[str, Any]:
    """A route from the giver's source; every taker but the last stands at a tee, with the policy if given."""
    policy = {} if on_slow is None else {"on_slow": on_slow}
    tees = [{"tee": {"to": taker.sink, **policy}} for taker in takers[:-1]]
    return {"source": giver.source, "stages": tees, "sink": takers[-1].sink, "method": METHOD, **more}


def check_delivery(giver: Giver, takers: list[Taker], pieces: list[bytes], **more: Any) -> SessionRecord:
    """What is given arrives at every taker, unchanged and ended; the record says so."""
    data = b"".join(pieces)
    if giver.whole:
        giver.prepare(data)
    with Relay(route_of(giver, takers, **more)) as relay:
        for taker in takers:
            taker.start(relay)
            taker.take()
        giver.start(relay)
        if not giver.whole:
            for piece in pieces:
                giver.give(piece)
        giver.end()
        record = relay.wait()
        assert record is not None
        assert record.result == "delivered", record
        assert record.bytes == len(data)
        assert record.ended_by == "source"
        for taker, sink in zip(takers, record.sinks, strict=True):
            assert_same(taker.taken(), data)
            if "listen" not in taker.sink:
                assert sink.bytes == len(data)
                assert sink.result == "delivered"
    return record


def check_clogged(giver: Giver, clogged: Taker, sibling: Taker, size: int) -> SinkRecord:
    """A sink that reads nothing holds the source under policy block, and loses nothing once it reads again."""
    data = payload(11, size)
    writer = threading.Thread(target=lambda: (giver.give(data), giver.end()), name="giver", daemon=True)
    with Relay(route_of(giver, [clogged, sibling])) as relay:
        clogged.start(relay)
        sibling.start(relay)
        sibling.take()
        giver.start(relay)
        writer.start()
        # what the sibling gets is what fits into the pipes and buffers of the clogged one; then all is still
        quiet = -1
        while quiet != len(sibling.got) or not sibling.got:
            quiet = len(sibling.got)
            writer.join(0.15)
        assert len(sibling.got) < size, "the source was not held"
        clogged.take()
        record = relay.wait()
        writer.join(PATIENCE)
        assert record is not None
        assert record.result == "delivered", record
        assert_same(clogged.taken(), data)
        assert_same(sibling.taken(), data)
        return record.sinks[0]
