"""`relay check`: whether `relay serve` would take a configuration, and what this machine lacks for it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from relay.cli.options import Configuration


class Format(StrEnum):
    """How the answer looks."""

    text = "text"
    json = "json"


def check(
    config: Configuration = None,
    form: Annotated[Format, typer.Option("--format", help="How the answer looks.")] = Format.text,
) -> None:
    """Reports all errors of a configuration, and what this machine lacks for it."""
    from relay.planning.preflight import show_check

    answer, warnings = show_check(config, form.value)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(answer, nl=False)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(check)
