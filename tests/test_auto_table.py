"""The table of `auto` beside the best fixed method: who runs when, what counts, what it says; one hop in earnest."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.bench.cell import GIB, MIB, Denied, Figures, Method, Outcome, Place
from relay.bench.trial import Span
from relay.errors import RelayError

# benchmarks/ is not installed. Last in the path: an installed relay must not be hidden by the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import auto, page

SPAN, LONG = auto.spans(0.001, 0.002)
PLACE = Place("file", "unix", 1, MIB)
Costs = dict[str, Callable[[], float]]


def figures(cpu: float, used: str = "splice", **measured: object) -> Figures:
    """As if a GiB had gone."""
    return Figures(GIB, 1.0, cpu, 1, GIB, used, dict(measured))


class Runs:
    """Stands for a Bench: what each method costs, who ran in which order, and for how long."""

    def __init__(self, costs: Costs, **measured: object) -> None:
        self.costs, self.measured = costs, measured
        self.order: list[tuple[Method, Span]] = []

    def __call__(self, place: Place, method: Method, span: Span) -> Outcome:
        """One run."""
        self.order.append((method, span))
        if method not in self.costs:
            return Denied("not here")
        return figures(self.costs[method](), **(self.measured if method == "auto" else {}))


def compared(runs: Runs, rounds: int = 5, most: int = 17) -> auto.Compared:
    """One cell of them."""
    return auto.compared(PLACE, runs, SPAN, LONG, rounds, most)


def test_all_run_in_turn_and_each_round_begins_with_another() -> None:
    """In each round every method has its turn; the first of one round is the second of none before it."""
    runs = Runs({m: lambda: 1.0 for m in ("auto", "splice", "sendfile", "copy")})
    cell = compared(runs, rounds=4)
    order = [method for method, _span in runs.order if method != "vmsplice"]  # which is denied
    assert order[:8] == ["auto", "splice", "sendfile", "copy", "splice", "sendfile", "copy", "auto"]
    assert [sorted(order[at : at + 4]) for at in range(0, 16, 4)] == [
        ["auto", "copy", "sendfile", "splice"]
    ] * 4
    assert all(span is SPAN for _method, span in runs.order)
    assert cell.ratios == [1.0] * 4
    assert cell.long is None  # auto measured nothing here


def test_ratios_are_those_of_one_round() -> None:
    """What disturbs a whole round cancels out: auto is divided by the best method of the same round."""
    weather = iter([1.0, 5.0, 2.0, 9.0, 1.0])
    now = [1.0]

    def first() -> float:
        return now[0]

    def begin() -> float:
        now[0] = next(weather)
        return 1.1 * now[0]

    runs = Runs({"auto": begin, "copy": first})
    place = Place("tcp", "tcp", 1, 512)
    order = []
    cell = auto.Compared(place)
    for _ in range(5):  # auto first in each, as the weather is its
        found = {method: runs(place, method, SPAN) for method in ("auto", "copy")}
        order.append(found)
        cell.rounds.append({m: f for m, f in found.items() if isinstance(f, Figures)})
    assert cell.ratio == pytest.approx(1.1)
    assert cell.interval == pytest.approx((1.1, 1.1))


def test_who_is_dear_beyond_doubt_is_left_out() -> None:
    """After two rounds only those that may be the best go on, and the best is among them."""
    runs = Runs({"auto": lambda: 1.0, "splice": lambda: 1.0, "sendfile": lambda: 1.2, "copy": lambda: 3.0})
    cell = compared(runs)
    assert [sum(method == m for m, _span in runs.order) for method in ("splice", "sendfile", "copy")] == [
        5,
        5,
        2,
    ]
    assert (cell.best, cell.fixed) == ("splice", ["splice", "sendfile"])


@pytest.mark.parametrize(("costs", "rounds"), [((1.0, 1.2), 17), ((0.9, 1.0), 5), ((1.2, 1.3), 5)])
def test_rounds_are_added_while_it_is_in_doubt(costs: tuple[float, float], rounds: int) -> None:
    """Where the interval reaches across 5 % there are more rounds, up to the most; else as few as were asked for."""
    turns = 0

    def cost() -> float:
        nonlocal turns
        turns += 1
        return costs[turns % 2]

    assert len(compared(Runs({"auto": cost, "copy": lambda: 1.0})).rounds) == rounds


def test_a_stream_that_may_change_is_looked_at_for_long() -> None:
    """Where auto measures, one long stream follows: its changes, and what went another way than the chosen one."""
    went = {"bytes": {"zero-copy": 99, "copy": 1}, "way": "zero-copy", "began": "zero-copy", "changes": 0}
    runs = Runs({"auto": lambda: 1.0, "splice": lambda: 1.0}, **went)
    cell = compared(runs)
    assert runs.order[-1] == ("auto", LONG)
    assert cell.row()[-3:] == ["1.00", "0", "1.00%"]
    assert cell.took() == "splice"


def test_what_fails_once_is_tried_again_and_what_fails_twice_is_said() -> None:
    """A run that fails is repeated; one that fails again makes its cell a failed one, with the reason."""
    failures = iter([True, False])

    def once() -> float:
        if next(failures, False):
            raise RelayError("it broke")
        return 1.0

    assert compared(Runs({"auto": lambda: 1.0, "copy": once})).judged

    def always() -> float:
        raise RelayError("it broke")

    cell = compared(Runs({"auto": lambda: 1.0, "copy": always}))
    assert not cell.judged
    assert cell.row()[1] == "failed: copy: it broke"
    assert "file-unix, 1, 1 MiB: failed: copy: it broke" in list(auto.sentences([cell]))


@pytest.mark.parametrize(("count", "inner"), [(1, 0), (4, 0), (5, 0), (7, 0), (8, 1), (9, 1), (17, 4)])
def test_the_interval_is_as_narrow_as_is_sure(count: int, inner: int) -> None:
    """So many of the least and of the greatest values are outside of it."""
    assert auto.interval(range(count)) == (inner, count - 1 - inner)


def test_the_interval_holds_the_true_median() -> None:
    """Of a thousand series of a skewed distribution nine in ten intervals hold its median."""
    chance = random.Random(1)
    hits = 0
    for _ in range(1000):
        low, high = auto.interval([chance.expovariate(1.0) for _ in range(9)])
        hits += low <= 0.6931 <= high
    assert hits >= 900


def test_losses_are_as_plain_as_wins() -> None:
    """A cell that is dearer is bold in its row and has a sentence; the last line counts all and names the worst."""
    good = compared(Runs({"auto": lambda: 1.0, "splice": lambda: 1.0}))
    bad = compared(Runs({"auto": lambda: 1.5, "splice": lambda: 1.6, "vmsplice": lambda: 1.0}))
    text = auto.table([good, bad], SPAN)
    assert "| **1.50 (1.50 to 1.50)** |" in text
    assert "| 1.00 (1.00 to 1.00) |" in text
    last = text.strip().splitlines()[-1]
    assert "2 cells: auto is within 5 % of the best fixed method in 1 (1 of them beyond doubt)" in last
    assert "dearer in 1 (1 beyond doubt)" in last
    assert "1.50 times: auto took splice, vmsplice is cheaper, and it measures nothing there" in last
    assert "- In 1 cells auto is the best fixed method from the first byte to the last" in text


def test_one_hop_in_earnest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command runs real streams, prints the table, writes it into its place on a page and each run to the JSON."""
    target = tmp_path / "page.md"
    target.write_text("a\n<!-- table: auto -->\nold\n<!-- /table -->\nb\n")
    argv = ["--only", "unix-null", "--seconds", "0.001", "--long", "0.001", "--runs", "2", "--most", "2"]
    assert auto.main([*argv, "--page", str(target), "--json", str(tmp_path / "runs.json")]) == 0
    said = capsys.readouterr().out
    written = target.read_text()
    assert written.startswith("a\n<!-- table: auto -->\n\nRuns of 0.001 s in turn")
    assert written.endswith("<!-- /table -->\nb\n")
    assert [line for line in said.splitlines() if line.startswith("| unix-null")] == [
        line for line in written.splitlines() if line.startswith("| unix-null")
    ]
    cells = json.loads((tmp_path / "runs.json").read_text())
    assert [cell["cell"] for cell in cells] == [
        f"unix-null, 1, {size}" for size in ("512 B", "64 KiB", "1 MiB")
    ]
    for cell in cells:
        assert [set(found) >= {"auto"} for found in cell["rounds"]] == [True, True]
        assert all(one["cpu_s_per_gib"] > 0 for found in cell["rounds"] for one in found.values())


def test_the_page_has_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks.page PAGE --only auto` makes the same table, here of one hop."""
    monkeypatch.setattr(auto, "HOPS", ("memory-null",))
    target = tmp_path / "page.md"
    target.write_text("<!-- table: auto -->\n<!-- /table -->\n")
    assert page.main([str(target), "--only", "auto", "--runs", "2", "--mib", "1"]) == 0
    assert "| memory-null, 1, 1 MiB | " in target.read_text()
    assert "**1 cells: auto is within 5 %" in target.read_text()


def test_a_page_without_a_place_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """The page is as it was, and the exit code 2."""
    (tmp_path / "page.md").write_text("nothing\n")
    assert auto.main(["--page", str(tmp_path / "page.md")]) == 2
    assert (tmp_path / "page.md").read_text() == "nothing\n"
