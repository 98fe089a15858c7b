"""docs/metrics.md and the services have the same metrics: names, types and labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client import ProcessCollector

from outbox_server.services.dispatcher.metrics import DispatcherMetrics, WaitCause
from outbox_server.services.scheduler.explaining import WaitReason
from outbox_server.services.scheduler.metrics import SchedulerMetrics, WebhookMetrics
from outbox_server.services.stats.metrics import StatsMetrics
from outbox_server.shared.metrics.monitoring import Monitoring
from outbox_server.shared.metrics.ready_jobs import ReadyJobsCollector
from outbox_server.shared.settings import load_settings
from outbox_server.shared.templates.workers import WorkerPool

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(outbox_\w+)` \| (\w+) \|(.*?)\| (.+) \|$", re.MULTILINE)


async def nothing() -> tuple[int, int]:
    return 0, 0


def registered() -> dict[str, tuple[str, set[str]]]:
    """Return the type and labels of each metric, by the name that Prometheus stores."""
    monitoring = Monitoring("test")
    DispatcherMetrics(monitoring.registry)
    SchedulerMetrics(monitoring.registry)
    WebhookMetrics(monitoring.registry)
    StatsMetrics(monitoring.registry, nothing, ())
    ReadyJobsCollector(monitoring.registry, ())
    WorkerPool("module", load_settings(), monitoring.registry)
    found: dict[str, tuple[str, set[str]]] = {}
    for collector in set(monitoring.registry._collector_to_names):
        described: Any = collector
        if isinstance(collector, ProcessCollector):
            continue
        for family in described.describe():
            labels = set(getattr(collector, "_labelnames", ()))
            name = family.name + ("_total" if family.type == "counter" else "")
            if name.startswith("outbox_"):
                found[name] = family.type, labels
    return found


def documented() -> dict[str, tuple[str, set[str]]]:
    found: dict[str, tuple[str, set[str]]] = {}
    for name, kind, cell, _ in _ROW.findall(PAGE.read_text(encoding="utf-8")):
        # `a`, `b` or `a`: its values; `b`: its values
        heads = [part.split(":")[0] for part in cell.split(";")]
        found[name] = kind, set(re.findall(r"`(\w+)`", " ".join(heads)))
    return found


def test_the_page_lists_exactly_the_metrics_that_are_registered() -> None:
    assert documented() == registered()
    assert len(registered()) > 25


def test_every_wait_cause_is_a_wait_reason_that_a_job_can_be_explained_with() -> None:
    assert {cause.value for cause in WaitCause} <= {reason.name for reason in WaitReason}


def test_the_page_names_every_wait_cause() -> None:
    page = PAGE.read_text(encoding="utf-8")
    causes = [cause.name.lower() for cause in WaitCause]
    assert [cause for cause in causes if f"`{cause}`" not in page] == []
