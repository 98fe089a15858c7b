"""The image, and the chart's pods in real containers, from an empty database to mails."""

from __future__ import annotations

import asyncio
import functools
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPSConnection
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
from outbox_client import AsyncClient, Tls

import outbox_server
from outbox_server.deploy.certificates import Certificate, self_signed
from outbox_server.deploy.chart.rendering import render
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.auth.keys import make_key
from outbox_server.shared.secrets import generate_key
from release.versions import project_version
from tests.conftest import Stores
from tests.containers.mails import arrivals, database_url, serving, waiting_mails
from tests.containers.podman import IMAGE, PlayedPod, podman, remove_everything
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")
short = pytest.mark.short

DATABASE: Final = "outbox_containers"
SERVICES: Final = ("scheduler", "dispatcher", "stats")
PODS: Final = (*SERVICES, "gateway")
# The only folder in which the processes of a pod can write.
WRITABLE: Final = {"scheduler": ["/var/tmp"], "gateway": ["/run/gateway"]}
ALL_SECRETS: Final = {"database-url", "redis-url", "encryption-keys", "smtp-url"}
SECRETS: Final = {
    "scheduler": ALL_SECRETS,
    "dispatcher": ALL_SECRETS,
    "stats": {"database-url"},
    "gateway": set(),
}
# Shows process 1, its arguments, the folders that can be written, and the secrets.
LOOK: Final = r"""
cat /proc/1/status; echo; echo --
tr '\0' ' ' < /proc/1/cmdline; echo; echo --
for folder; do touch "$folder/written" 2>/dev/null && echo "$folder"; done; echo; echo --
ls /run/secrets/outbox 2>/dev/null
true
"""
DEMO: Final = Path(outbox_server.__file__).parent / "cli" / "demo.csv"
MIB: Final = 1024 * 1024
# What the image adds to its base: Envoy alone is 120 MiB.
MAX_ADDED: Final = 400 * MIB


