"""The command line: one file a command, no logic. Heavy modules are imported where a command runs."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Annotated, NoReturn

# process 1 of a container gets no signal that it has no handler for: nobody could end it while it starts
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda _signal, _frame: os._exit(143))

# starting makes many objects that stay: looking for garbage among them is a tenth of the start-up
gc.set_threshold(200_000, 20, 50)

import typer  # noqa: E402 - see above

from relay import __version__  # noqa: E402
from relay.cli import (  # noqa: E402
    bench,
    check,
    doctor,
    drain,
    health,
    plan,
    reload,
    run,
    schema,
    send,
    serve,
    set,
    status,
    top,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # half the start-up time of --help goes into rich otherwise
    pretty_exceptions_enable=False,
    help="Moves streams of bytes to many sockets and files without carrying them.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"relay {__version__}")
        raise typer.Exit


@app.callback()
def relay(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Moves streams of bytes to many sockets and files without carrying them."""


for module in (serve, run, send, check, plan, health, status, top, reload, drain, set, doctor, bench, schema):
    module.add_to(app)


def main() -> NoReturn:
    """The console entry: exit codes as documented, errors on stderr in one line each, no traceback."""
    from relay.errors import (
        ConfigError,
        ConfigErrors,
        EndpointError,
        RelayError,
        SourceError,
        UsageError,
    )
    from relay.journal.secrets import hidden

    try:
        app(prog_name="relay", standalone_mode=True)
    except UsageError as error:
        print(f"relay: {hidden(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (ConfigError, ConfigErrors) as error:
        print(hidden(str(error)), file=sys.stderr)
        sys.exit(3)
    except SourceError as error:
        print(f"relay: {hidden(str(error))}", file=sys.stderr)
        sys.exit(4)
    except EndpointError as error:
        print(f"relay: {hidden(str(error))}", file=sys.stderr)
        sys.exit(5)
    except RelayError as error:
        print(f"relay: {hidden(str(error))}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()  # nor is there any use in looking for garbage once more when all of it goes
    sys.exit(0)
