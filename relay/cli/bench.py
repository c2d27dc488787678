"""`relay bench`: every hop by every method on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="FROM-TO", help="This hop alone, such as tcp-pipe; may be repeated."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One and four sinks, pieces of 64 KiB: a few seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw the bars there too: .svg, or .png with matplotlib."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.001, max=60.0, help="For how long each cell is measured.")
    ] = 0.016,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, max=99, help="How often; the median counts.  [default: twice where a minute allows]"
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", exists=True, file_okay=False, writable=True, help="Where files are made."
        ),
    ] = None,
) -> None:
    """Measures how bytes cross each hop: GiB/s, CPU and system calls by method, and what auto makes of it.

    pipe, unix, tcp, file and memory into pipe, unix, tcp, file and null; 1, 4 and 16 sinks; 512 B, 64 KiB and 1 MiB.
    Exits with 1 when a cell failed.
    """
    from relay.bench.survey import survey
    from relay.journal import logs

    logs.set_up("auto", "warning")
    raise typer.Exit(
        survey(
            only or (),
            quick=quick,
            seconds=seconds,
            rounds=rounds,
            as_json=as_json,
            plot=plot,
            directory=directory,
        )
    )


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(bench)
