"""`relay run`: a route without YAML, once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Method(StrEnum):
    """How bytes cross."""

    auto = "auto"
    zero_copy = "zero-copy"
    copy = "copy"


def run(
    source: Annotated[str, typer.Argument(help="Where bytes enter: an address, a path, or - for stdin.")],
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="SINK", help="Where bytes leave; may be repeated.")
    ] = None,
    method: Annotated[Method, typer.Option(help="How bytes cross.")] = Method.auto,
) -> None:
    """Moves one stream from SOURCE to every SINK (stdout without --to); a listening source takes one connection."""
    from relay.journal import logs
    from relay.serving.running import run_once

    logs.set_up("auto", "warning", records=True)  # what it listens on and what moved it says itself
    raise typer.Exit(run_once(source, to or ["-"], method.value))


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(run)
