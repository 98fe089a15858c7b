"""The Helm chart, rendered by Helm's engine: schema, validity, and the checks of platform teams."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from outbox_server.deploy.chart.rendering import (
    CHART,
    COPIED,
    manifests,
    render,
    schema_with_settings,
)
from outbox_server.shared.settings import Settings

DEPLOY: Final = CHART.parents[1]
VALUES: Final = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "ci").glob("*.yaml"))
}
MINIMAL: Final = VALUES["minimal"]
SERVICES: Final = ("scheduler", "dispatcher", "stats")
# Custom resources of operators; the schemas of Kubernetes do not include them.
CUSTOM: Final = {"ScaledObject", "PodMonitor", "PrometheusRule", "HTTPRoute"}

Resource = dict[str, Any]


def with_values(**changes: Any) -> dict[str, Any]:
    """The minimal values, with changes merged into their first level."""
    values: dict[str, Any] = copy.deepcopy(MINIMAL)
    for name, change in changes.items():
        if isinstance(change, dict):
            values[name] = {**values.get(name, {}), **change}
        else:
            values[name] = change
    return values


def of_kind(resources: list[Resource], *kinds: str) -> list[Resource]:
    return [one for one in resources if one["kind"] in kinds]


def pods(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    """Every pod template with its component."""
    for one in of_kind(resources, "Deployment", "StatefulSet", "Job"):
        template = one["spec"]["template"]
        yield template["metadata"]["labels"]["app.kubernetes.io/component"], template


def pod_of(resources: list[Resource], component: str) -> Resource:
    return dict(pods(resources))[component]


def test_there_are_several_values_to_check_with() -> None:
    assert VALUES.keys() == {"minimal", "full", "keda", "mesh", "sentinel", "stores"}


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_passes_lint(name: str) -> None:
    report = helm.lint(CHART, VALUES[name], strict=True)
    # "icon is recommended" is the only remark; a private chart has no icon.
    remarks = [
        one["error"] for one in report["messages"] if "icon is recommended" not in one["error"]
    ]
    assert (report["errors"], remarks) == ([], [])


@pytest.mark.parametrize("version", ["1.30", "1.33", "1.35", "1.37"])
def test_all_resources_are_valid_for_a_version_of_kubernetes(version: str) -> None:
    # Most resources are the same for all values; validating one takes 0.1 s.
    distinct = {yaml.safe_dump(one): one for values in VALUES.values() for one in render(values)}
    known = [one for one in distinct.values() if one["kind"] not in CUSTOM]
    assert len(known) > 40
    for one in known:
        kubernetes_validate.validate(one, version, strict=True)


def test_a_resource_with_an_unknown_field_is_refused() -> None:
    (first, *_) = of_kind(render(MINIMAL), "Deployment")
    first["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(first, "1.30", strict=True)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replicaCount": 3}, "replicaCount"),
        ({"scheduler": {"replica": 3}}, "replica"),
        ({"scheduler": {"replicas": 0}}, "minimum"),
        ({"dispatcher": {"service": {}}}, "service"),
        ({"dispatcher": {"autoscaling": {"lateness": {"source": "datadog"}}}}, "lateness/source"),
        ({"settings": {"OUTBOX_MIN_GAPP": "3s"}}, "invalid propertyName 'OUTBOX_MIN_GAPP'"),
        # A secret among the values would be stored in Helm's release in plain text.
        ({"settings": {"OUTBOX_DATABASE_URL": "x"}}, "invalid propertyName 'OUTBOX_DATABASE_URL'"),
        ({"settings": {"OUTBOX_MIN_GAP": {"seconds": 3}}}, "OUTBOX_MIN_GAP"),
        ({"extraEnv": [{"name": "OUTBOX_AUTH", "value": "off"}]}, "extraEnv"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"secrets": {"delivery": "vault"}}, "delivery"),
        ({"secrets": {"keys": {"migrationDatabaseUrl": "a/b"}}}, "migrationDatabaseUrl"),
        ({"listenAddress": "127.0.0.1"}, "listenAddress"),
        ({"networkPolicy": {"clients": [{"podSelectors": {}}]}}, "podSelectors"),
        ({"networkPolicy": {"smtp": {"ports": [70000]}}}, "maximum"),
        ({"shutdownGraceSeconds": "30s"}, "shutdownGraceSeconds"),
        ({"commonLabels": {"team": "a b"}}, "commonLabels/team"),
        ({"podSecurityContext": {"runAsUser": 0}}, "podSecurityContext/runAsUser"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "podDisruptionBudget/maxUnavailable"),
        ({"jobs": {"replicas": 1}}, "replicas"),
        ({"networkPolicy": {"dns": {"ports": []}}}, "networkPolicy/dns/ports"),
    ],
)
def test_an_unknown_or_wrong_value_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm.HelmError, match=complaint):
        render(with_values(**values))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"secrets": {"existingSecret": ""}}, "secrets.existingSecret: name the Secret"),
        ({"tls": {"existingSecret": ""}}, "tls.existingSecret: name a Secret"),
        ({"tls": {"plaintext": True}}, "tls.plaintext: true, but tls.existingSecret is set"),
        (
            {"tls": {"existingSecret": "", "plaintext": True, "clientCaKey": "ca.crt"}},
            "tls.clientCaKey: client certificates require TLS",
        ),
        (
            {"stats": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}}},
            "stats.autoscaling.maxReplicas: 4 is below minReplicas, 5",
        ),
        (
            {"dispatcher": {"autoscaling": {"lateness": {"source": "keda"}}}},
            "lateness.source: keda, but dispatcher.autoscaling.enabled is false",
        ),
        (
            {
                "metrics": {"enabled": False},
                "dispatcher": {"autoscaling": {"enabled": True, "lateness": {"source": "keda"}}},
            },
            "lateness.source: keda needs metrics.enabled",
        ),
        (
            {"metrics": {"enabled": False, "prometheusRule": {"enabled": True}}},
            "metrics.prometheusRule.enabled: true, but metrics.enabled is false",
        ),
    ],
)
def test_values_that_are_wrong_together_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm.HelmError, match=complaint):
        render(with_values(**values))


def test_the_plain_manifests_and_the_schema_are_current() -> None:
    written = (DEPLOY / "manifests" / "outbox.yaml").read_text(encoding="utf-8")
    assert written == manifests(), "run make manifests"
    schema = (CHART / "values.schema.json").read_text(encoding="utf-8")
    assert schema == schema_with_settings(), "run make manifests"
    for source in COPIED:
        copy_ = (CHART / "files" / source.name).read_text(encoding="utf-8")
        assert copy_ == source.read_text(encoding="utf-8"), "run make manifests"


def test_every_variable_that_the_chart_sets_is_a_setting() -> None:
    known = {f"OUTBOX_{name.upper()}" for name in Settings.model_fields}
    for values in VALUES.values():
        resources = render(values)
        for one in of_kind(resources, "ConfigMap"):
            names = {name for name in one["data"] if name.startswith("OUTBOX_")}
            assert names - known == set(), "the chart sets what no service reads"
        for _, pod in pods(resources):
            for variable in pod["spec"]["containers"][0]["env"]:
                name = variable["name"].removesuffix("_FILE")
                assert name in known or not name.startswith("OUTBOX_")


@pytest.mark.parametrize("name", VALUES)
def test_every_pod_is_locked_down(name: str) -> None:
    for _, pod in pods(render(VALUES[name])):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 10_000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        # The rest of the profile "restricted" of Pod Security Admission.
        assert not [name for name in spec if name.startswith("host")]
        assert all(
            one.keys() - {"name"} <= {"configMap", "emptyDir", "secret"}
            for one in spec["volumes"] or ()
        )
        for container in spec["containers"]:
            assert not any("hostPort" in port for port in container.get("ports", ()))
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_the_three_probes_differ_and_only_readiness_depends_on_the_stores() -> None:
    resources = render(MINIMAL)
    for component in SERVICES:
        (container,) = pod_of(resources, component)["spec"]["containers"]
        asked = {
            probe: container[probe]["grpc"]["service"]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        }
        assert asked == {
            "startupProbe": "liveness",
            "livenessProbe": "liveness",
            "readinessProbe": "readiness",
        }
        start, live = container["startupProbe"], container["livenessProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 60
        assert live["periodSeconds"] * live["failureThreshold"] >= 30


@pytest.mark.parametrize("name", VALUES)
def test_the_pod_outlives_the_grace_of_its_service(name: str) -> None:
    resources = render(VALUES[name])
    config = of_kind(resources, "ConfigMap")[0]["data"]
    grace = int(config["OUTBOX_SHUTDOWN_GRACE"].removesuffix("s"))
    for component in SERVICES:
        spec = pod_of(resources, component)["spec"]
        assert spec["terminationGracePeriodSeconds"] == grace + 15
        # Behind an address that callers share, it serves until all nodes know that it ends.
        hook = spec["containers"][0].get("lifecycle", {"preStop": {"exec": {"command": ()}}})
        pause = () if component == "dispatcher" else ["sleep", "5"]
        assert hook["preStop"]["exec"]["command"] == pause
    assert name == "full" or grace == 30


def selected(resources: list[Resource], selector: dict[str, str]) -> set[str]:
    return {
        component
        for component, pod in pods(resources)
        if selector.items() <= pod["metadata"]["labels"].items()
    }


@pytest.mark.parametrize("name", VALUES)
def test_every_selector_selects_the_pods_of_its_component_and_no_others(name: str) -> None:
    resources = render(VALUES[name])
    for one in resources:
        component = one["metadata"]["labels"]["app.kubernetes.io/component"]
        spec = one.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector is None or one["kind"] == "PodMonitor":
            continue
        chosen = selected(resources, selector.get("matchLabels", selector))
        assert chosen == {component}


def test_each_service_has_an_address_for_all_pods_and_one_for_each_pod() -> None:
    resources = render(MINIMAL)
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(resources, "Service")}
    headless = {name for name, spec in services.items() if spec.get("clusterIP") == "None"}
    assert headless == {"outbox-scheduler-headless", "outbox-stats-headless", "outbox-dispatcher"}
    (dispatchers,) = of_kind(resources, "StatefulSet")
    # The host names of its pods are outbox-dispatcher-N.outbox-dispatcher.
    assert dispatchers["spec"]["serviceName"] == dispatchers["metadata"]["name"] in headless


def secret_keys(resources: list[Resource], component: str) -> set[str]:
    spec = pod_of(resources, component)["spec"]
    mounted = {
        item["key"]
        for volume in spec["volumes"] or []
        if volume.get("secret", {}).get("secretName") == "outbox"
        for item in volume["secret"]["items"]
    }
    read = {
        one["valueFrom"]["secretKeyRef"]["key"]
        for one in spec["containers"][0]["env"]
        if "valueFrom" in one
    }
    assert not (mounted and read)
    return mounted | read


@pytest.mark.parametrize("delivery", ["files", "environment"])
def test_each_pod_gets_only_the_secrets_that_it_needs(delivery: str) -> None:
    keys = {"keys": {"smtpUrl": "smtp-url"}}
    resources = render(
        with_values(secrets={"delivery": delivery, **keys}, operatorKey={"existingSecret": "first"})
    )
    everything = {"database-url", "redis-url", "encryption-keys", "smtp-url"}
    assert secret_keys(resources, "scheduler") == everything
    assert secret_keys(resources, "dispatcher") == everything
    for component in ("stats", "migrate", "operator-key"):
        assert secret_keys(resources, component) == {"database-url"}


@pytest.mark.parametrize("delivery", ["files", "environment"])
def test_behind_a_pooler_only_the_migrations_get_the_url_of_postgresql_itself(
    delivery: str,
) -> None:
    values = copy.deepcopy(VALUES["stores"])
    values["secrets"]["delivery"] = delivery
    resources = render(values)
    assert secret_keys(resources, "migrate") == {"direct-database-url"}
    for component in SERVICES:
        assert "direct-database-url" not in secret_keys(resources, component)
        assert "database-url" in secret_keys(resources, component)
    (variable,) = pod_of(resources, "migrate")["spec"]["containers"][0]["env"]
    if delivery == "files":
        assert variable == {
            "name": "OUTBOX_DATABASE_URL_FILE",
            "value": "/run/secrets/outbox/direct-database-url",
        }
    else:
        assert variable["name"] == "OUTBOX_DATABASE_URL"
    assert ports_out(resources, "migrate") == {53, 6432, 5432}


def checksums(values: dict[str, Any]) -> list[dict[str, str]]:
    resources = render(values)
    return [pod_of(resources, component)["metadata"]["annotations"] for component in SERVICES]


def test_a_change_of_the_configuration_or_of_the_secret_restarts_every_service() -> None:
    before = checksums(MINIMAL)
    assert checksums(MINIMAL) == before
    for changes in (
        {"settings": {"OUTBOX_MIN_GAP": "3s"}},
        {"replyRules": "# none"},
        {"secrets": {"revision": "2"}},
    ):
        after = checksums(with_values(**changes))
        assert all(new != old for new, old in zip(after, before, strict=True)), changes


def test_migrations_run_before_an_installation_and_before_an_upgrade() -> None:
    (job,) = of_kind(render(MINIMAL), "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == ["migrate"]
    # At that time no other resource of the chart exists.
    text = yaml.safe_dump(job)
    assert "configMapRef" not in text
    assert "serviceAccountName" not in text
    policies = of_kind(render(MINIMAL), "NetworkPolicy")
    (policy,) = [one for one in policies if one["metadata"]["name"] == "outbox-migrate"]
    hook = policy["metadata"]["annotations"]
    assert hook["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert int(hook["helm.sh/hook-weight"]) < 0


def ports_out(resources: list[Resource], component: str) -> set[int]:
    (policy,) = [
        one
        for one in of_kind(resources, "NetworkPolicy")
        if one["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    return {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}


def test_policies_let_each_pod_reach_what_it_needs_and_nothing_else() -> None:
    resources = render(with_values(operatorKey={"existingSecret": "first"}))
    mail = {53, 5432, 6379, 25, 465, 587, 443}
    assert ports_out(resources, "scheduler") == ports_out(resources, "dispatcher") == mail
    for component in ("stats", "migrate", "operator-key"):
        assert ports_out(resources, component) == {53, 5432}
    full = render(VALUES["full"])
    assert ports_out(full, "dispatcher") == {53, 5353, 5433, 6380, 26379, 587, 4317}
    assert ports_out(full, "test") == {53, 5353, 50051, 50052, 50053, 4317}


def scalers(values: dict[str, Any]) -> dict[str, Resource]:
    found = of_kind(render(values), "HorizontalPodAutoscaler", "ScaledObject")
    return {one["metadata"]["name"]: one for one in found}


def test_the_scaled_workloads_have_no_fixed_number_of_pods() -> None:
    assert scalers(MINIMAL) == {}
    found = scalers(VALUES["full"])
    resources = render(VALUES["full"])
    workloads = {
        one["metadata"]["name"]: one for one in of_kind(resources, "Deployment", "StatefulSet")
    }
    assert found.keys() == workloads.keys()
    for name, scaler in found.items():
        assert "replicas" not in workloads[name]["spec"]
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == (workloads[name]["kind"], name)


def test_dispatchers_scale_on_lateness_by_an_external_metric_or_by_keda() -> None:
    hpa = scalers(VALUES["full"])["outbox-dispatcher"]
    assert [one["type"] for one in hpa["spec"]["metrics"]] == ["Resource", "External"]
    (keda,) = scalers(VALUES["keda"]).values()
    assert keda["kind"] == "ScaledObject"
    assert [one["type"] for one in keda["spec"]["triggers"]] == ["cpu", "prometheus"]
    # Not those of another installation. test_monitoring.py asks a Prometheus.
    query = 'max(outbox_oldest_due_age_seconds{namespace="default"})'
    assert keda["spec"]["triggers"][1]["metadata"]["query"] == query


def test_the_names_follow_the_release() -> None:
    names = {one["metadata"]["name"] for one in render(MINIMAL, name="mail")}
    assert all(name.startswith("mail-outbox") for name in names)
    long = {one["metadata"]["name"] for one in render(MINIMAL, name="x" * 53)}
    assert all(len(name) <= 63 for name in long)


def test_the_versions_of_chart_and_distribution_agree() -> None:
    root = Path(__file__).parents[2]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = chart["version"]
    assert chart["appVersion"] == version
    assert f'\nversion = "{version}"\n' in (root / "pyproject.toml").read_text()
    assert f"ARG VERSION={version}\n" in (DEPLOY / "image" / "Dockerfile").read_text()
