"""The pump in plain Python: the executable specification of relay/kernel (pump.h names the same things).

Its pipes are those of slots.py, which is enough to say exactly how far each byte gets. What the C core keeps
as numbers is kept here as the bytes themselves, and the numbers are derived: nothing can be miscounted.

`Model.sweep(now)` does what relay_sweep does, and says the same events and the same number of system calls.
"""

from __future__ import annotations

from model.ends import Sink, Source
from model.node import Node
from model.pump import Model
from model.ring import Reader, Ring
from model.sweep import Event

__all__ = ["Event", "Model", "Node", "Reader", "Ring", "Sink", "Source"]
