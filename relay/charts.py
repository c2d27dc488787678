"""Bars as SVG, written by hand, or as PNG through matplotlib where that is installed.

A Chart has groups of bars; a bar belongs to a series, which gives it its colour. Bars lie flat, so that names have
room, and each says its value: no axis is needed. Nothing here knows what is drawn.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

from relay.errors import UsageError

PALETTE = ("#3567a8", "#d9822b", "#4c9a52", "#a3457f", "#7a6652", "#5aa7b8", "#b8a63a", "#8a8a8a")
EXTRA = "splice-relay[plot]"

BAR = 11  # pixels a bar is high, with its margin
GAP = 7  # between two groups
HEAD = 40  # above the first group of a panel
LABEL = 128  # left of the bars
LETTER = 5.2  # pixels a letter beside a bar is wide
MARGIN = 20
FONT = "font-family='system-ui, Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Bar:
    """One value of a series; `text` stands beside it (empty: the value in three digits). NaN is no bar, only text."""

    series: str
    value: float
    text: str = ""

    @property
    def said(self) -> str:
        """What stands beside the bar."""
        return self.text or f"{self.value:.3g}"


@dataclass(frozen=True)
class Group:
    """Bars that are compared with each other."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Chart:
    """A panel. With `scale` "group" the longest bar of each group is full, with "chart" the longest of all.

    `mark` is a value at which a line stands, where all bars have the same scale.
    """

    title: str
    groups: tuple[Group, ...]
    note: str = ""
    scale: Literal["chart", "group"] = "chart"
    mark: float | None = None

    def full(self, group: Group) -> float:
        """The value of a bar that goes all the way, in this group."""
        within = (group,) if self.scale == "group" else self.groups
        least = self.mark or 0.0
        return max([least, *(bar.value for g in within for bar in g.bars if _drawn(bar))]) or 1.0

    @property
    def height(self) -> int:
        """Pixels."""
        bars = sum(len(group.bars) for group in self.groups)
        return HEAD + bars * BAR + len(self.groups) * GAP


def _drawn(bar: Bar) -> bool:
    return math.isfinite(bar.value) and bar.value >= 0


