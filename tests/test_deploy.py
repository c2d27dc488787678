"""What is in deploy/ and docs for those who watch a relay fits what a relay tells."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from peers import program

from relay.admin.ledger import REASONS
from relay.admin.metrics import FIGURES, table

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "relay.rules.yaml"

KNOWN = {figure.shown: set(figure.labels) for figure in FIGURES}
PROCESS = {"process_open_fds", "process_max_fds", "up"}
AROUND = {"job", "instance", "le"}


def names(expression: str) -> set[str]:
    """The metrics in an expression."""
    found = set(
        re.findall(r"\b(relay_[a-z_]+|process_[a-z_]+|up)\b(?![=\"])", re.sub(r'"[^"]*"', "", expression))
    )
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in KNOWN else name for name in found}


def labels(expression: str) -> set[str]:
    """The labels by which an expression selects or groups."""
    inside = re.findall(r"\{([^}]*)\}", expression)
    found = {label for part in inside for label in re.findall(r"(\w+)\s*(?:=~|!=|=)", part)}
    return found | {
        label.strip() for part in re.findall(r"by \(([^)]*)\)", expression) for label in part.split(",")
    }


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard."""
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "relay.json").read_text())
    return found


def dashboard_expressions() -> list[str]:
    """Every query of it."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def alert_expressions() -> list[str]:
    """Every alert's condition."""
    return [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *alert_expressions()])
def test_only_what_relay_tells_is_asked_for(expression: str) -> None:
    """Each query of the dashboard and each alert asks for metrics and labels that there are."""
    asked = names(expression)
    assert asked
    assert asked <= set(KNOWN) | PROCESS
    known = set().union(*(KNOWN.get(name, set()) for name in asked)) | AROUND
    assert labels(expression) <= known


def test_promtool_accepts_the_alerts() -> None:
    """`promtool check rules` and the alerts' own tests pass."""
    promtool = program("promtool")
    for arguments in (
        ["check", "rules", str(RULES)],
        ["test", "rules", str(RULES.with_name("relay.tests.yaml"))],
    ):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    """Panels have ids of their own, places that do not overlap, and the variables that their queries use exist."""
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    variables = {each["name"] for each in dashboard()["templating"]["list"]}
    used = {name for text in dashboard_expressions() for name in re.findall(r"\$(\w+)", text)}
    assert used - {"__rate_interval"} <= variables


def test_the_documented_figures_are_those_there_are() -> None:
    """The table in docs/admin.md is the code's; so are the reasons. relay.admin.metrics.table() prints it anew."""
    text = (ROOT / "docs" / "admin.md").read_text()
    assert table() in text
    assert ", ".join(f"`{reason}`" for reason in REASONS) in text


def test_figures_are_named_by_the_conventions() -> None:
    """Base units, no unit twice, one way to write each: what promtool cannot tell."""
    for figure in FIGURES:
        assert re.fullmatch(r"relay_[a-z]+(_[a-z]+)*", figure.name), figure.name
        assert not figure.words.endswith("."), figure.name
        if figure.kind == "histogram":
            assert figure.name.endswith("_seconds")
        assert not figure.name.endswith("_total")
