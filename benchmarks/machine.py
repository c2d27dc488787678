"""The machine a table was made on, without its name, and how much of it was busy with other things."""

from __future__ import annotations

import os
from pathlib import Path

from relay.bench.circumstances import description, line

__all__ = ["busy_seconds", "description", "line"]


def busy_seconds() -> float:
    """CPU seconds that all CPUs together spent not idle since boot, in clock ticks (usually of 10 ms)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
