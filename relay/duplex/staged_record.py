"""The one record of a session of two pipelines: that of a session without stages, with what its stages have to say.

`sinks` are those of the tees of `stages`, then the sink itself, then those of the tees of `replies`; what belongs to
the way back says so (`way: back`).
"""

from __future__ import annotations

from relay.duplex.direction import Direction
from relay.journal.record import SessionRecord, SinkRecord


def complete(record: SessionRecord, there: Direction, back: Direction) -> None:
    """Adds to the record of a session what its pipelines counted. Both are over."""
    assert there.record is not None
    assert back.record is not None
    to, others = _parts(there)
    client, mirrors = _parts(back)
    for mirror in mirrors:
        mirror.way = "back"
    (main,) = record.sinks
    main.bytes, main.lost, main.method = there.taken, to.dropped, there.record.method
    main.blocked_seconds = to.blocked_seconds
    if record.result == "delivered" and any(one.result == "failed" for one in (*others, *mirrors)):
        record.result = "partial"
    record.bytes = there.giver.source.moved
    record.method = there.record.method
    record.why_method = there.record.why_method if record.method == "copy" else ""
    record.back, record.back_lost, record.back_method = client.bytes, client.dropped, back.record.method
    record.sinks = [*others, main, *mirrors]
    record.stages = [*there.record.stages, *({"way": "back", **stage} for stage in back.record.stages)]
    measured = {"there": there.record.measured, "back": back.record.measured}
    record.measured = {way: costs for way, costs in measured.items() if costs}


def _parts(way: Direction) -> tuple[SinkRecord, list[SinkRecord]]:
    """The party that took its bytes, and the sinks of its tees. What a party was not given was dropped: it had gone."""
    assert way.record is not None
    visible = [outlet for outlet in way.chain.outlets if not outlet.hidden]
    parts = list(zip(visible, way.record.sinks, strict=True))
    (main,) = (sink for outlet, sink in parts if outlet is way.main)
    return main, [sink for outlet, sink in parts if outlet is not way.main]
