"""The runs as bars: a picture of each cell, and one of all ratios. From the JSON document, to be drawn again at will.

python -m benchmarks.plots runs.json DIR
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relay.charts import Bar, Chart, Group, svg

RELAY, PEER = "relay", "peer"
LABEL = 190  # pixels for the name of a contender or a cell
RATIOS = "ratios"


def draw(document: dict[str, Any], directory: Path) -> list[Path]:
    """Writes an SVG a cell that has figures, and `ratios.svg`, into `directory`; the paths, in the cells' order."""
    made = []
    for cell in document["cells"]:
        panels = _cell(cell)
        if panels:
            path = directory / f"{cell['cell']}.svg"
            path.write_text(
                svg(cell["title"], panels, order=(RELAY, PEER), label=LABEL, width=480), encoding="utf-8"
            )
            made.append(path)
    panels = _ratios(document["cells"])
    if panels:
        path = directory / f"{RATIOS}.svg"
        title = "relay by the best peer of each cell"
        order = ("better", "worse")
        path.write_text(svg(title, panels, columns=3, order=order, label=LABEL, width=400), encoding="utf-8")
        made.append(path)
    return made


def pictures(drawn: Sequence[Path], markdown: Path | None, parts: Sequence[str]) -> list[str]:
    """The tables in `parts`, each with its picture behind its heading, and the ratios before all of them."""
    if not drawn:
        return list(parts)
    where = {path.stem: os.path.relpath(path, markdown.parent if markdown else Path.cwd()) for path in drawn}
    text = [f"![relay by the best peer of each cell]({where[RATIOS]})\n"] if RATIOS in where else []
    for part in parts:
        heading, _, rest = part.partition("\n")
        name = heading.rpartition("(`")[2].removesuffix("`)")
        text.append(f"{heading}\n\n![{name}]({where[name]})\n{rest}" if name in where else part)
    return text


def _measured(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in cell["contenders"] if "gib_s" in one]


def _net(contender: dict[str, Any]) -> float:
    return float(contender["net_cpu_s_gib"])


def _is_relay(contender: dict[str, Any]) -> bool:
    return str(contender["name"]).startswith("relay")


def _cell(cell: dict[str, Any]) -> list[Chart]:
    """GiB/s and CPU of each contender, with the least and the greatest run."""
    contenders = _measured(cell)
    if not contenders:
        return []

    def chart(title: str, note: str, key: str, digits: int) -> Chart:
        groups = []
        for one in contenders:
            spread = one[key]
            least, greatest = spread["least"], spread["greatest"]
            said = f"{spread['median']:.{digits}f} ({least:.{digits}f} to {greatest:.{digits}f})"
            groups.append(
                Group(one["name"], (Bar(RELAY if _is_relay(one) else PEER, spread["median"], said),))
            )
        return Chart(title, tuple(groups), note)

    return [
        chart("GiB/s", "of the source's stream; longer is better", "gib_s", 2),
        chart("CPU-s/GiB", "all processes, start-up included; shorter is better", "cpu_s_gib", 3),
    ]


def _ratios(cells: Sequence[dict[str, Any]]) -> list[Chart]:
    """relay's figures by those of the best peer, cell by cell."""
    speed, cpu, net = [], [], []
    for cell in cells:
        ratios = beside(cell)
        if ratios is None:
            continue
        faster, dearer = ratios
        speed.append(_ratio(cell["cell"], faster, better=faster > 1))
        cpu.append(_ratio(cell["cell"], dearer, better=dearer < 1))
        # on a short stream what is left without start-up may be less than its own spread
        own = min(_net(one) for one in _measured(cell) if _is_relay(one))
        least = min(_net(one) for one in _measured(cell) if not _is_relay(one))
        if own > 0 and least > 0:
            net.append(_ratio(cell["cell"], own / least, better=own < least))
    if not speed:
        return []
    return [
        Chart("GiB/s by the fastest peer's", tuple(speed), "above 1 relay is faster", mark=1),
        Chart(
            "CPU by the cheapest peer's", tuple(cpu), "start-up included; below 1 relay is cheaper", mark=1
        ),
        Chart("CPU without start-up by the cheapest peer's", tuple(net), "below 1 relay is cheaper", mark=1),
    ]


def beside(cell: dict[str, Any]) -> tuple[float, float] | None:
    """relay's GiB/s by the fastest peer's, and its CPU by the cheapest one's; None where one of them has no figures.
    `said` has them of unrounded figures."""
    contenders = _measured(cell)
    relay = next((one for one in contenders if _is_relay(one)), None)
    peers = [one for one in contenders if not _is_relay(one)]
    if relay is None or not peers:
        return None
    if "said" in cell:
        return float(cell["said"][0]), float(cell["said"][1])
    return (
        relay["gib_s"]["median"] / max(one["gib_s"]["median"] for one in peers),
        relay["cpu_s_gib"]["median"] / min(one["cpu_s_gib"]["median"] for one in peers),
    )


def draw_jobs(jobs: Sequence[tuple[str, float, float | None]], directory: Path) -> Path:
    """Writes `both-ways.svg`: of each job what relay costs, and its rate, by the best peer's; the path."""
    rates = tuple(_ratio(title, rate, better=rate > 1) for title, _cost, rate in jobs if rate is not None)
    costs = tuple(_ratio(title, cost, better=cost < 1) for title, cost, _rate in jobs)
    panels = [
        Chart("rate by the best peer's", rates, "above 1 relay is faster", mark=1),
        Chart("CPU (idle: memory) by the best peer's", costs, "below 1 relay is cheaper", mark=1),
    ]
    path = directory / "both-ways.svg"
    title = "relay by the best peer, both ways"
    path.write_text(svg(title, panels, order=("better", "worse"), label=320, width=560), encoding="utf-8")
    return path


def _ratio(name: str, value: float, *, better: bool) -> Group:
    return Group(
        name, (Bar("better" if better else "worse", value if math.isfinite(value) else 0.0, f"{value:.2f}"),)
    )


if __name__ == "__main__":
    _, runs, into = sys.argv
    for written in draw(json.loads(Path(runs).read_text()), Path(into)):
        print(written)
