"""Alert rules, their promtool tests and the runbook agree. `make alerts` runs promtool itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from outbox_server.services.dispatcher.metrics import LATENESS_BUCKETS
from tests.firing_alerts import TROUBLES, compressed
from tests.unit.test_metrics_page import registered

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
# Metrics that Prometheus itself records about a target.
_PROMETHEUS_OWN = {"up"}


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in load("outbox.rules.yml")["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def metrics_in(expression: str) -> set[str]:
    """Return the metrics of an expression, without the suffixes of histogram samples."""
    found = set(re.findall(r"\b(outbox_\w+|up)\b(?!:)", re.sub(r"outbox:\S+", "", expression)))
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}


def test_every_alert_has_an_entry_in_the_runbook_and_every_entry_an_alert() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^## (\w+)$", page) == list(alerts())
    assert len(alerts()) > 10


def test_every_alert_leads_to_its_entry_and_has_a_severity() -> None:
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]


def test_every_alert_fires_in_one_test_and_stays_silent_in_another() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for test in load("outbox.tests.yml")["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case.get("exp_alerts") else silent).add(case["alertname"])
    assert fires == set(alerts())
    assert silent == set(alerts())


def test_a_real_trouble_makes_every_alert_fire() -> None:
    assert {name for *_, expected in TROUBLES for name in expected} == set(alerts())


def test_every_duration_is_shorter_where_the_alerts_are_made_to_fire() -> None:
    text = (FOLDER / "outbox.rules.yml").read_text(encoding="utf-8")
    durations = re.compile(r"(?:\[|for: )(\d+[a-z])\b")
    minutes = {f"{n}m": f"{n}s" for n in range(60)} | {"1h": "60s", "6h": "360s"}
    assert [minutes[one] for one in durations.findall(text)] == durations.findall(compressed(text))


def test_rules_use_only_metrics_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        assert metrics_in(rule["expr"]) <= registered().keys() | _PROMETHEUS_OWN, rule
        assert set(re.findall(r"outbox:[\w:]+", rule["expr"])) <= recorded, rule


def test_the_objective_is_a_boundary_of_the_histogram() -> None:
    # The share within 5 s can be computed only if a bucket ends at 5 s.
    expressions = " ".join(rule["expr"] for rule in rules())
    bounds = {float(found) for found in re.findall(r'le="([\d.]+)"', expressions)}
    assert bounds
    assert bounds <= set(LATENESS_BUCKETS)