@dataclass
class ChartInstallation:
    """An installation of the rendered chart, and the mail server to which it sends."""

    pods: dict[str, PlayedPod]
    inbox: Inbox
    api_key: str
    certificate: Certificate
    jobs: dict[str, tuple[int, str]]

    def client(self) -> AsyncClient:
        return AsyncClient(
            f"127.0.0.1:{self.pods['scheduler'].ports[50051]}",
            stats=f"127.0.0.1:{self.pods['stats'].ports[50053]}",
            dispatcher=f"127.0.0.1:{self.pods['dispatcher'].ports[50052]}",
            api_key=self.api_key,
            tls=Tls(ca=self.certificate.public),
        )

    async def until_ready(self) -> None:
        """Wait until the readiness probe of every pod passes, as a kubelet asks."""
        for name in PODS:
            await eventually(functools.partial(self.passes, name, "readinessProbe"))

    async def passes(self, name: str, kind: str) -> bool:
        """Ask a pod what one of the probes in its manifest asks."""
        pod = self.pods[name]
        if name == "gateway":
            path = pod.rendered[kind]["httpGet"]["path"]
            return (await self.through_the_gateway("GET", path))[0] == HTTPStatus.OK
        probe = pod.rendered[kind]["grpc"]
        return await serving(pod.ports[probe["port"]], probe["service"])

    async def through_the_gateway(
        self, method: str, path: str, body: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """Call the REST API; return the status and the answer. The status 0 is no connection."""
        context = ssl.create_default_context(cafile=self.certificate.public)

        def call() -> tuple[int, str]:
            port = self.pods["gateway"].ports[8080]
            connection = HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
            headers = {
                "authorization": f"Bearer {self.api_key}",
                "content-type": "application/json",
            }
            try:
                connection.request(method, path, json.dumps(body) if body else None, headers)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except OSError:
                return 0, ""
            finally:
                connection.close()

        return await asyncio.to_thread(call)


def values() -> dict[str, object]:
    return {
        "secrets": {"existingSecret": "outbox", "keys": {"smtpUrl": "smtp-url"}},
        "tls": {"existingSecret": "outbox-tls"},
        "operatorKey": {"existingSecret": "outbox-operator"},
        "settings": {"OUTBOX_MIN_GAP": "50ms"},
        "gateway": {"enabled": True},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installation(
    stores: Stores, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ChartInstallation]:
    """Migrate, register the first key and start the services and the gateway."""
    folder = tmp_path_factory.mktemp("installation")
    await stores.postgres.ensure_database(DATABASE)
    await remove_everything()
    certificate = self_signed(folder / "certificate")
    key = make_key().text
    async with Inbox(folder / "inbox") as inbox:
        secrets = {
            "outbox": {
                "database-url": database_url(stores, DATABASE),
                "redis-url": stores.redis.url,
                "encryption-keys": generate_key(),
                "smtp-url": inbox.url,
            },
            "outbox-tls": {
                "tls.crt": certificate.public.read_text(),
                "tls.key": certificate.private.read_text(),
                "ca.crt": certificate.public.read_text(),
            },
            "outbox-operator": {"api-key": key},
        }
        resources = render(values())
        names = ("migrate", "operator-key", *PODS)
        pods = {name: PlayedPod(resources, name, secrets, folder) for name in names}
        try:
            jobs = {"migrate": await pods["migrate"].job()}
            await asyncio.gather(*(pods[name].play() for name in PODS))
            jobs["operator-key"] = await pods["operator-key"].job()
            made = ChartInstallation(pods, inbox, key, certificate, jobs)
            await made.until_ready()
            yield made
        finally:
            await remove_everything()


@short
async def test_the_image_is_this_version_and_has_neither_compiler_nor_pip() -> None:
    (image,) = json.loads(await podman("image", "inspect", IMAGE))
    assert image["Labels"]["org.opencontainers.image.version"] == project_version()
    assert image["Config"]["User"] == "65532:65532"
    (base,) = json.loads(await podman("image", "inspect", "localhost/outbox-base"))
    assert 0 < image["Size"] - base["Size"] < MAX_ADDED

    script = 'for name; do command -v "$name"; done; true'
    run = ("run", "--rm", "--network", "host", "--entrypoint", "sh", IMAGE, "-c", script, "sh")
    absent = ("gcc", "cc", "c++", "clang", "ld", "as", "make", "pip", "git")
    # The chart's preStop hook runs `sleep`.
    found = (await podman(*run, *absent, "outbox", "sleep")).split()
    assert found == ["/opt/outbox/bin/outbox", "/usr/bin/sleep"]


@short
async def test_the_jobs_of_the_chart_migrate_and_store_the_first_key(
    installation: ChartInstallation,
) -> None:
    code, _ = installation.jobs["migrate"]
    assert code == 0
    code, log = installation.jobs["operator-key"]
    assert (code, "is stored now" in log) == (0, True)


@short
@pytest.mark.parametrize("name", PODS)
async def test_a_container_has_no_rights_and_cannot_write(
    installation: ChartInstallation, name: str
) -> None:
    pod = installation.pods[name]
    folders = (
        "/",
        "/tmp",
        "/opt/outbox",
        "/run",
        "/run/gateway",
        "/run/secrets/outbox",
        "/etc/outbox/tls",
        "/var/tmp",
    )
    # In one command: each takes podman a second on a busy machine.
    shown = await pod.execute("sh", "-c", LOOK, "sh", *folders)
    status_lines, arguments, written, secrets = shown.split("\n--\n")
    status = dict(line.split(":\t", 1) for line in status_lines.splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["65532"] * 4
    assert status["Gid"].split() == ["65532"] * 4
    assert {int(status[f"Cap{one}"], 16) for one in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    command = arguments.split()
    if name == "gateway":
        assert command[0].endswith("/envoy")
    else:
        assert command[1:3] == ["/opt/outbox/bin/outbox", name]
    assert written.split() == WRITABLE.get(name, [])
    assert set(secrets.split()) == SECRETS[name]
    limit = json.loads(await podman("inspect", pod.container))[0]["HostConfig"]["Memory"]
    assert f"{limit // MIB}Mi" == pod.rendered["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", SERVICES)
async def test_the_probes_pass_from_outside_and_as_commands(
    installation: ChartInstallation, name: str
) -> None:
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert await installation.passes(name, kind)
    pod = installation.pods[name]
    for probe in ("liveness", "readiness"):
        assert "SERVING" in await pod.execute("outbox", "health", probe)
    nobody = await pod.execute("outbox", "health", "--server", "127.0.0.1:9", may_fail=True)
    assert "SERVING" not in nobody


@short
async def test_the_main_job_runs_inside_a_container_and_keeps_every_limit(
    installation: ChartInstallation,
) -> None:
    pod = installation.pods["scheduler"]
    environment = (
        "env",
        f"OUTBOX_API_KEY={installation.api_key}",
        "OUTBOX_TLS_CA=/etc/outbox/tls/tls.crt",
    )
    to_the_scheduler = ("--user", "demo", "--server", f"127.0.0.1:{pod.ports[50051]}")

    async def outbox(*words: str, stdin: str = "") -> str:
        return await pod.execute(*environment, "outbox", *words, *to_the_scheduler, stdin=stdin)

    email = "demo@example.com"
    sender = json.loads(await outbox("senders", "create", "--email", email, "-o", "json"))
    csv = DEMO.read_text(encoding="utf-8")
    texts = ("--subject", "Hello {{ first_name }}", "--body", "Good day")
    await outbox("schedule", "-", "--sender", sender["sender_id"], *texts, "--wait", stdin=csv)

    arrived = arrivals(installation.inbox, email)
    assert arrived.keys() <= {line.split(",")[0] for line in csv.splitlines()[1:]}
    assert len(arrived) > 20
    assert set(arrived.values()) == {1}
    # Ends with 1 if a mail was lost or doubled, or a limit exceeded.
    audit = await pod.execute("outbox", "audit")
    assert "demo@example.com" in audit


@short
async def test_the_gateway_translates_rest_calls_to_the_services_over_tls(
    installation: ChartInstallation,
) -> None:
    # The health checks of Envoy find the services within seconds.
    async def created() -> str:
        status, answer = await installation.through_the_gateway(
            "POST", "/api/senders?user_id=rest", {"email": "rest@example.com"}
        )
        return answer if status == HTTPStatus.OK else ""

    sender = json.loads(await eventually(created))
    assert sender["email"] == "rest@example.com"
    status, answer = await installation.through_the_gateway(
        "GET", f"/api/senders/{sender['sender_id']}/stats?user_id=rest"
    )
    assert (status, json.loads(answer)["sender_id"]) == (HTTPStatus.OK, sender["sender_id"])


@short
async def test_sigterm_and_a_restart_lose_and_double_no_waiting_mail(
    installation: ChartInstallation,
) -> None:
    async with waiting_mails(
        installation.client, installation.inbox, installation.until_ready, "restart@example.com"
    ):
        pods = [installation.pods[name] for name in SERVICES]
        # SIGKILL after the grace period would be 137.
        assert await asyncio.gather(*(pod.stop() for pod in pods)) == [0, 0, 0]
        assert ["stopped" in await pod.log() for pod in pods] == [True, True, True]
        await asyncio.gather(*(pod.start() for pod in pods))


async def test_new_pods_in_place_of_the_old_lose_and_double_no_waiting_mail(
    installation: ChartInstallation,
) -> None:
    async with waiting_mails(
        installation.client, installation.inbox, installation.until_ready, "replace@example.com"
    ):
        await asyncio.gather(*(installation.pods[name].replace() for name in PODS))
