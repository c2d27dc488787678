"""`relay serve`: the routes of a configuration, with a desk where the running relay can be asked and told."""

from __future__ import annotations

from functools import partial

from relay.admin.doors import opened
from relay.admin.ledger import Ledger
from relay.config.load import load_to_run, load_with_places
from relay.journal import logs
from relay.journal.record import SessionRecord
from relay.serving.notify import Notifier
from relay.serving.route import RunningRoute
from relay.serving.server import Server
from relay.serving.vigil import Vigil
from relay.serving.welcome import welcome


def serve(path: str | None, idle: float | None = None) -> int:
    """Runs the configuration at `path` ("-": stdin, None: the built-in default) to its end; the exit code.

    It also ends when nothing was under way for `idle` seconds. Raises ConfigErrors, and SourceError when an admin
    socket cannot be had.
    """
    ledger = Ledger()

    def over(record: SessionRecord) -> None:
        ledger.add(record)
        logs.session(record)

    def ready(routes: list[RunningRoute]) -> None:
        from relay.admin.summary import summary  # and planning, when streams may come already

        summary(server.config, routes)
        welcome(routes, built_in=path is None)

    server = Server(
        load_to_run(path),
        on_record=over,
        on_ready=ready,
        again=partial(load_with_places, path, to_run=True) if path not in (None, "-") else None,
        vigil=Vigil(Notifier(), idle),
    )
    with opened(server, ledger, path or "default.yaml"):
        return server.run()
