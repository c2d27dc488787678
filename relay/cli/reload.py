"""`relay reload`: a running relay reads its configuration again."""

from __future__ import annotations

import typer

from relay.cli.options import Admin


def reload(admin: Admin = None) -> None:
    """Reloads a running relay and waits for the outcome; 3 when it refused the configuration, with the reasons."""
    from relay.admin import asking

    raise typer.Exit(asking.reload(admin))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(reload)
