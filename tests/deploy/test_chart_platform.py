"""What the rules of a cluster ask of the chart: labels, placement, users, upgrades, a test."""

from __future__ import annotations

import itertools
import json
from typing import Any, Final

import helm_python as helm
import pytest
import yaml

from outbox_server.deploy.chart.rendering import CHART, COPIED, render
from tests.deploy.test_chart import (
    MINIMAL,
    SERVICES,
    VALUES,
    Resource,
    of_kind,
    pod_of,
    pods,
    with_values,
)

JOBS: Final = ("migrate", "operator-key", "test")
# What Kubernetes refuses to change in a resource that exists.
IMMUTABLE: Final = {
    "Deployment": ("selector",),
    "StatefulSet": ("selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates"),
    "Service": ("clusterIP",),
}


def test_common_labels_are_on_every_resource_and_pod_and_replace_no_other() -> None:
    mine = {"cost-center": "4711", "app.kubernetes.io/name": "mine"}
    pod_labels = {"cost-center": "1", "app.kubernetes.io/component": "mine"}
    values = with_values(
        commonLabels=mine,
        scheduler={"podLabels": pod_labels},
        operatorKey={"existingSecret": "first"},
        gateway={"enabled": True},
    )
    resources = render(values)
    labels = [one["metadata"]["labels"] for one in resources]
    labels += [pod["metadata"]["labels"] for _, pod in pods(resources)]
    for one in labels:
        assert one["cost-center"] in ("4711", "1")
        assert one["app.kubernetes.io/name"] == "outbox"
    assert pod_of(resources, "scheduler")["metadata"]["labels"]["cost-center"] == "1"


def test_labels_that_are_left_empty_in_a_file_are_none() -> None:
    empty = {"podLabels": None, "podAnnotations": None}
    values = with_values(commonLabels=None, scheduler=empty, jobs=empty)
    assert render(values) == render(MINIMAL)


def test_the_pods_of_jobs_run_where_the_values_say() -> None:
    wanted = VALUES["full"]["jobs"]
    for job in JOBS:
        pod = pod_of(render(VALUES["full"]), job)
        for name in ("nodeSelector", "tolerations", "priorityClassName"):
            assert pod["spec"][name] == wanted[name]
        assert pod["metadata"]["annotations"] == wanted["podAnnotations"]
        assert pod["metadata"]["labels"]["team"] == "mail"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        # They run once, so there is nothing to spread.
        assert "topologySpreadConstraints" not in pod["spec"]


def test_a_cluster_may_choose_the_ids_of_users_and_groups() -> None:
    ids = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"))
    for _, pod in pods(render(with_values(podSecurityContext=ids))):
        assert pod["spec"]["securityContext"] == {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }


def test_every_service_has_the_ip_families_that_the_values_name() -> None:
    resources = render(VALUES["full"])
    policies = [one["spec"]["ipFamilyPolicy"] for one in of_kind(resources, "Service")]
    assert policies == ["PreferDualStack"] * 6
    assert all("ipFamilyPolicy" not in one["spec"] for one in of_kind(render(MINIMAL), "Service"))
    # An empty `to` allows every address, of IPv6 too.
    for one in of_kind(render(MINIMAL), "NetworkPolicy"):
        assert all("to" not in rule for rule in one["spec"]["egress"])


def test_a_budget_never_keeps_a_node_with_the_only_pod_from_being_drained() -> None:
    alone = {"replicas": 1}
    resources = render(with_values(scheduler=alone, dispatcher=alone, stats=alone))
    budgets = of_kind(resources, "PodDisruptionBudget")
    assert len(budgets) == len(SERVICES)
    for one in budgets:
        assert one["spec"]["maxUnavailable"] >= 1
        assert "minAvailable" not in one["spec"]


def unchangeable(resources: list[Resource]) -> dict[tuple[str, str], Any]:
    return {
        (one["kind"], one["metadata"]["name"]): [
            one["spec"].get(field) for field in IMMUTABLE[one["kind"]]
        ]
        for one in of_kind(resources, *IMMUTABLE)
    }


def test_an_upgrade_between_any_two_values_changes_nothing_that_is_immutable() -> None:
    rendered = {name: unchangeable(render(values)) for name, values in VALUES.items()}
    for old, new in itertools.combinations(rendered, 2):
        for name in rendered[old].keys() & rendered[new].keys():
            assert rendered[old][name] == rendered[new][name], (old, new, name)


def test_helm_test_asks_each_service_at_an_address_that_exists() -> None:
    resources = render(VALUES["full"])
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(resources, "Service")}
    containers = pod_of(resources, "test")["spec"]["containers"]
    assert {one["name"] for one in containers} == set(SERVICES)
    for one in containers:
        *words, address = one["args"]
        assert words == ["version", "--server"]
        host, port = address.split(":")
        service = services[host.split(".")[-1]]
        assert service["ports"][0]["port"] == int(port)
        assert service["selector"]["app.kubernetes.io/component"] == one["name"]
    # It needs a key.
    assert "test" not in dict(pods(render(MINIMAL)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"OUTBOX_TLS_CA": "/etc/outbox/services/ca.crt"}),
        ({"gateway": {"services": {"caKey": ""}}}, {"OUTBOX_TLS_CA": "system"}),
        ({"tls": {"existingSecret": "", "plaintext": True}}, {"OUTBOX_PLAINTEXT": "true"}),
    ],
)
def test_helm_test_trusts_the_services_as_the_gateway_does(
    values: dict[str, Any], expected: dict[str, str]
) -> None:
    resources = render(with_values(operatorKey={"existingSecret": "first"}, **values))
    for container in pod_of(resources, "test")["spec"]["containers"]:
        given = {one["name"]: one["value"] for one in container["env"]}
        assert given.pop("OUTBOX_API_KEY_FILE") == "/run/secrets/operator/api-key"
        assert given == expected


def test_the_notes_name_the_test_if_there_is_a_key_for_it() -> None:
    with helm.Chart.load(CHART) as chart:
        for key in ("", "first"):
            values = with_values(operatorKey={"existingSecret": key})
            files = chart.render(values, name="outbox", namespace="mail")
            (notes,) = [text for path, text in files.items() if path.endswith("NOTES.txt")]
            assert ("helm --namespace mail test outbox" in notes) == bool(key)


def test_the_rules_and_the_dashboard_are_those_of_the_repository() -> None:
    resources = render(VALUES["full"])
    rules, dashboard = (path.read_text(encoding="utf-8") for path in COPIED)
    (rule,) = of_kind(resources, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(rules)
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    (found,) = [one for one in of_kind(resources, "ConfigMap") if "outbox.json" in one["data"]]
    assert json.loads(found["data"]["outbox.json"]) == json.loads(dashboard)
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_nothing_of_an_operator_is_installed_unless_it_is_enabled(kind: str) -> None:
    assert of_kind(render(VALUES["full"]), kind)
    assert not of_kind(render(MINIMAL), kind)
