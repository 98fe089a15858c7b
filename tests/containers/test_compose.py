"""The compose file, started by podman-compose: all containers, from secrets to mail and metrics.

Podman 4.3 and the registries cannot do all that Docker Compose does. So a copy of the file is
changed in these points, and in no others:

- The images of other projects are stand-ins from Debian packages (`stand_ins/Containerfile`).
- Our image was built before, so nothing is built. Logs are kept by podman.
- The services have a short OUTBOX_MIN_GAP, so that the test need not wait for long.
- Podman without systemd runs no health checks. The test runs them, as the file says, and starts a
  service when the conditions of its `depends_on` hold, instead of podman-compose.
"""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml
from outbox_client import AsyncClient

from outbox_server.deploy.embedded.inbox import Inbox
from tests.containers.mails import waiting_mails
from tests.containers.podman import IMAGE, podman, podman_compose, remove_everything
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
GATEWAY: Final = "http://127.0.0.1:8080"
PROMETHEUS: Final = "http://127.0.0.1:9090"
GRAFANA: Final = "http://127.0.0.1:3000"
SERVICES: Final = ("scheduler", "dispatcher", "stats")
# What podman calls the address of this machine in a container.
THIS_MACHINE: Final = "host.containers.internal"


@dataclass
class Project:
    """The containers of the compose file, and the mail server to which they send."""

    folder: Path
    services: dict[str, dict[str, Any]]
    inbox: Inbox
    smtp_port: int

    @property
    def api_key(self) -> str:
        """The first operator's key."""
        return (self.folder / "secrets" / "api-key").read_text()

    def client(self) -> AsyncClient:
        return AsyncClient(
            "127.0.0.1:50051",
            stats="127.0.0.1:50053",
            dispatcher="127.0.0.1:50052",
            api_key=self.api_key,
        )

    async def compose(self, *words: str) -> str:
        """Run a command of podman-compose."""
        variables = {"OUTBOX_SMTP_URL": f"smtp://{THIS_MACHINE}:{self.smtp_port}"}
        return await podman_compose(self.folder, variables, *words)

    async def start(self) -> None:
        """Start each service when what it depends on is there."""
        for name in in_order(self.services):
            for other, condition in dependencies(self.services[name]).items():
                await eventually(partial(self.holds, other, condition))
            await self.compose("up", "--detach", "--no-build", name)
        await self.until_ready()

    async def until_ready(self) -> None:
        """Wait until the health check of every service passes."""
        for name, one in self.services.items():
            if "healthcheck" in one:
                await eventually(partial(self.holds, name, "service_healthy"))

    async def holds(self, name: str, condition: str) -> bool:
        """Whether a condition of `depends_on` holds."""
        container = f"outbox_{name}_1"
        if condition == "service_healthy":
            return await podman("healthcheck", "run", container, may_fail=True) == ""
        (found,) = json.loads(await podman("inspect", container))
        if condition == "service_started":
            return bool(found["State"]["Running"])
        assert condition == "service_completed_successfully"
        return (found["State"]["Status"], found["State"]["ExitCode"]) == ("exited", 0)


def dependencies(service: dict[str, Any]) -> dict[str, str]:
    """The conditions of a service, by the services that it depends on."""
    given = service.get("depends_on", {})
    if isinstance(given, list):
        return dict.fromkeys(given, "service_started")
    return {name: one["condition"] for name, one in given.items()}


def in_order(services: dict[str, dict[str, Any]]) -> list[str]:
    """The services, each after those that it depends on."""
    ordered: list[str] = []
    while len(ordered) < len(services):
        ready = [
            name
            for name, one in services.items()
            if name not in ordered and dependencies(one).keys() <= set(ordered)
        ]
        assert ready, "the services depend on each other in a circle"
        ordered += ready
    return ordered


def copied(folder: Path) -> dict[str, dict[str, Any]]:
    """Copy what the compose file uses, with our changes; return its services."""
    for name in ("compose", "grafana", "prometheus"):
        shutil.copytree(DEPLOY / name, folder / name, ignore=shutil.ignore_patterns("secrets"))
    file = folder / "compose" / "compose.yaml"
    document = yaml.safe_load(file.read_text())
    services: dict[str, dict[str, Any]] = copy.deepcopy(document["services"])
    for one in document["services"].values():
        for name in ("build", "depends_on", "logging"):
            one.pop(name, None)
        if one["image"].startswith("outbox:"):
            one["image"] = IMAGE
        if "OUTBOX_SMTP_URL" in one.get("environment", {}):
            one["environment"]["OUTBOX_MIN_GAP"] = "50ms"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return services


