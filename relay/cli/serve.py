"""`relay serve`: runs the routes of a configuration."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer


class LogFormat(StrEnum):
    """How log lines look."""

    auto = "auto"
    text = "text"
    json = "json"


class LogLevel(StrEnum):
    """From which level on lines are logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    config: Annotated[
        str | None, typer.Argument(help="The configuration, - for stdin; without it the built-in default.")
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="auto is text on a terminal, JSON lines elsewhere.")
    ] = LogFormat.auto,
    log_level: Annotated[LogLevel, typer.Option(help="From which level on to log.")] = LogLevel.info,
    exit_idle: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="End when nothing was under way for so long, such as 60s; a socket unit starts it again.",
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Become this user when every address is bound; as confine.user."),
    ] = None,
) -> None:
    """Runs the routes; SIGTERM drains and ends, SIGHUP reloads and opens files anew."""
    from relay.config.load import load_to_run, load_with_places
    from relay.confinement.confinement import Confinement
    from relay.endpoints import passed
    from relay.journal import logs
    from relay.serving.notify import Notifier
    from relay.serving.server import Server
    from relay.serving.vigil import Vigil, idle_time
    from relay.serving.welcome import welcome

    idle = idle_time(exit_idle)
    passed.receive()
    notifier = Notifier()
    loaded = load_to_run(config)
    confinement = Confinement(loaded, config, user)
    confinement.begin()  # the log has a thread
    logs.set_up(log_format.value, log_level.value)
    server = Server(
        loaded,
        on_ready=lambda routes: welcome(routes, built_in=config is None),
        again=partial(load_with_places, config, to_run=True) if config not in (None, "-") else None,
        vigil=Vigil(notifier, idle),
        confinement=confinement,
    )
    raise typer.Exit(server.run())


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(serve)
