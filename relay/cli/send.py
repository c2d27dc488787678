"""`relay send`: files or stdin, pushed to one address or many."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Method(StrEnum):
    """How bytes cross."""

    auto = "auto"
    sendfile = "sendfile"
    splice = "splice"
    vmsplice = "vmsplice"
    copy = "copy"


class OnSlow(StrEnum):
    """What happens to a receiver that does not keep pace."""

    block = "block"
    drop = "drop"
    disconnect = "disconnect"
    spill = "spill"


class ProgressKind(StrEnum):
    """How progress is shown."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    json = "json"
    none = "none"


def send(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE|-]...", help="What to send; stdin without FILE.")
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to", metavar="ADDRESS", help="Where to; may be repeated.  [default: tcp://127.0.0.1:9000]"
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="How bytes cross.")] = Method.auto,
    rate: Annotated[
        str | None, typer.Option(metavar="RATE", help="At most so much to each address, such as 10MB/s.")
    ] = None,
    offset: Annotated[str, typer.Option(metavar="SIZE", help="Leave out so much at the beginning.")] = "0",
    length: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Send so much and no more; less is an error.")
    ] = None,
    checksum: Annotated[
        str,
        typer.Option(metavar="ALGO[=HEX]", help="sha256, blake3, xxh3 or crc32c; exit code 6 if not HEX."),
    ] = "",
    wait: Annotated[
        str, typer.Option(metavar="TIME", help="For how long a receiver may still be refusing, such as 10s.")
    ] = "0s",
    on_slow: Annotated[OnSlow, typer.Option(help="What happens when an address does not keep pace.")] = (
        OnSlow.block
    ),
    progress: Annotated[
        ProgressKind, typer.Option(help="auto is bars on a terminal, plain lines elsewhere.")
    ] = ProgressKind.auto,
) -> None:
    """Sends files or stdin to every address. Done means acknowledged by the receiver's kernel.

    Exits with 0 when all is done, 1 when some sinks failed, 4 when a source failed or changed, 5 when every
    sink failed, 6 when the checksum is another.
    """
    from relay.journal import logs
    from relay.sending.sending import send as send_all

    logs.set_up("json" if progress is ProgressKind.json else "text", "warning")
    raise typer.Exit(
        send_all(
            files or (),
            to or (),
            method=method.value,
            rate=rate,
            offset=offset,
            length=length,
            checksum=checksum,
            wait=wait,
            on_slow=on_slow.value,
            progress=progress.value,
        )
    )


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command()(send)
