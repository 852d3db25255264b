"""promtool accepts the alerts and recording rules, and each alert fires when it should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from blip2_serve.observe import metrics
from support.monitoring import (
    ALERTS_TEST,
    ROOT,
    dashboard_expressions,
    needs,
    rule_groups,
    write_rules,
)


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    needs("promtool")
    shutil.copy(ALERTS_TEST, tmp_path)
    return write_rules(tmp_path / "rules.yaml")


def test_rules_are_valid(rules: Path) -> None:
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_not_before(rules: Path) -> None:
    test = rules.with_name(ALERTS_TEST.name)
    done = subprocess.run(["promtool", "test", "rules", test], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    alerts = {
        rule["alert"]: rule for group in rule_groups() for rule in group["rules"] if "alert" in rule
    }
    tested = re.findall(r'alertname="(\w+)", alertstate="firing"', ALERTS_TEST.read_text())

    assert {*tested} == alerts.keys()
    for alert in alerts.values():
        assert alert["annotations"].keys() == {"summary", "runbook"}
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_runbooks_name_sections_that_exist() -> None:
    document = (ROOT / "docs/operating.md").read_text()
    runbooks = [
        rule["annotations"]["runbook"]
        for group in rule_groups()
        for rule in group["rules"]
        if "alert" in rule
    ]
    named = re.findall(r'"([^"]+)" in docs/operating\.md', " ".join(runbooks))
    assert len(named) == sum("docs/operating.md" in runbook for runbook in runbooks) == 5
    assert [name for name in named if f"\n### {name}\n" not in document] == []


def test_rules_and_panels_ask_for_metrics_that_exist() -> None:
    parts = ("", "_bucket", "_count")
    known = {metric.exported + part for metric in metrics.catalogue() for part in parts}
    rules = [rule["expr"] for group in rule_groups() for rule in group["rules"]]
    asked = re.findall(r"\bray_blip2_\w+", " ".join([*rules, *dashboard_expressions().values()]))
    assert {*asked} - known == set()
    for metric in (
        metrics.ADMITTED,
        metrics.SHED,
        metrics.EXPIRED,
        metrics.REPLAYS,
        metrics.QUARANTINED,
    ):
        assert metric.exported in asked
    assert f"{metrics.STREAM_PAUSE.exported}_bucket" in asked
