"""Every cell there is, kind by kind: a kind is a file that says what is measured and who does it."""

from __future__ import annotations

from . import fanout
from .cell import Cell, one_way


def catalogue() -> list[Cell]:
    """All cells, in the order of the report."""
    return [*one_way(), *fanout.cells()]
