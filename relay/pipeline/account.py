"""The account of a turn: what a pipeline's parts have to say of it, as one session record."""

from __future__ import annotations

import time
from typing import Any

from relay.journal.record import SessionRecord
from relay.kernel import core
from relay.pipeline.chain import Chain
from relay.pipeline.intake import Intake
from relay.stages.stage import Turn


def account(
    route: str,
    turn: Turn | None,
    intake: Intake | None,
    chain: Chain,
    ended_by: str,
    reason: str,
    *,
    aborted: bool,
    measured: dict[str, Any],
) -> SessionRecord:
    """The record of the turn that ends now. Stages are asked for their part, which ends their turn."""
    source = intake.source if intake is not None else None
    error = intake.error if intake is not None else ""
    sendfile = source is not None and source.c.method == core.SENDFILE
    sinks = [outlet.record(sendfile=sendfile) for outlet in chain.outlets if not outlet.hidden]
    stages = [{"stage": stage.name, **said} for stage in chain.stages if (said := stage.end())]
    failed = sum(1 for sink in sinks if sink.result == "failed")
    result = "partial" if failed else "delivered"
    if error or aborted or (failed and failed == len(sinks)):
        result = "failed"
    return SessionRecord(
        route=route,
        id=turn.id if turn else "",
        source=source.address if source else "",
        peer=source.peer if source else "",
        bytes=source.moved if source else 0,
        seconds=time.monotonic() - intake.began if intake is not None else 0.0,
        method=source.method_now if source else "",
        why_method=intake.choice.reason if intake is not None else "",
        ended_by=ended_by,
        result=result,
        reason=error or reason,
        sinks=sinks,
        stages=stages,
        source_failed=bool(error),
        measured=measured,
        via=source.via if source else "",
    )
