"""The benchmarks' page: its pictures and the README's few figures say what its tables say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# benchmarks/ is not installed. Last in the path: an installed relay must not be hidden by the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import page, published, table
from benchmarks.catalogue import catalogue
from benchmarks.load import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


def test_every_table_of_contenders_has_a_picture_that_is_of_it(tmp_path: Path) -> None:
    """Each picture on the page is what its table draws now, and none is missing or left over."""
    text = PAGE.read_text()
    drawn = published.draw(text, tmp_path)
    assert {cell["cell"] for cell in published.cells(text)} == set(page.PINNED)
    assert {path.name for path in drawn} == {
        path.name for path in (PAGE.parent / published.PICTURES).iterdir()
    }
    for path in drawn:
        assert path.read_text() == (PAGE.parent / published.PICTURES / path.name).read_text(), path.name
        assert f"({published.PICTURES}/{path.name})" in text


def test_the_readme_has_the_figures_of_the_page() -> None:
    """README's table is the one that the page's tables make, with a row for each work that it names."""
    made = published.headline(PAGE.read_text())
    assert made in (ROOT / "README.md").read_text()
    assert len(made.splitlines()) == 2 + len(published.SHOWN) + len(published.SHOWN_JOBS)


def _page(*rows: str) -> str:
    cell = next(one for one in catalogue() if one.name == "pipe-4pipes")
    heading = f"<!-- table: {cell.name} -->"
    return "\n".join([heading, "", *table.HEAD, *rows, "", table.END])


def test_what_failed_or_is_absent_is_no_peer(tmp_path: Path) -> None:
    """Who has no figures is left out of the pictures and of the ratios; a name with a bar in it is read whole."""
    text = _page(
        "| **`relay run`** | relay 1 | 4.00 (3.00 to 5.00) | 0.100 (0.090 to 0.110) | 0.010 | 0.090 | 9 |  |  |",
        "| `a \\| b` | a 1 | 2.00 (1.00 to 3.00) | 0.400 (0.300 to 0.500) | 0.001 | 0.399 | 2 | 2.00 | 0.25 |",
        "| `broken` | b 1 | failed | failed | | | | | |",
        "| `missing` | not here | | | | | | | |",
    )
    (cell,) = published.cells(text)
    assert [one["name"] for one in cell["contenders"]] == ["relay run", "a | b", "broken", "missing"]
    assert published.headline(text).splitlines()[2:] == [
        "| Pipe to 4 pipes, chunks and pipes of 1 MiB | 2.00 times | 0.25 |"
    ]
    bars, ratios = published.draw(text, tmp_path)
    assert (bars.name, ratios.name) == ("pipe-4pipes.svg", "ratios.svg")
    assert "a | b" in bars.read_text()
    assert "broken" not in bars.read_text()


def test_a_readme_without_a_place_is_refused(tmp_path: Path) -> None:
    """Where README has no place for the figures nothing is written over."""
    readme = tmp_path / "README.md"
    readme.write_text("# nothing\n")
    (tmp_path / "benchmarks.md").write_text(PAGE.read_text())
    with pytest.raises(BenchmarkError, match="headline"):
        published.main([str(tmp_path / "benchmarks.md"), str(readme)])
    assert readme.read_text() == "# nothing\n"
