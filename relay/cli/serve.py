"""`relay serve`: runs the routes of a configuration."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from relay.cli.options import Configuration


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
    config: Configuration = None,
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
    from relay.admin.serving import serve as run_routes
    from relay.serving.vigil import idle_time

    idle = idle_time(exit_idle)
    raise typer.Exit(
        run_routes(config, log_format=log_format.value, log_level=log_level.value, user=user, exit_idle=idle)
    )


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(serve)
