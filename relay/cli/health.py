"""`relay health`: whether a running relay is alive, for HEALTHCHECK and probes."""

from __future__ import annotations

from typing import Annotated

import typer

from relay.cli.options import Admin


def health(
    admin: Admin = None,
    ready: Annotated[bool, typer.Option("--ready", help="Whether new streams may come, too.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=60.0, help="For how many seconds to wait.")] = 3.0,
) -> None:
    """Asks a running relay whether it is alive: 0 if it is, 1 if not, with the reason."""
    from relay.admin import asking

    raise typer.Exit(asking.health(admin, ready=ready, patience=timeout))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(health)
