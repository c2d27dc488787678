"""`relay plan`: what a configuration will be on this machine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from relay.cli.options import Configuration


class Format(StrEnum):
    """How the plan looks."""

    text = "text"
    json = "json"
    mermaid = "mermaid"


def plan(
    config: Configuration = None,
    form: Annotated[Format, typer.Option("--format", help="How the plan looks.")] = Format.text,
) -> None:
    """Draws each route: the method of every hop and why, who can hold whom, what it needs."""
    from relay.planning.preflight import show_plan

    typer.echo(show_plan(config, form.value), nl=False)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(plan)
