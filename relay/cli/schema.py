"""`relay schema`: the JSON Schema of configurations, for editors."""

from __future__ import annotations

import typer


def schema() -> None:
    """Prints the JSON Schema of a configuration."""
    import json

    from relay.config.schema import schema as made

    typer.echo(json.dumps(made(), indent=2))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(schema)
