"""`relay serve`: the routes of a configuration, with a desk where the running relay can be asked and told."""

from __future__ import annotations

import os
from functools import partial

from relay.admin.doors import opened
from relay.admin.ledger import Ledger
from relay.admin.summary import summary
from relay.admin.where import VARIABLE, default_place
from relay.config.load import load_to_run, load_with_places
from relay.config.models import Config
from relay.confinement.confinement import Confinement
from relay.confinement.wants import Want, listens
from relay.endpoints import passed
from relay.journal import logs
from relay.journal.record import SessionRecord
from relay.serving.notify import Notifier
from relay.serving.route import RunningRoute
from relay.serving.server import Server
from relay.serving.vigil import Vigil
from relay.serving.welcome import welcome


def serve(
    path: str | None,
    *,
    log_format: logs.Format = "auto",
    log_level: str = "info",
    user: str | None = None,
    exit_idle: float | None = None,
) -> int:
    """Runs the configuration at `path` ("-": stdin, None: the built-in default) to its end; the exit code.

    `user` goes before the configuration's; after `exit_idle` seconds without use it ends. Raises ConfigErrors,
    KernelError when rights cannot be given up, and SourceError when an admin socket cannot be had.
    """
    passed.receive()
    notifier = Notifier()
    config = load_to_run(path)
    confinement = Confinement(config, path, user, also=_admin(config))
    confinement.begin()  # before the log, which has a thread
    logs.set_up(log_format, log_level)
    ledger = Ledger()

    def over(record: SessionRecord) -> None:
        ledger.add(record)
        logs.session(record)

    def ready(routes: list[RunningRoute]) -> None:
        summary(server.config, routes)
        welcome(routes, built_in=path is None)

    server = Server(
        config,
        on_record=over,
        on_ready=ready,
        again=partial(load_with_places, path, to_run=True) if path not in (None, "-") else None,
        vigil=Vigil(notifier, exit_idle),
        confinement=confinement,
        compact=ledger.compact,
    )
    with opened(server, ledger, path or "default.yaml", confinement.owner):
        return server.run()


def _admin(config: Config) -> list[Want]:
    """What the socket that $RELAY_ADMIN names takes; the default one is not worth a right to its directory."""
    if config.admin is not None or not os.environ.get(VARIABLE):
        return []
    place = default_place()
    return [] if place is None else list(listens(("admin",), place))
