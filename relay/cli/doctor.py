"""`relay doctor`: what this kernel, sandbox and user can do."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Tries everything that relay uses, and every path of bytes: shared or copied, how fast.

    Exits with 1 when something that relay needs is missing.
    """
    from relay.doctor.examine import doctor as examine

    raise typer.Exit(examine(as_json=as_json))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(doctor)
