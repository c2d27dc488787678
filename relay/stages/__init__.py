"""The stages of a chain, one file each: the folder listing is the catalogue.

A stage is a module of this package with a class `Settings(StageSettings)` whose `kind` is the module's
name. Adding one touches no other file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from relay.errors import RelayBug

if TYPE_CHECKING:
    from relay.stages.base import StageSettings


@cache
def catalogue() -> Mapping[str, type[StageSettings]]:
    """The settings of every stage by its kind, sorted; imports the stages' modules on first use."""
    from relay.stages.base import StageSettings  # base imports this module, so not at the top

    found: dict[str, type[StageSettings]] = {}
    for kind in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        settings = getattr(importlib.import_module(f"{__name__}.{kind}"), "Settings", None)
        if settings is None:
            continue  # no stage: what stages share
        if not issubclass(settings, StageSettings) or settings.kind != kind:
            raise RelayBug(f"stage file {kind}.py holds no StageSettings of kind {kind!r}")
        found[kind] = settings
    return MappingProxyType(found)
