"""Options and arguments that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Configuration: TypeAlias = Annotated[
    str | None, typer.Argument(help="The configuration, - for stdin; without it the built-in default.")
]
Admin: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--admin",
        metavar="ADDRESS",
        help="Where the relay is asked.  [default: $RELAY_ADMIN, else $XDG_RUNTIME_DIR/relay.sock]",
    ),
]
