"""`send` and `run` for asyncio: the same calls, on a thread of their own, so that the event loop goes on.

Cancelling the task cancels the transfer, and the await ends when it has let go of everything. Callbacks are
called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from relay import transfers
from relay.config.models import Config, Route
from relay.journal.record import SessionRecord
from relay.sending.progress import Standing
from relay.transfers import Cancel, Outcome, Path

if TYPE_CHECKING:
    from typing_extensions import Buffer

_Told = TypeVar("_Told")


class SendOptions(TypedDict, total=False):
    """The options of relay.send."""

    method: str
    rate: str | int | None
    offset: str | int
    length: str | int | None
    checksum: str
    wait: str | float
    on_slow: str
    progress: Callable[[Sequence[Standing]], None] | None
    cancel: Cancel | None
    check: bool


class RunOptions(TypedDict, total=False):
    """The options of relay.run."""

    once: bool
    on_ready: Callable[[list[str]], None] | None
    on_record: Callable[[SessionRecord], None] | None
    progress: Callable[[Sequence[Standing]], None] | None
    cancel: Cancel | None
    check: bool


async def send(
    source: Path | Buffer | Sequence[Path], to: Path | Sequence[Path], **given: Unpack[SendOptions]
) -> Outcome:
    """As relay.send, whose options it takes; `progress` is called on the event loop."""
    options: dict[str, Any] = {**given}
    options["progress"] = _on_loop(options.get("progress"))
    return await _on_a_thread(lambda cancel: transfers.send(source, to, cancel=cancel, **options), options)


async def run(config: Path | Mapping[str, Any] | Config | Route, **given: Unpack[RunOptions]) -> Outcome:
    """As relay.run, whose options it takes; its callbacks are called on the event loop.

    Cancelling the task ends everything at once; `cancel`, a relay.Cancel, drains first.
    """
    options: dict[str, Any] = {**given}
    for name in ("progress", "on_ready", "on_record"):
        options[name] = _on_loop(options.get(name))
    return await _on_a_thread(lambda cancel: transfers.run(config, cancel=cancel, **options), options)


def _on_loop(callback: Callable[[_Told], None] | None) -> Callable[[_Told], None] | None:
    if callback is None:
        return None
    loop = asyncio.get_running_loop()

    def tell(told: _Told) -> None:
        loop.call_soon_threadsafe(callback, told)

    return tell


async def _on_a_thread(call: Callable[[Cancel], Outcome], options: dict[str, Any]) -> Outcome:
    """Runs it on a thread that is there for nothing else; ends when the thread has."""
    cancel = options.pop("cancel", None) or Cancel()
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Outcome] = loop.create_future()

    def work() -> None:
        try:
            outcome, error = call(cancel), None
        except BaseException as raised:  # whatever it is, it belongs to whoever awaits
            outcome, error = None, raised

        def tell() -> None:
            if error is not None:
                done.set_exception(error)
            elif outcome is not None:
                done.set_result(outcome)

        loop.call_soon_threadsafe(tell)

    thread = threading.Thread(target=work, name="relay-aio")
    thread.start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        cancel.cancel()
        cancel.cancel()  # a task that is cancelled has no time to drain
        while not done.done():
            try:
                await asyncio.shield(done)
            except asyncio.CancelledError:
                continue
            except Exception:
                break
        if not done.cancelled():
            done.exception()  # it was looked at: the cancellation is what the task ends with
        raise
    finally:
        thread.join()
