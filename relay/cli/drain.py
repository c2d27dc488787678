"""`relay drain`: a running relay ends when what is under way has ended."""

from __future__ import annotations

import typer

from relay.cli.options import Admin


def drain(admin: Admin = None) -> None:
    """Tells a running relay to take no new streams, and to end when those under way have ended."""
    from relay.admin import asking

    raise typer.Exit(asking.drain(admin))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(drain)
