"""The Grafana dashboard equals the output of its script, and queries metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from outbox_server.deploy.grafana.dashboard import FILE, text
from outbox_server.deploy.grafana.panels import ROWS
from tests.unit.test_metrics_page import registered

PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}


def expressions() -> list[str]:
    document: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return [target["expr"] for panel in document["panels"] for target in panel.get("targets", ())]


def metrics_of(expression: str) -> set[str]:
    names = set(re.findall(r"\b((?:outbox|process)_\w+)", expression))
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}


def test_the_file_is_what_the_script_builds() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run `make dashboard`"


def test_every_query_asks_for_metrics_that_exist() -> None:
    assert len(expressions()) > 30
    for expression in expressions():
        found = metrics_of(expression)
        assert found, expression
        assert found <= registered().keys() | PROCESS, expression


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for expression in expressions() for name in metrics_of(expression)}
    assert registered().keys() - shown == set()


def test_labels_of_queries_and_legends_are_labels_of_their_metrics() -> None:
    targets = {"job", "instance", "le"}
    for row in ROWS:
        for panel in row.panels:
            for expression, legend in panel.queries:
                known = set(targets)
                for name in metrics_of(expression) - PROCESS:
                    known |= registered()[name][1]
                grouped = re.findall(r"by \(([^)]*)\)", expression)
                by = {label for labels in grouped for label in labels.split(", ")}
                shown = set(re.findall(r"{{(\w+)}}", legend))
                chosen = set(re.findall(r"[{,](\w+)(?:=|!=|=~|!~)\"", expression))
                assert by | shown | chosen <= known, expression
                assert shown <= by, expression


def test_panels_do_not_overlap() -> None:
    document: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


def test_the_provisioning_files_are_valid_and_name_a_prometheus() -> None:
    folder: Path = FILE.parent / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    providers = yaml.safe_load((folder / "dashboards" / "outbox.yml").read_text())
    assert providers["providers"][0]["options"]["path"]