def colours_of(charts: Sequence[Chart], order: Sequence[str]) -> dict[str, str]:
    """A colour for each series that there is: those in `order` first, whatever else comes as it appears."""
    found = {bar.series for chart in charts for group in chart.groups for bar in group.bars}
    seen = [bar.series for chart in charts for group in chart.groups for bar in group.bars]
    names = dict.fromkeys([*(name for name in order if name in found), *seen])
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def check(path: Path) -> None:
    """Whether a plot can be written there; UsageError says what to do where not. For before the work is done."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"{path} is neither .svg nor .png; the end of the name says which is wanted")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no directory; make it first")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f"{path}: PNG is drawn by matplotlib, which is not installed; pip install '{EXTRA}', or name an .svg"
        )


def write(
    path: Path, title: str, charts: Sequence[Chart], *, columns: int = 2, order: Sequence[str] = ()
) -> None:
    """Draws the charts there, as the end of the name says; see `check`. Raises OSError when it cannot be written."""
    if path.suffix == ".png":
        _write_png(path, title, charts, columns, colours_of(charts, order))
    else:
        path.write_text(svg(title, charts, columns=columns, order=order), encoding="utf-8")


def svg(
    title: str,
    charts: Sequence[Chart],
    *,
    columns: int = 2,
    order: Sequence[str] = (),
    width: int = 440,
    label: int = LABEL,
) -> str:
    """An SVG document: title, legend, and the charts in rows of `columns`, each `width` pixels wide.

    `order` is that of the series in the legend; `label` pixels are left for the names of groups.
    """
    columns = max(1, min(columns, len(charts)))
    colours = colours_of(charts, order)
    total = MARGIN * 2 + columns * width
    parts: list[str] = []
    legend, y = _legend(colours, total)
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        for number, chart in enumerate(row):
            parts += _panel(chart, colours, MARGIN + number * width, y, width, label)
        y += max(chart.height for chart in row) + MARGIN
    head = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {total} {y}' width='{total}' height='{y}' "
        f"role='img' {FONT} font-size='10' fill='#222'>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{total}' height='{y}' fill='#fff'/>",
        _text(MARGIN, MARGIN + 6, title, "font-size='15' font-weight='600'"),
    ]
    return "\n".join([*head, *legend, *parts, "</svg>"]) + "\n"


def _legend(colours: dict[str, str], total: int) -> tuple[list[str], int]:
    """The keys in rows, and where the first panel begins."""
    parts, x, y = [], MARGIN, MARGIN + 24
    for name, colour in colours.items():
        wide = 26 + 6 * len(name)
        if x + wide > total - MARGIN and x > MARGIN:
            x, y = MARGIN, y + 16
        parts.append(f"<rect x='{x}' y='{y - 8}' width='10' height='9' fill='{colour}'/>")
        parts.append(_text(x + 14, y, name))
        x += wide
    return parts, y + MARGIN


def _panel(chart: Chart, colours: dict[str, str], x: int, y: int, width: int, label: int) -> list[str]:
    parts = [_text(x, y + 12, chart.title, "font-size='12' font-weight='600'")]
    if chart.note:
        parts.append(_text(x, y + 27, chart.note, "fill='#666'"))
    longest = max((len(bar.said) for group in chart.groups for bar in group.bars), default=0)
    room = width - label - longest * LETTER - 12
    at = y + HEAD
    if chart.mark is not None and chart.scale == "chart" and chart.groups:
        there = x + label + room * chart.mark / chart.full(chart.groups[0])
        parts.append(
            f"<line x1='{there:.1f}' x2='{there:.1f}' y1='{at - 4}' y2='{y + chart.height}' "
            "stroke='#888' stroke-dasharray='3 3'/>"
        )
    for group in chart.groups:
        middle = at + len(group.bars) * BAR / 2 + 3
        parts.append(_text(x + label - 6, middle, group.label, "text-anchor='end'"))
        for bar in group.bars:
            long = room * bar.value / chart.full(group) if _drawn(bar) else 0.0
            said = escape(f"{group.label} {bar.series}: {bar.said}")
            parts.append(
                f"<rect x='{x + label}' y='{at}' width='{max(long, 0.5):.1f}' height='{BAR - 2}' "
                f"fill='{colours[bar.series]}'><title>{said}</title></rect>"
            )
            parts.append(_text(x + label + max(long, 0.5) + 4, at + BAR - 3, bar.said, "font-size='9'"))
            at += BAR
        at += GAP
    return parts


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' {more}>{escape(words)}</text>".replace("' >", "'>")


def _write_png(
    path: Path, title: str, charts: Sequence[Chart], columns: int, colours: dict[str, str]
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    columns = max(1, min(columns, len(charts)))
    rows = [charts[i : i + columns] for i in range(0, len(charts), columns)]
    heights = [max(chart.height for chart in row) for row in rows]
    figure, axes = pyplot.subplots(
        len(rows), columns, squeeze=False, layout="constrained",
        figsize=(4.6 * columns, sum(heights) / 80 + 1), height_ratios=heights,
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for number, chart in enumerate(charts):
        axis = axes[number // columns][number % columns]
        axis.set_axis_on()
        axis.set_title(f"{chart.title}\n{chart.note}" if chart.note else chart.title, fontsize=8, loc="left")
        at, ticks = 0.0, []
        for group in chart.groups:
            ticks.append((at + (len(group.bars) - 1) / 2, group.label))
            for bar in group.bars:
                long = bar.value / chart.full(group) if _drawn(bar) else 0.0
                axis.barh(at, long, height=0.8, color=colours[bar.series])
                axis.text(long + 0.01, at, bar.said, va="center", fontsize=6)
                at += 1
            at += 0.6
        if chart.mark is not None and chart.scale == "chart" and chart.groups:
            axis.axvline(
                chart.mark / chart.full(chart.groups[0]), color="#888", linestyle="--", linewidth=0.8
            )
        axis.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=6)
        axis.set_xticks([])
        axis.set_xlim(0, 1.25)
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    keys = [Patch(color=colours[name], label=name) for name in colours]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(6, len(keys)), fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
