"""`relay status`: what flows in a running relay, what is slow, what was lost, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from relay.cli.options import Admin


def status(
    admin: Admin = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Shows every route of a running relay: streams, rates, backlogs, drops, the last sessions."""
    from relay.admin import asking

    raise typer.Exit(asking.status(admin, as_json=as_json))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(status)
