"""relay moves streams of bytes to many sockets and files without carrying them.

`import relay` is cheap: what is named here is loaded when it is first used. docs/memory.md and
docs/python.md have examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from relay.errors import RelayError as RelayError
    from relay.errors import ShareError as ShareError
    from relay.kernel.arena import Arena as Arena
    from relay.kernel.pipe import Pipe as Pipe
    from relay.kernel.transfer import splice as splice
    from relay.kernel.transfer import tee as tee
    from relay.kernel.transfer import vmsplice as vmsplice
    from relay.sharing.shared import Shared as Shared
    from relay.sharing.shared import share as share
    from relay.sharing.sink import ShareSink as ShareSink
    from relay.sharing.source import ShareSource as ShareSource

_HOMES = {
    "RelayError": "relay.errors",
    "ShareError": "relay.errors",
    "Arena": "relay.kernel.arena",
    "Pipe": "relay.kernel.pipe",
    "splice": "relay.kernel.transfer",
    "tee": "relay.kernel.transfer",
    "vmsplice": "relay.kernel.transfer",
    "Shared": "relay.sharing.shared",
    "share": "relay.sharing.shared",
    "ShareSink": "relay.sharing.sink",
    "ShareSource": "relay.sharing.source",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'relay' has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
