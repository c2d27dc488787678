"""Bars: what is drawn is what was given."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from relay import charts
from relay.charts import PALETTE, Bar, Chart, Group, svg
from relay.errors import UsageError

SVG = "{http://www.w3.org/2000/svg}"
TWO = (
    Group("small <&>", (Bar("one", 1.0), Bar("two", 2.0, "two!"))),
    Group("large", (Bar("one", 10.0), Bar("two", math.nan, "none"))),
)


def drawn(text: str) -> list[ElementTree.Element]:
    """The bars, each a rectangle with a title of its own."""
    return [rect for rect in ElementTree.fromstring(text).iter(f"{SVG}rect") if len(rect)]


def widths(text: str) -> list[float]:
    """Of the bars, in order."""
    return [float(rect.attrib["width"]) for rect in drawn(text)]


def test_one_scale_for_all() -> None:
    """Bars are as long as their values say, measured by the longest; no value is no length."""
    one, two, ten, none = widths(svg("t", [Chart("c", TWO)]))
    assert one == pytest.approx(ten / 10, rel=0.02)
    assert two == pytest.approx(ten / 5, rel=0.02)
    assert none == 0.5


def test_a_scale_for_each_group() -> None:
    """With a scale a group the longest of each group is as long as that of any other."""
    one, two, ten, _none = widths(svg("t", [Chart("c", TWO, scale="group")]))
    assert two == ten
    assert one == pytest.approx(two / 2, rel=0.02)


def test_a_mark_is_within_the_panel() -> None:
    """The line stands where a bar of that value would end, also when no bar is as long."""
    text = svg("t", [Chart("c", (Group("g", (Bar("one", 1.0),)),), mark=4.0)])
    (line,) = ElementTree.fromstring(text).iter(f"{SVG}line")
    (bar,) = drawn(text)
    begins = float(bar.attrib["x"])
    assert float(line.attrib["x1"]) - begins == pytest.approx(4 * float(bar.attrib["width"]), rel=0.02)


def test_colours_belong_to_series() -> None:
    """A series has one colour in all charts; the order that is asked for decides which."""
    text = svg("t", [Chart("a", TWO), Chart("b", TWO[:1])], order=("two", "absent", "one"))
    by_series = {(str(rect[0].text).split()[-2].rstrip(":"), rect.attrib["fill"]) for rect in drawn(text)}
    assert by_series == {("two", PALETTE[0]), ("one", PALETTE[1])}


def test_words_are_escaped_and_all_there() -> None:
    """Titles, notes, names and values stand in the picture as they were given, whatever they hold."""
    root = ElementTree.fromstring(svg("a & b", [Chart("c < d", TWO, "note")]))
    words = {element.text for element in root.iter(f"{SVG}text")}
    assert {"a & b", "c < d", "note", "small <&>", "large", "1", "two!", "10", "none", "one", "two"} == words


def test_panels_do_not_overlap() -> None:
    """Charts of a row stand side by side, rows below each other, all within the picture."""
    many = [Chart(str(number), TWO[: 1 + number % 2]) for number in range(5)]
    root = ElementTree.fromstring(svg("t", many, columns=2))
    titles = {
        e.text: (float(e.attrib["x"]), float(e.attrib["y"]))
        for e in root.iter(f"{SVG}text")
        if e.attrib.get("font-size") == "12"
    }
    assert titles["0"][1] == titles["1"][1] < titles["2"][1] == titles["3"][1] < titles["4"][1]
    assert titles["0"][0] == titles["2"][0] < titles["1"][0]
    _x, _y, wide, high = map(float, root.attrib["viewBox"].split())
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.attrib.get("x", 0)) + float(rect.attrib["width"]) <= wide
        assert float(rect.attrib.get("y", 0)) + float(rect.attrib["height"]) <= high


def test_check_says_what_cannot_be(tmp_path: Path) -> None:
    """Another suffix, or a directory that is not there, is refused; an SVG in a directory that is, is not."""
    charts.check(tmp_path / "x.svg")
    with pytest.raises(UsageError, match=r"neither \.svg nor \.png"):
        charts.check(tmp_path / "x.gif")
    with pytest.raises(UsageError, match="is no directory"):
        charts.check(tmp_path / "no" / "x.svg")


def test_png(tmp_path: Path) -> None:
    """With matplotlib the same charts become a PNG."""
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'splice-relay[plot]'")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_charts; "
        "from relay.charts import Chart, write; "
        "write(Path(sys.argv[1]), 't', [Chart('c', test_charts.TWO[:1], 'n', mark=1.5)] * 3)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.png", Path(__file__).parent], check=True)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
