"""What the chart gives to Prometheus, and what autoscalers ask it about a real dispatcher."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge

from outbox_server.deploy.chart.rendering import render
from outbox_server.deploy.ports import free_port
from outbox_server.shared.metrics.endpoint import MetricsEndpoint
from tests import dispatchers
from tests.deploy.test_chart import VALUES, of_kind, scalers
from tests.eventually import eventually
from tests.prometheus import Prometheus
from tests.scheduler_stack import running_scheduler
from tests.scraping import scrape
from tests.smtp_servers import ScriptedServer, Wait

KUBERNETES: Final = Path(__file__).parents[2] / "docs" / "kubernetes.md"
AGE: Final = "outbox_oldest_due_age_seconds"
# The age that a second installation shows, in another namespace of the same Prometheus.
ELSEWHERE_S: Final = 86_400.0
COMPONENT: Final = "__meta_kubernetes_pod_label_app_kubernetes_io_component"


@dataclass
class Monitored:
    """A dispatcher with mail that waits, and the Prometheus that scrapes it."""

    prometheus: Prometheus
    address: str

    async def age(self) -> float:
        """The age of the oldest due mail, as the dispatcher shows it now."""
        return (await scrape(self.address)).value(AGE)

    async def check(self, query: str) -> None:
        """Check that a query gives one number, which is the age."""
        least = await self.age()

        async def scraped() -> float:
            found = await self.prometheus.query(query)
            assert len(found) <= 1, "an autoscaler takes one number"
            value = float(found[0]["value"][1]) if found else 0.0
            return value if value >= least else 0.0

        value = await eventually(scraped)
        assert least <= value <= await self.age() < ELSEWHERE_S


def relabelings() -> list[dict[str, Any]]:
    """The rules by which the PodMonitor of the chart names jobs, as Prometheus reads them."""
    (monitor,) = of_kind(render(VALUES["full"]), "PodMonitor")
    found = []
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        for rule in endpoint["relabelings"]:
            names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
            found.append({names.get(name, name): value for name, value in rule.items()})
    return found


def scraping(namespace: str, address: str) -> dict[str, Any]:
    """Scrape one pod as the Prometheus operator does."""
    labels = {"namespace": namespace, COMPONENT: "dispatcher"}
    return {
        # The operator's name for the job, which the rules of the PodMonitor replace.
        "job_name": f"podMonitor/{namespace}/outbox/0",
        "static_configs": [{"targets": [address], "labels": labels}],
        "relabel_configs": [
            {"target_label": "job", "replacement": f"{namespace}/outbox"},
            *relabelings(),
        ],
    }


@pytest.fixture
async def monitored(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Monitored]:
    address, other = (f"127.0.0.1:{free_port()}" for _ in range(2))
    registry = CollectorRegistry()
    Gauge(AGE, "Of another installation.", registry=registry).set(ELSEWHERE_S)
    elsewhere = MetricsEndpoint(other, registry)
    (rules,) = of_kind(render(VALUES["full"]), "PrometheusRule")
    never = Wait()
    async with AsyncExitStack() as stack:
        await elsewhere.start()
        stack.push_async_callback(elsewhere.close)
        smtp = await stack.enter_async_context(ScriptedServer({"mail": never}))
        scheduler = await stack.enter_async_context(
            running_scheduler(database_url, redis_url, min_gap="0", smtp_ports="any")
        )
        values = dispatchers.options(
            database_url,
            redis_url,
            smtp.url,
            metrics_listen=address,
            dispatcher_concurrency=1,
        )
        await stack.enter_async_context(dispatchers.running(dispatchers.settings_of(values)))
        stack.callback(never.event.set)
        # The first mail occupies the only slot, so the others wait.
        for _ in range(3):
            await scheduler.schedule(await scheduler.sender())
        await eventually(lambda: smtp.waiting["mail"] == 1)
        targets = [scraping("default", address), scraping("staging", other)]
        prometheus = await stack.enter_async_context(
            Prometheus(tmp_path / "prometheus", targets, yaml.safe_dump(rules["spec"]))
        )
        yield Monitored(prometheus, address)


async def test_autoscalers_get_the_age_of_the_oldest_due_mail_of_their_installation(
    monitored: Monitored,
) -> None:
    (keda,) = scalers(VALUES["keda"]).values()
    await monitored.check(keda["spec"]["triggers"][1]["metadata"]["query"])

    # The rule of the adapter, as the documentation has it.
    (text,) = re.findall(
        r"(?ms)^ *```yaml\n( *rules:\n *external:.*?)^ *```", KUBERNETES.read_text()
    )
    (rule,) = yaml.safe_load(text)["rules"]["external"]
    hpa = scalers(VALUES["full"])["outbox-dispatcher"]
    wanted = hpa["spec"]["metrics"][1]["external"]["metric"]["name"]
    series = rule["seriesQuery"].partition("{")[0]
    # Without a name in the rule, the adapter names the metric after the series.
    assert (series, "name" in rule) == (wanted, False)
    known = await monitored.prometheus.get("series", **{"match[]": rule["seriesQuery"]})
    (label,) = rule["resources"]["overrides"]
    assert "default" in {one[label] for one in known}
    query = rule["metricsQuery"].replace("<<.Series>>", series)
    await monitored.check(query.replace("<<.LabelMatchers>>", f'{label}="default"'))


async def test_the_jobs_of_a_pod_monitor_have_the_names_that_the_alerts_expect(
    monitored: Monitored,
) -> None:
    async def jobs() -> set[str]:
        found = await monitored.prometheus.query('up{job=~"outbox.*"} == 1')
        return {f"{one['metric']['namespace']} {one['metric']['job']}" for one in found}

    async def both() -> bool:
        return await jobs() == {"default outbox-dispatcher", "staging outbox-dispatcher"}

    await eventually(both)
    groups = (await monitored.prometheus.get("rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len([rule for rule in rules if rule["type"] == "alerting"]) > 10
    assert not [rule["name"] for rule in rules if rule["health"] == "err"]
