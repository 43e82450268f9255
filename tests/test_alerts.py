"""Alert rules and dashboard: what they compute, and where they send whoever is woken."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
RULES_TEST = RULES.with_name("rules_test.yml")
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")


def rules() -> list[dict[str, Any]]:
    """All rules of the file."""
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def expressions() -> list[str]:
    """Every expression of the rules and of the dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [rule["expr"] for rule in rules()] + shown


def metrics_named() -> set[str]:
    """The metrics that rules and dashboard read, as processes call them; what rules record themselves is not among them."""
    found: set[str] = set()
    for expression in expressions():
        without_strings = re.sub(r'"[^"]*"', '""', expression)
        found.update(re.findall(r"\b(?:credits|process)_[a-z_]+\b(?!\s*:)", without_strings))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


@pytest.mark.skipif(
    PROMTOOL is None,
    reason="promtool is not here (Debian: prometheus): rules are not evaluated, only read",
)
def test_the_rules_do_what_their_own_tests_say() -> None:
    """Prometheus's own tool evaluates them on made series: quiet where all is well, and each alarm with its words."""
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULES_TEST)]):
        done = subprocess.run(
            [PROMTOOL or "", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    """A severity, a sentence, and a heading of the runbook that exists."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in page.splitlines()
        if line.startswith("#")
    }
    alerts = [rule for rule in rules() if "alert" in rule]

    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in {"page", "ticket"}, alert["alert"]
        assert alert["annotations"]["summary"].endswith("."), alert["alert"]
        path, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert path == "docs/operations.md"
        assert anchor in headings, alert["alert"]


def test_every_alert_that_pages_is_evaluated_by_a_test() -> None:
    """None wakes anybody for the first time in earnest."""
    tested = {
        one["alertname"]
        for test in yaml.safe_load(RULES_TEST.read_text())["tests"]
        for one in test["alert_rule_test"]
        if one["exp_alerts"]
    }
    pages = {rule["alert"] for rule in rules() if rule.get("labels", {}).get("severity") == "page"}

    assert pages <= tested


def test_no_metric_is_told_apart_by_ids() -> None:
    """Labels are of bounded sets: what is grouped by is a topic, an outcome, a reason, a kind or a process."""
    grouped = set()
    for expression in expressions():
        for names in re.findall(r"by \(([^)]*)\)", expression):
            grouped |= {name.strip() for name in names.split(",")}

    assert grouped <= {
        "topic",
        "outcome",
        "reason",
        "kind",
        "cause",
        "status",
        "state",
        "pool",
        "type",
        "le",
    }


def test_the_dashboard_shows_what_processes_measure() -> None:
    """A panel for each of them, with a description where its title does not say it, and no two in one place."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [tuple(panel["gridPos"].values()) for panel in panels]

    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["targets"] for panel in panels if panel["type"] != "row")
