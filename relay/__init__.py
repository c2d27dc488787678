"""relay moves streams of bytes to many sockets and files without carrying them.

`import relay` is cheap: what is named here is loaded when it is first used. docs/memory.md
has examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from relay import aio as aio
    from relay.config.models import Route as Route
    from relay.errors import ConfigErrors as ConfigErrors
    from relay.errors import KernelError as KernelError
    from relay.errors import RelayError as RelayError
    from relay.errors import ShareError as ShareError
    from relay.errors import TransferCancelled as TransferCancelled
    from relay.errors import TransferError as TransferError
    from relay.errors import UsageError as UsageError
    from relay.journal.record import SessionRecord as SessionRecord
    from relay.kernel.arena import Arena as Arena
    from relay.kernel.pipe import Pipe as Pipe
    from relay.kernel.transfer import splice as splice
    from relay.kernel.transfer import tee as tee
    from relay.kernel.transfer import vmsplice as vmsplice
    from relay.sending.progress import Standing as Standing
    from relay.sharing.draft import Draft as Draft
    from relay.sharing.draft import empty as empty
    from relay.sharing.memory import Memory as Memory
    from relay.sharing.shared import Shared as Shared
    from relay.sharing.shared import share as share
    from relay.sharing.sink import ShareSink as ShareSink
    from relay.sharing.source import Block as Block
    from relay.sharing.source import ShareSource as ShareSource
    from relay.transfers import Cancel as Cancel
    from relay.transfers import Outcome as Outcome
    from relay.transfers import run as run
    from relay.transfers import send as send

_HOMES = {
    "ConfigErrors": "relay.errors",
    "KernelError": "relay.errors",
    "RelayError": "relay.errors",
    "ShareError": "relay.errors",
    "TransferCancelled": "relay.errors",
    "TransferError": "relay.errors",
    "UsageError": "relay.errors",
    "SessionRecord": "relay.journal.record",
    "Standing": "relay.sending.progress",
    "Route": "relay.config.models",
    "Arena": "relay.kernel.arena",
    "Pipe": "relay.kernel.pipe",
    "splice": "relay.kernel.transfer",
    "tee": "relay.kernel.transfer",
    "vmsplice": "relay.kernel.transfer",
    "Memory": "relay.sharing.memory",
    "Draft": "relay.sharing.draft",
    "empty": "relay.sharing.draft",
    "Shared": "relay.sharing.shared",
    "share": "relay.sharing.shared",
    "ShareSink": "relay.sharing.sink",
    "Block": "relay.sharing.source",
    "ShareSource": "relay.sharing.source",
    "Cancel": "relay.transfers",
    "Outcome": "relay.transfers",
    "run": "relay.transfers",
    "send": "relay.transfers",
}

__all__ = [
    "Arena",
    "Block",
    "Cancel",
    "ConfigErrors",
    "Draft",
    "KernelError",
    "Memory",
    "Outcome",
    "Pipe",
    "RelayError",
    "Route",
    "SessionRecord",
    "ShareError",
    "ShareSink",
    "ShareSource",
    "Shared",
    "Standing",
    "TransferCancelled",
    "TransferError",
    "UsageError",
    "__version__",
    "aio",
    "empty",
    "run",
    "send",
    "share",
    "splice",
    "tee",
    "vmsplice",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'relay' has no attribute {name!r}")
    from importlib import import_module

    home = _HOMES.get(name)
    found: object = import_module(f"relay.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
