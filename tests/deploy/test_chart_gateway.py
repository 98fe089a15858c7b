"""The gateway of the Helm chart."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest

from outbox_server.deploy.certificates import self_signed
from outbox_server.deploy.chart.rendering import render
from outbox_server.deploy.envoy.files import envoy_command
from outbox_server.deploy.envoy.gateway import HEALTH
from tests.deploy.pods import BIN
from tests.deploy.test_chart import MINIMAL, VALUES, Resource, of_kind, pod_of, with_values

WITH_GATEWAY = [name for name, values in VALUES.items() if "gateway" in values]


def of_gateway(resources: list[Resource], kind: str) -> list[Resource]:
    return [one for one in of_kind(resources, kind) if one["metadata"]["name"] == "outbox-gateway"]


def gateway(values: dict[str, Any]) -> Resource:
    (container,) = pod_of(render(values), "gateway")["spec"]["containers"]
    found: Resource = container
    return found


def test_there_is_no_gateway_unless_it_is_enabled() -> None:
    resources = render(MINIMAL)
    assert not [one for one in resources if one["metadata"]["name"] == "outbox-gateway"]
    peers = str([one["spec"] for one in of_kind(resources, "NetworkPolicy")])
    assert "gateway" not in peers
    assert set(WITH_GATEWAY) == {"full", "keda", "mesh"}


def arguments_with_files(name: str, folder: Path) -> list[str]:
    """The arguments of the gateway, with paths in a folder that has the files."""
    certificate = self_signed(folder / "made")
    arguments = []
    for argument in gateway(VALUES[name])["args"]:
        inside = argument.replace("/etc/outbox", f"{folder}/etc")
        arguments.append(inside.replace("/run/gateway", f"{folder}/run"))
        for file in map(Path, re.findall(rf"{folder}/etc/\S+", inside)):
            made = certificate.private if file.suffix == ".key" else certificate.public
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(made.read_bytes())
    return arguments


@pytest.mark.parametrize("name", WITH_GATEWAY)
async def test_envoy_accepts_the_configuration_that_the_arguments_make(
    name: str, tmp_path: Path
) -> None:
    arguments = arguments_with_files(name, tmp_path)

    async def succeeds(*command: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()

    await succeeds(str(BIN / "outbox"), *arguments, "--write-only")
    await succeeds(*envoy_command(tmp_path / "run" / "envoy.json"), "--mode", "validate")
    dispatchers = "outbox-dispatcher" in (tmp_path / "run" / "envoy.json").read_text()
    assert dispatchers == (name == "full")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"gateway": {"replica": 2}}, "replica"),
        ({"gateway": {"origins": ["https://app.example.com/path"]}}, "origins"),
        ({"gateway": {"ingress": {"enabled": True}}}, "hosts"),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "parentRefs"),
        ({"gateway": {"trustedProxies": -1}}, "trustedProxies"),
        ({"gateway": {"service": {"externalTrafficPolicy": "Near"}}}, "externalTrafficPolicy"),
        (
            {"gateway": {"enabled": True, "service": {"externalTrafficPolicy": "Local"}}},
            "gateway.service.externalTrafficPolicy: only for the types NodePort and LoadBalancer",
        ),
        (
            {"gateway": {"enabled": True, "tls": {"existingSecret": "a", "plaintext": True}}},
            "gateway.tls.plaintext: true, but gateway.tls.existingSecret is set",
        ),
        (
            {"gateway": {"enabled": True, "tls": {"plaintext": True, "clientCaKey": "ca.crt"}}},
            "gateway.tls.clientCaKey: client certificates require TLS",
        ),
        (
            {"tls": {"clientCaKey": "ca.crt"}, "gateway": {"enabled": True}},
            "gateway.services.clientSecret: the services require client certificates",
        ),
        (
            {
                "tls": {"existingSecret": "", "plaintext": True},
                "gateway": {"enabled": True, "services": {"clientSecret": "a"}},
            },
            "gateway.services.clientSecret: the services have no TLS",
        ),
    ],
)
def test_wrong_values_of_the_gateway_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm.HelmError, match=complaint):
        render(with_values(**values))


def test_the_probes_use_the_schema_of_the_clients_and_need_no_service() -> None:
    for values, scheme in (
        ({"enabled": True}, "HTTPS"),
        ({"enabled": True, "tls": {"plaintext": True}}, "HTTP"),
    ):
        container = gateway(with_values(gateway=values))
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"] == {"path": HEALTH, "port": 8080, "scheme": scheme}
    # A kubelet has no client certificate.
    mutual = gateway(VALUES["keda"])
    assert (mutual["readinessProbe"]["tcpSocket"], "httpGet" in mutual["readinessProbe"]) == (
        {"port": 8080},
        False,
    )


def test_a_pod_leaves_the_load_balancers_before_envoy_ends() -> None:
    values = with_values(gateway={"enabled": True, "drainSeconds": 20})
    hook = gateway(values)["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == ["sleep", "20"]
    spec = pod_of(render(values), "gateway")["spec"]
    assert spec["terminationGracePeriodSeconds"] == 35


@pytest.mark.parametrize("dispatcher", [False, True])
def test_only_the_services_that_the_gateway_offers_let_it_in(dispatcher: bool) -> None:
    resources = render(with_values(gateway={"enabled": True, "dispatcher": dispatcher}))
    policies = {
        one["metadata"]["labels"]["app.kubernetes.io/component"]: one["spec"]
        for one in of_kind(resources, "NetworkPolicy")
    }
    label = "'app.kubernetes.io/component': 'gateway'"
    admitting = {name for name, spec in policies.items() if label in str(spec.get("ingress"))}
    offered = {"scheduler", "stats"} | ({"dispatcher"} if dispatcher else set())
    assert admitting == offered
    out = {port["port"] for rule in policies["gateway"]["egress"] for port in rule["ports"]}
    assert out == {53, 50051, 50053} | ({50052} if dispatcher else set())


def test_ingress_and_http_route_lead_to_the_port_of_the_service() -> None:
    resources = render(VALUES["full"])
    (service,) = of_gateway(resources, "Service")
    (port,) = service["spec"]["ports"]
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    (ingress,) = of_gateway(resources, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {
        "name": "outbox-gateway",
        "port": {"number": port["port"]},
    }
    (route,) = of_gateway(resources, "HTTPRoute")
    (target,) = route["spec"]["rules"][0]["backendRefs"]
    assert target == {"name": "outbox-gateway", "port": port["port"]}
    container = gateway(VALUES["full"])
    assert container["ports"][0]["name"] == port["name"] == "https"
    assert port["targetPort"] == container["ports"][0]["containerPort"] == 8080
