"""The machine that figures were made on, without its name: what a reader needs to compare with his own."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def description(directory: Path) -> dict[str, str]:
    """Kernel, CPU, memory, the file system of `directory`, Python, and how busy the machine was before."""
    return {
        "kernel": f"Linux {platform.release()} {platform.machine()}",
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown",
        "cpus": str(len(os.sched_getaffinity(0))),
        "hypervisor": "yes" if " hypervisor" in (_field(Path("/proc/cpuinfo"), "flags") or "") else "no",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / (1 << 30):.0f} GiB",
        "files on": _filesystem(directory),
        "python": platform.python_version(),
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def line(machine: dict[str, str]) -> str:
    """The description as one line."""
    guest = ", virtual machine" if machine["hypervisor"] == "yes" else ""
    return (
        f"{machine['kernel']}; {machine['cpu']}, {machine['cpus']} CPUs{guest}; {machine['memory']}; "
        f"files on {machine['files on']}; Python {machine['python']}; load average before the first run "
        f"{machine['load average before']}."
    )


def _field(path: Path, name: str) -> str | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for text in lines:
        key, _, value = text.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _filesystem(directory: Path) -> str:
    best, kind = "", "unknown"
    where = str(directory.resolve())
    for text in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, this, *_ = text.split()
        if (where == mount or where.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, this
    return kind