async def relay(inbox: Inbox) -> asyncio.Server:
    """Let containers reach the inbox, which listens on loopback."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while got := await reader.read(65536):
            writer.write(got)
            await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_inbox = await asyncio.open_connection("127.0.0.1", inbox.port)
        await asyncio.gather(
            forward(reader, to_inbox[1]), forward(to_inbox[0], writer), return_exceptions=True
        )

    return await asyncio.start_server(connected, "0.0.0.0", 0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def project(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    """Make the secrets and start all containers, as docs/kubernetes.md says."""
    folder = tmp_path_factory.mktemp("compose")
    # Containers read the files as other users.
    for one in (folder, folder.parent):
        one.chmod(0o755)
    services = copied(folder)
    await remove_everything()
    made = await asyncio.create_subprocess_exec("sh", folder / "compose" / "make-secrets.sh")
    assert await made.wait() == 0
    async with Inbox(folder / "inbox") as inbox, await relay(inbox) as server:
        port = server.sockets[0].getsockname()[1]
        started = Project(folder / "compose", services, inbox, port)
        try:
            await started.start()
            yield started
        finally:
            await started.compose("down", "--timeout", "0")
            await remove_everything()


def get(url: str, key: str = "") -> str:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


async def test_mail_is_sent_and_survives_a_stop_and_a_start_of_the_services(
    project: Project,
) -> None:
    async def until_ready() -> None:
        for name in SERVICES:
            await eventually(partial(project.holds, name, "service_healthy"))

    async with waiting_mails(project.client, project.inbox, until_ready, "compose@example.com"):
        await project.compose("stop", *SERVICES)
        for name in SERVICES:
            (found,) = json.loads(await podman("inspect", f"outbox_{name}_1"))
            assert (found["State"]["Status"], found["State"]["ExitCode"]) == ("exited", 0)
        await project.compose("start", *SERVICES)


async def test_the_gateway_answers_rest_calls_with_the_operators_key(project: Project) -> None:
    url = f"{GATEWAY}/api/senders?user_id=shop"

    async def listed() -> dict[str, Any]:
        try:
            return dict(json.loads(await asyncio.to_thread(get, url, project.api_key)))
        except OSError:
            return {}

    await eventually(listed)


@pytest.mark.usefixtures("project")
async def test_prometheus_scrapes_every_service_and_knows_the_alerts() -> None:
    async def jobs_up() -> list[str]:
        answer = json.loads(await asyncio.to_thread(get, f"{PROMETHEUS}/api/v1/query?query=up"))
        found = answer["data"]["result"]
        return sorted(one["metric"]["job"] for one in found if one["value"][1] == "1")

    async def all_up() -> bool:
        return await jobs_up() == ["outbox", "outbox", "outbox", "outbox-gateway"]

    await eventually(all_up)
    rules = json.loads(await asyncio.to_thread(get, f"{PROMETHEUS}/api/v1/rules"))["data"]
    alerts = [
        rule
        for group in rules["groups"]
        for rule in group["rules"]
        if rule["type"] == "alerting" and rule["health"] != "err"
    ]
    assert len(alerts) > 10


@pytest.mark.usefixtures("project")
async def test_the_dashboard_that_grafana_is_given_finds_its_metrics() -> None:
    async def most_have_series() -> bool:
        lines = (await asyncio.to_thread(get, GRAFANA)).splitlines()
        # Rates need several scrapes, and some metrics appear with what they count.
        with_series = [line for line in lines if not line.startswith("0 ")]
        return len(lines) > 30 and len(with_series) > len(lines) * 2 // 3

    await eventually(most_have_series)


@pytest.mark.usefixtures("project")
async def test_our_containers_have_no_rights_and_a_read_only_root() -> None:
    for name in (*SERVICES, "gateway"):
        (found,) = json.loads(await podman("inspect", f"outbox_{name}_1"))
        assert found["HostConfig"]["ReadonlyRootfs"] is True
        assert found["EffectiveCaps"] in (None, [])
        status = await podman("exec", f"outbox_{name}_1", "cat", "/proc/1/status")
        assert "NoNewPrivs:\t1" in status
        assert "Uid:\t65532\t" in status
