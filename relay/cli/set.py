"""`relay set`: a stage of a running relay has other settings from now on."""

from __future__ import annotations

from typing import Annotated

import typer

from relay.cli.options import Admin


def change(
    route: Annotated[str, typer.Argument(help="The route, as its configuration names it.")],
    stage: Annotated[
        str, typer.Argument(help="The stage: its kind or its name; throttle#2 is the second of that name.")
    ],
    values: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="Such as rate=5MB/s.")],
    admin: Admin = None,
) -> None:
    """Changes a stage while streams pass it: the rate of a throttle, for example.

    It holds until the route is exchanged by a reload or relay ends; the configuration file stays as it is.
    """
    from relay.admin import asking

    raise typer.Exit(asking.change(admin, route, stage, values))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("set")(change)
