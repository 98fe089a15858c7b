"""The systemd units, run by systemd on a Debian host: a container that has nothing else."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
from outbox_client import AsyncClient

from outbox_server.deploy.embedded.inbox import Inbox
from tests.conftest import Stores
from tests.containers.mails import database_url, serving, waiting_mails
from tests.containers.podman import IMAGE, podman
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

DATABASE: Final = "outbox_systemd"
HOST: Final = "outbox-host"
ROOT: Final = Path(__file__).parents[2]
# The services, and the health ports that their files in deploy/systemd set.
SERVICES: Final = {"scheduler": 50061, "dispatcher": 50062, "stats": 50063}
# The users that systemd makes for DynamicUser=.
DYNAMIC_USERS: Final = range(61184, 65520)
NO_CAPABILITIES: Final = {f"Cap{kind}": "0" * 16 for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}

# systemd makes the folder of a service's secrets in a mount namespace, and expects to see it in its
# own. The kernel's protections of /proc are those of systemd, not of podman: it needs both rights.
START: Final = (
    *("run", "--detach", "--name", HOST, "--network", "host", "--systemd", "always"),
    *("--cap-add", "SYS_ADMIN", "--cap-add", "SYS_PTRACE", "--security-opt", "seccomp=unconfined"),
    *("--mount", f"type=image,source={IMAGE},destination=/image"),
    *("--volume", f"{ROOT}/deploy/systemd:/units:ro", "localhost/outbox-host"),
    *("sh", "-c", "mount --make-rshared / && exec /lib/systemd/systemd"),
)
# As docs/kubernetes.md says, with the installation that is in the image.
INSTALL: Final = r"""
set -eu
ln -s /image/opt/outbox /opt/outbox
install -d -m 700 /etc/outbox /etc/outbox/secrets
install -m 600 /units/*.env /etc/outbox/
printf %s "$1" > /etc/outbox/secrets/database-url
printf %s "$2" > /etc/outbox/secrets/redis-url
printf %s "$3" > /etc/outbox/secrets/smtp-url
echo OUTBOX_MIN_GAP=50ms >> /etc/outbox/outbox.env
/opt/outbox/bin/outbox keys generate-encryption-key > /etc/outbox/secrets/encryption-keys
install -m 644 /units/*.service /etc/systemd/system/
for service in scheduler dispatcher; do
  install -d "/etc/systemd/system/outbox@$service.service.d"
  printf '%s\n' '[Service]' 'LoadCredential=smtp-url:/etc/outbox/secrets/smtp-url' \
    'Environment=OUTBOX_SMTP_URL_FILE=%d/smtp-url' \
    > "/etc/systemd/system/outbox@$service.service.d/relay.conf"
done
systemctl daemon-reload
systemctl enable --now outbox@scheduler outbox@dispatcher outbox@stats
"""
FIRST_KEY: Final = (
    "OUTBOX_DATABASE_URL_FILE=/etc/outbox/secrets/database-url "
    "/opt/outbox/bin/outbox keys create --operator"
)


async def on_host(*words: str, may_fail: bool = False) -> str:
    return await podman("exec", HOST, *words, may_fail=may_fail)


async def property_of(name: str, wanted: str) -> str:
    shown = await on_host("systemctl", "show", "--value", "--property", wanted, f"outbox@{name}")
    return shown.strip()


async def until_ready() -> None:
    for port in SERVICES.values():
        await eventually(functools.partial(serving, port, "readiness"))


@dataclass(frozen=True)
class Host:
    """A host on which the services run."""

    inbox: Inbox
    api_key: str

    def client(self) -> AsyncClient:
        return AsyncClient(
            "127.0.0.1:50051",
            stats="127.0.0.1:50053",
            dispatcher="127.0.0.1:50052",
            api_key=self.api_key,
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    """Install the units as documented, and wait until the services are ready."""
    await stores.postgres.ensure_database(DATABASE)
    await podman("rm", "--force", "--ignore", "--time", "0", HOST)
    async with Inbox(tmp_path_factory.mktemp("inbox")) as inbox:
        await podman(*START)
        try:

            async def booted() -> bool:
                state = await on_host("systemctl", "is-system-running", may_fail=True)
                return state.strip() in ("running", "degraded")

            await eventually(booted)
            urls = (database_url(stores, DATABASE), stores.redis.url, inbox.url)
            await on_host("sh", "-c", INSTALL, "sh", *urls)
            (key,) = re.findall(r"\bobx_\S+|\boutbox_\S+", await on_host("sh", "-c", FIRST_KEY))
            await until_ready()
            yield Host(inbox, key)
        finally:
            await podman("rm", "--force", "--time", "0", HOST)


@pytest.mark.usefixtures("host")
async def test_each_service_runs_without_rights_and_with_copies_of_its_secrets() -> None:
    users = set()
    for name in SERVICES:
        pid = await property_of(name, "MainPID")
        text = await on_host("cat", f"/proc/{pid}/status")
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        (user,) = set(status["Uid"].split())
        assert int(user) in DYNAMIC_USERS
        users.add(user)
        assert {field: status[field] for field in NO_CAPABILITIES} == NO_CAPABILITIES
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        folder = f"/run/credentials/outbox@{name}.service"
        kept = await on_host(
            "stat",
            "--format",
            "%u %a %n",
            *(f"{folder}/{one}" for one in ("database-url", "redis-url", "encryption-keys")),
        )
        assert [line.split()[:2] for line in kept.splitlines()] == [[user, "400"]] * 3
        # Mounted for this service, so that it can write to no folder of the host.
        mounts = await on_host("cat", f"/proc/{pid}/mountinfo")
        (root,) = [line.split() for line in mounts.splitlines() if line.split()[4] == "/"]
        assert "ro" in root[5].split(",")
    assert len(users) == len(SERVICES)


async def test_a_stop_and_a_start_lose_and_double_no_waiting_mail(host: Host) -> None:
    units = [f"outbox@{name}" for name in SERVICES]
    async with waiting_mails(host.client, host.inbox, until_ready, "stop@example.com"):
        await on_host("systemctl", "stop", *units)
        for name, unit in zip(SERVICES, units, strict=True):
            assert await property_of(name, "Result") == "success"
            assert "stopped" in await on_host("journalctl", "--output", "cat", "--unit", unit)
        await on_host("systemctl", "start", *units)


async def test_a_dispatcher_that_is_killed_is_started_again_and_sends_the_rest(host: Host) -> None:
    async with waiting_mails(host.client, host.inbox, until_ready, "kill@example.com"):
        killed = await property_of("dispatcher", "MainPID")
        await on_host("systemctl", "kill", "--signal", "SIGKILL", "outbox@dispatcher")

        async def another_runs() -> bool:
            state = await property_of("dispatcher", "ActiveState")
            return state == "active" and await property_of("dispatcher", "MainPID") != killed

        await eventually(another_runs)
        assert await property_of("dispatcher", "NRestarts") == "1"


@pytest.mark.usefixtures("host")
async def test_a_service_with_a_wrong_setting_ends_and_is_not_started_again() -> None:
    file = "/etc/outbox/dispatcher.env"
    await on_host("sh", "-c", f"cp {file} /kept && echo OUTBOX_DISPATCHER_CONCURRENCY=no >> {file}")
    await on_host("systemctl", "restart", "outbox@dispatcher")

    async def failed() -> bool:
        return await property_of("dispatcher", "ActiveState") == "failed"

    await eventually(failed)
    assert await property_of("dispatcher", "NRestarts") == "0"
    log = await on_host("journalctl", "--output", "cat", "--unit", "outbox@dispatcher")
    assert "OUTBOX_DISPATCHER_CONCURRENCY" in log
    await on_host("cp", "/kept", file)
    await on_host("systemctl", "start", "outbox@dispatcher")
    await until_ready()
