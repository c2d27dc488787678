"""The one record of a session of two pipelines: that of a session without stages, with what its stages have to say.

`sinks` are those of the tees of `stages`, then the sink itself, then those of the tees of `replies`; what belongs to
the way back says so (`way: back`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.journal.record import SessionRecord, SinkRecord

if TYPE_CHECKING:
    from relay.config.models import Route
    from relay.duplex.direction import Direction
    from relay.duplex.staged import StagedSession


def record_of(session: StagedSession, route: Route, name: str) -> SessionRecord:
    """Of a session whose pipelines are over; of one that never had any, too."""
    seconds = session.ended - session.began
    sink = str(route.sink.address)
    result = "failed" if session.reason else "delivered"
    if not session.ways:
        main = [SinkRecord(sink, sink, 0, seconds, "copy", result)]
        return SessionRecord(
            name, str(session.id), str(route.source.address), session.peer, 0, seconds, "copy",
            session.ended_by, result, session.reason, sinks=main, back=0, back_method="copy",
        )  # fmt: skip
    there, back = session.ways
    to, others = _parts(there)
    client, mirrors = _parts(back)
    for one in mirrors:
        one.way = "back"
    to.seconds, to.result, to.reason = seconds, result, ""
    assert there.record is not None
    assert back.record is not None
    if result == "delivered" and any(one.result == "failed" for one in (*others, *mirrors)):
        result = "partial"
    stages = [*there.record.stages, *({"way": "back", **stage} for stage in back.record.stages)]
    measured = {"there": there.record.measured, "back": back.record.measured}
    return SessionRecord(
        route=name,
        id=str(session.id),
        source=str(route.source.address),
        peer=session.peer,
        bytes=there.giver.source.moved,
        seconds=seconds,
        method=there.record.method,
        ended_by=session.ended_by,
        result=result,
        reason=session.reason,
        why_method=there.record.why_method if there.record.method == "copy" else "",
        sinks=[*others, to, *mirrors],
        stages=stages,
        source_failed=session.source_failed,
        measured={key: costs for key, costs in measured.items() if costs},
        back=client.bytes,
        back_lost=client.lost,
        back_method=back.record.method,
    )


def _parts(way: Direction) -> tuple[SinkRecord, list[SinkRecord]]:
    """The party that took its bytes, and the sinks of its tees. What a party was not given is lost: nothing is left
    out for it by policy."""
    assert way.record is not None
    visible = [outlet for outlet in way.chain.outlets if not outlet.hidden]
    main: SinkRecord | None = None
    others: list[SinkRecord] = []
    for outlet, sink in zip(visible, way.record.sinks, strict=True):
        if outlet is way.main:
            main = sink
        else:
            others.append(sink)
    assert main is not None
    main.lost, main.dropped = main.dropped, 0
    return main, others
