"""`relay top`: a running relay, live on a terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from relay.cli.options import Admin


def top(
    admin: Admin = None,
    every: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Shows what flows in a running relay, live; q ends it."""
    from relay.admin.top import top as show

    raise typer.Exit(show(admin, every))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(top)
